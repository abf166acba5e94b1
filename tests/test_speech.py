"""The speech synthesiser: the same arguments give the same sound, and other ones another."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from mmkernels.testing.speech import SPEEDS, languages, speak, variants


def test_speech_is_a_sound() -> None:
    sound = speak("seven")
    assert sound.dtype == torch.float32 and sound.dim() == 1 and 0.3 * 16_000 < len(sound) < 1.5 * 16_000
    assert 0.2 < float(sound.abs().max()) <= 1
    assert len(speak("seven", sampling_rate=22_050)) == pytest.approx(len(sound) * 22_050 / 16_000, rel=0.01)


@pytest.mark.parametrize("voice", ["en-us", "en-us+f3", "en-gb-scotland+m2", "de", "en-us+whisper", "en-us+klatt"])
def test_the_same_call_gives_the_same_sound(voice: str) -> None:
    """Whatever was spoken before, and by whichever thread."""
    first = speak("seven eight", voice=voice)
    speak("neun", voice="de+f1", speed=300, pitch=90)
    assert torch.equal(speak("seven eight", voice=voice), first)
    with ThreadPoolExecutor(4) as pool:
        for sound in pool.map(lambda _: speak("seven eight", voice=voice), range(8)):
            assert torch.equal(sound, first)


def test_every_argument_counts() -> None:
    plain = speak("seven")
    for change in ({"voice": "en-gb"}, {"voice": "en-us+f1"}, {"pitch": 80}, {"pitch_range": 99}):
        other = speak("seven", **change)
        assert other.shape != plain.shape or not torch.allclose(other, plain, atol=0.05), change
    slow, fast = (len(speak("one two three", speed=speed)) for speed in SPEEDS)
    assert slow > 4 * fast
    assert len(speak("one. two. three.")) > 1.5 * len(plain)
    assert not torch.equal(speak("Häuser", voice="de"), speak("Hauser", voice="de"))  # UTF-8


def test_lists_of_voices() -> None:
    assert len(languages()) > 100 and {"en-us", "en-gb", "de", "fr-fr"} <= set(languages())
    assert {f"m{n}" for n in range(1, 9)} | {f"f{n}" for n in range(1, 6)} <= set(variants())


@pytest.mark.parametrize(
    ("text", "arguments", "match"),
    [
        ("", {}, "text must have something that can be spoken, got ''"),
        ("...", {}, "text must have something that can be spoken, got '...'"),
        ("a\0b", {}, "text must be a str without NUL"),
        (7, {}, "text must be a str without NUL, got 7"),
        ("a", {"voice": "klingon"}, "voice must be a language, such as .*en-us.*, got 'klingon'"),
        ("a", {"voice": "en-us+f99"}, r'voice must have a variant of .*f1, .* behind "\+", got \'en-us\+f99\''),
        ("a", {"voice": "en-us+"}, "voice must have a variant"),
        ("a", {"voice": None}, "voice must be a language, .*got None"),
        ("a", {"speed": 79}, "speed must be an integer from 80 to 450, got 79"),
        ("a", {"speed": 451}, "speed must be an integer from 80 to 450, got 451"),
        ("a", {"speed": 100.0}, "speed must be an integer"),
        ("a", {"pitch": 100}, "pitch must be an integer from 0 to 99, got 100"),
        ("a", {"pitch_range": -1}, "pitch_range must be an integer from 0 to 99, got -1"),
        ("a", {"sampling_rate": 0}, "rate must be a positive integer, got 0"),
    ],
)
def test_bad_arguments(text: Any, arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        speak(text, **arguments)


def test_without_the_synthesiser(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(ImportError, match=r'speaking needs espeakng-loader: pip install "mmkernels\[examples\]"'):
        variants.__wrapped__()


def test_half_a_character_is_refused() -> None:
    with pytest.raises(ValueError, match="text must be a str that UTF-8 can hold, got"):
        speak("a \ud800")
