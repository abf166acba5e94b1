"""The sounds and images of `spoken_digits.py`: digits that a synthesiser speaks, with noise, and handwritten ones."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from clip_digits_data import DIGITS, augment
from torch import Tensor
from transformers import WhisperFeatureExtractor

from mmkernels.models import log_mel
from mmkernels.testing.speech import speak

RATE = 16_000  # samples a second
SECONDS = 0.8  # the longest sound
SAMPLES = int(SECONDS * RATE)
BANDS, FRAMES = 80, int(100 * SECONDS)  # of a log-mel spectrogram, as Whisper reads it

# The synthesiser speaks a language with an accent, and as a speaker: other formants, pitch and breath.
ACCENTS = ("en-us", "en-gb-x-rp", "en-029", "en-gb-x-gbclan")  # American, British, Caribbean, of Lancaster
SPEAKERS = (
    "m1", "m2", "m4", "m5", "m7", "m8", "f1", "f2", "f4", "klatt", "klatt4", "Alicia", "Andrea", "Andy", "Annie",
    "Denis", "Gene", "Hugo", "Jacky", "Lee", "Mario", "Michael", "adam", "anika", "benjamin", "caleb", "david", "john",
    "linda", "max", "steph", "victor",
)  # fmt: skip
HELD_ACCENTS = ("en-us", "en-gb-x-rp", "en-gb-scotland")  # the last is not in training
HELD_SPEAKERS = ("m3", "m6", "f3", "f5", "klatt2", "whisper")  # none is in training, and nobody whispers there
SLOWEST, FASTEST = 150, 260  # of training, in words a minute
HELD_SPEEDS = (160, 240)
COPIES = 4  # how often each sound of training is recorded, with other noise each time
LOUDNESS = 0.05  # the root of the mean square of a sound

NOISES = ("white", "pink", "babble")  # of training; babble is of several training voices at once
NEW_NOISE = "hum"  # not in training: of mains, 50 Hz and its harmonics
LEVELS = (20, 10, 0)  # signal over noise in decibels, at which the report is made
QUIETEST, NOISIEST = 30.0, -5.0  # the same of training
TALKERS, HARMONICS, MAINS = 5, 12, 50.0
MARGIN, HELD_MARGIN = 0.1, 0.05  # the longest silence before and behind a word in training, and that of others, in s


class Sounds(NamedTuple):
    """Spoken digits.

    Attributes:
        samples: float32 ``[N, SAMPLES]``, 16,000 a second; 0 behind the end of each sound.
        lengths: int64 ``[N]``, in samples.
        digits: int64 ``[N]``.
    """

    samples: Tensor
    lengths: Tensor
    digits: Tensor

    def part(self, rows: Tensor) -> Sounds:
        return Sounds(*(x[rows] for x in self))


class Recordings(NamedTuple):
    """What the model hears of sounds.

    Attributes:
        mel: float32 ``[N, BANDS, FRAMES]``, log-mel spectrograms.
        frames: int64 ``[N]``, how many frames a sound has; the others are padding.
        digits: int64 ``[N]``.
    """

    mel: Tensor
    frames: Tensor
    digits: Tensor

    def part(self, rows: Tensor | slice) -> Recordings:
        """Returns some recordings, cut behind the longest."""
        mel, frames, digits = (x[rows] for x in self)
        return Recordings(mel[..., : int(frames.max())], frames, digits)


class Voice(NamedTuple):
    """Who says a digit, and at how many words a minute."""

    accent: str
    speaker: str
    speed: int


# Speech.


def say(voices: Sequence[Voice], pitches: Sequence[int]) -> Sounds:
    """Returns all ten digits of each voice, digit by digit; `pitches` has one for each sound."""
    samples, lengths = torch.zeros(10 * len(voices), SAMPLES), []
    for row, (word, voice) in enumerate(itertools.product(DIGITS, voices)):
        sound = speak(word, voice=f"{voice.accent}+{voice.speaker}", speed=voice.speed, pitch=pitches[row])[:SAMPLES]
        samples[row, : len(sound)] = LOUDNESS * sound / sound.square().mean().sqrt()
        lengths.append(len(sound))
    return Sounds(samples, torch.tensor(lengths), torch.arange(10).repeat_interleave(len(voices)))


def training_sounds(speakers: int, draw: torch.Generator) -> Sounds:
    """Returns the digits of the first speakers in all accents, at random speeds and pitches."""
    names = list(itertools.product(SPEAKERS[:speakers], ACCENTS))
    speeds = torch.randint(SLOWEST, FASTEST + 1, (len(names),), generator=draw).tolist()
    pitches = torch.randint(30, 71, (10 * len(names),), generator=draw).tolist()
    return say([Voice(accent, speaker, speed) for (speaker, accent), speed in zip(names, speeds)], pitches)


def held_voices(speakers: int) -> list[Voice]:
    """Returns the first speakers that are not in training, in each accent and at each speed."""
    return [Voice(*name) for name in itertools.product(HELD_ACCENTS, HELD_SPEAKERS[:speakers], HELD_SPEEDS)]


def held_sounds(voices: Sequence[Voice]) -> Sounds:
    """Returns the digits of voices, with a short silence before and behind each."""
    sounds = say(voices, [50] * (10 * len(voices)))
    margin = torch.full_like(sounds.lengths, int(HELD_MARGIN * RATE))
    return moved(sounds, margin, margin)


def moved(sounds: Sounds, before: Tensor, behind: Tensor) -> Sounds:
    """Returns sounds with silence, as many samples [N] before and behind each as there is room for."""
    before = torch.minimum(before, SAMPLES - sounds.lengths)
    source = torch.arange(SAMPLES) - before[:, None]
    samples = sounds.samples.gather(1, source.clamp(min=0)) * (source >= 0)
    return Sounds(samples, (before + sounds.lengths + behind).clamp(max=SAMPLES), sounds.digits)


# Noise.


def noisy(sounds: Sounds, kind: str, level: float | Tensor, draw: torch.Generator, others: Tensor) -> Sounds:
    """Returns sounds with noise from their beginning to their end.

    Args:
        kind: one of `NOISES`, or `NEW_NOISE`.
        level: signal over noise in decibels, a number or [N].
        others: [M, SAMPLES], the sounds that babble is made of.
    """
    noise = make_noise(kind, len(sounds.samples), draw, others)
    within = torch.arange(SAMPLES) < sounds.lengths[:, None]
    factor = LOUDNESS * 10 ** (-torch.as_tensor(level) / 20)
    return sounds._replace(samples=sounds.samples + factor.view(-1, 1) * noise * within)


def make_noise(kind: str, count: int, draw: torch.Generator, others: Tensor) -> Tensor:
    """Returns noise [count, SAMPLES] of which the mean square is 1."""
    time = torch.arange(SAMPLES)
    if kind == "babble":
        rows = torch.randint(len(others), (TALKERS, count), generator=draw)
        shift = torch.randint(SAMPLES, (TALKERS, count, 1), generator=draw)
        noise = sum(others[row].gather(1, (time + by) % SAMPLES) for row, by in zip(rows, shift))
    elif kind == "hum":
        order = torch.arange(1, HARMONICS + 1)[:, None, None]
        phase = torch.rand(HARMONICS, count, 1, generator=draw)
        noise = (torch.sin(2 * torch.pi * (order * MAINS / RATE * time + phase)) / order).sum(0)
    else:
        noise = torch.randn(count, SAMPLES, generator=draw)
        if kind == "pink":  # the power falls as 1 / frequency
            frequency = torch.fft.rfftfreq(SAMPLES, 1 / RATE).clamp(min=1 / SECONDS)
            noise = torch.fft.irfft(torch.fft.rfft(noise) * frequency.rsqrt(), n=SAMPLES)
    return noise / noise.square().mean(1, keepdim=True).sqrt()


# What the model hears.


@lru_cache(maxsize=1)
def _extractor() -> Any:
    return WhisperFeatureExtractor(feature_size=BANDS)


def hear(sounds: Sounds) -> Recordings:
    """Returns the log-mel spectrograms of sounds."""
    parts = [sound[:length] for sound, length in zip(sounds.samples, sounds.lengths.tolist())]
    mel = log_mel(parts, RATE, seconds=SECONDS, extractor=_extractor())
    return Recordings(mel.features, torch.tensor(mel.lengths), sounds.digits)


def record(sounds: Sounds, draw: torch.Generator) -> Recordings:
    """Returns each of training's sounds `COPIES` times, with random noise, silence and loudness; sorted by digit."""
    found = []
    for _ in range(COPIES):
        for kind, rows in zip(NOISES, torch.randperm(len(sounds.digits), generator=draw).chunk(len(NOISES))):
            before, behind = (MARGIN * RATE * torch.rand(2, len(rows), generator=draw)).long()
            level = NOISIEST + (QUIETEST - NOISIEST) * torch.rand(len(rows), generator=draw)
            louder = 10 ** (torch.rand(len(rows), 1, generator=draw) - 0.5)  # by up to 10 decibels, or quieter
            part = noisy(moved(sounds.part(rows), before, behind), kind, level, draw, sounds.samples)
            found.append(hear(part._replace(samples=louder * part.samples)))
    every = Recordings(*(torch.cat(x) for x in zip(*found)))
    order = every.digits.argsort(stable=True)
    return Recordings(*(x[order] for x in every))


# Batches.


class Batch(NamedTuple):
    """What a training step sees and hears: image i and recording i are of the same digit.

    Attributes:
        pixels: [N, 8, 8].
        recordings: N of them.
        digits: int64 [N].
        wrong: int64 [N], for each recording an image of another digit.
    """

    pixels: Tensor
    recordings: Recordings
    digits: Tensor
    wrong: Tensor


def batches(
    pixels: Tensor, digits: Tensor, recordings: Recordings, *, steps: int, size: int, draw: torch.Generator
) -> Iterator[Batch]:
    """Yields batches: every image once an epoch, in a new order, each with a random recording of its digit."""
    each = len(recordings.digits) // 10
    order: list[Tensor] = []
    for _ in range(steps):
        if not order:
            rows = torch.randperm(len(pixels), generator=draw)
            order = list(rows[: len(rows) // size * size].split(size))
        rows = order.pop()
        shown = digits[rows]
        heard = each * shown + torch.randint(each, shown.shape, generator=draw)
        other = torch.rand(size, size, generator=draw).masked_fill(shown[:, None] == shown, -1.0)
        yield Batch(augment(pixels[rows], draw), recordings.part(heard), shown, other.argmax(1))
