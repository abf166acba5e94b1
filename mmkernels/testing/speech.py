"""Speech for tests and examples, made by the synthesiser eSpeak NG (the package espeakng-loader)."""

from __future__ import annotations

import _ctypes
import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmkernels.models.blocks.audio import SAMPLING_RATE, resample

_SYNCHRONOUS, _DONT_EXIT, _UTF8 = 2, 0x8000, 1  # of espeak-ng's speak_lib.h
_RATE, _PITCH, _RANGE = 1, 3, 4
_LOCK = threading.Lock()  # the synthesiser keeps its state in global variables

SPEEDS = (80, 450)
"""The slowest and the fastest speech, in words a minute."""

_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


class _Voice(ctypes.Structure):
    """The head of `espeak_VOICE`."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("languages", ctypes.c_void_p),  # for each language a byte of priority and a string
        ("identifier", ctypes.c_char_p),
    )


def speak(
    text: str,
    *,
    voice: str = "en-us",
    speed: int = 175,
    pitch: int = 50,
    pitch_range: int = 50,
    sampling_rate: int = SAMPLING_RATE,
) -> Tensor:
    """Returns spoken text, float32 ``[samples]`` from -1 to 1. The same arguments give the same sound.

    A call takes a few milliseconds. Threads wait for each other.

    Args:
        text: one line or several; what cannot be spoken is left out.
        voice: a language of `languages`, or one with a variant of `variants`: "en-us+f3".
        speed: in words a minute, from 80 to 450.
        pitch: of the voice, from 0 to 99.
        pitch_range: how much the pitch varies, from 0 (monotone) to 99.
        sampling_rate: in samples a second.

    Raises:
        ImportError: espeakng-loader, or soxr, is not installed.
        ValueError: there is no such voice, a number is out of range, or nothing of the text can be spoken.

    Example:
        >>> sound = speak("seven", voice="en-us+f2", speed=160)
        >>> sound.dtype, 0.3 < sound.shape[0] / 16_000 < 1.5
        (torch.float32, True)
    """
    if not isinstance(text, str) or "\0" in text:
        raise ValueError(f"text must be a str without NUL, got {text!r}")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"text must be a str that UTF-8 can hold, got {text!r}")
    ranges = {"speed": (speed, *SPEEDS), "pitch": (pitch, 0, 99), "pitch_range": (pitch_range, 0, 99)}
    for name, (value, low, high) in ranges.items():
        if type(value) is not int or not low <= value <= high:
            raise ValueError(f"{name} must be an integer from {low} to {high}, got {value!r}")
    _check_voice(voice)
    with _synthesiser() as (library, rate):
        samples = _spoken(library, text, voice, (_RATE, speed), (_PITCH, pitch), (_RANGE, pitch_range))
    values = torch.frombuffer(samples, dtype=torch.int16).float() / 32768 if samples else torch.zeros(0)
    if not values.any():
        raise ValueError(f"text must have something that can be spoken, got {text!r}")
    return resample(values, rate, sampling_rate)


@lru_cache(maxsize=1)
def languages() -> tuple[str, ...]:
    """Returns the languages that the synthesiser speaks, such as "en-us", "en-gb-scotland" and "de".

    Example:
        >>> "en-us" in languages()
        True
    """
    with _synthesiser() as (library, _):
        library.espeak_ListVoices.restype = ctypes.POINTER(ctypes.POINTER(_Voice))
        listed = library.espeak_ListVoices(None)
        found = set()
        at = 0
        while listed[at]:
            found.add(ctypes.string_at(listed[at].contents.languages + 1).decode())
            at += 1
    return tuple(sorted(found))


@lru_cache(maxsize=1)
def variants() -> tuple[str, ...]:
    """Returns the variants of voices: "m1" to "m8" are of men, "f1" to "f5" of women, others have names.

    Example:
        >>> set(variants()) >= {"m1", "m2", "f1", "f2"}
        True
    """
    folder = Path(_loader().get_data_path()) / "voices" / "!v"
    return tuple(sorted(path.name for path in folder.iterdir()))


def _check_voice(voice: object) -> None:
    """Raises unless there is such a voice: the synthesiser would take another one."""
    language, plus, variant = voice.partition("+") if isinstance(voice, str) else ("", "", "")
    if language not in languages():
        known = ", ".join(name for name in languages() if name.startswith("en"))
        raise ValueError(f"voice must be a language, such as {known}, or one with a variant, got {voice!r}")
    if plus and variant not in variants():
        raise ValueError(f'voice must have a variant of {", ".join(variants())} behind "+", got {voice!r}')


def _loader() -> Any:
    try:
        import espeakng_loader
    except ImportError as error:
        raise ImportError('speaking needs espeakng-loader: pip install "mmkernels[examples]"') from error
    return espeakng_loader


@contextmanager
def _synthesiser() -> Iterator[tuple[Any, int]]:
    """Loads the library for one ``with`` block; gives it and its sampling rate.

    Its global variables keep what was spoken before, which changes the next sound even with the same seed; only a
    library that is loaded anew begins from the same state.
    """
    loader = _loader()
    with _LOCK:
        library = ctypes.CDLL(str(loader.get_library_path()))
        try:
            rate = library.espeak_Initialize(_SYNCHRONOUS, 0, str(loader.get_data_path()).encode(), _DONT_EXIT)
            if rate <= 0:
                raise RuntimeError(f"espeak_Initialize must return a sampling rate, got {rate}")
            yield library, rate
            library.espeak_Terminate()
        finally:
            _ctypes.dlclose(library._handle)


def _spoken(library: Any, text: str, voice: str, *parameters: tuple[int, int]) -> bytearray:
    """Returns 16-bit samples."""
    samples = bytearray()

    def take(values: Any, count: int, events: int) -> int:
        if values and count > 0:
            samples.extend(ctypes.string_at(values, 2 * count))
        return 0  # go on

    callback: Callable[..., int] = _Callback(take)  # kept alive until the library is done
    library.espeak_SetSynthCallback(callback)
    library.espeak_ng_SetRandSeed(ctypes.c_long(0))  # of the noise in whispering voices
    library.espeak_SetVoiceByName(voice.encode())
    for parameter, value in parameters:
        library.espeak_SetParameter(parameter, value, 0)
    content = text.encode()
    status = library.espeak_Synth(content, ctypes.c_size_t(len(content) + 1), 0, 0, 0, _UTF8, None, None)
    library.espeak_Synchronize()
    if status:
        raise RuntimeError(f"espeak_Synth must return 0, got {status}")
    return samples
