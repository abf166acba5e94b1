"""What the profiler needs of a model that hears, and what such models share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from mmkernels.models.blocks.audio import HOP, SAMPLING_RATE, log_mel
from mmkernels.models.blocks.model import Model
from mmkernels.options import BadInput
from mmkernels.profiling.adapter import ReducingAdapter, Stage
from mmkernels.profiling.sound import Sound
from mmkernels.profiling.sound_options import SoundOptions
from mmkernels.profiling.vision_language import Size, read_config
from mmkernels.transformers_version import import_transformers

FRAMES_PER_SECOND = SAMPLING_RATE // HOP
"""Of a spectrogram."""


class SoundAdapter(ReducingAdapter[SoundOptions], Protocol):
    """A model that hears; `sources` of `inputs` is one `mmkernels.profiling.sound.Sound`.

    Attributes:
        about_tokens: what a token of sound is, for people.
        padded_elsewhere: whether transformers fills up every sound to 30 seconds.
    """

    @property
    def about_tokens(self) -> str: ...
    @property
    def padded_elsewhere(self) -> bool: ...


class HearingAdapter:
    """What adapters of models share that read log-mel features and are padded by transformers.

    Attributes:
        model_class: the model's class.
        named: by the names that ``--size`` takes.
    """

    model_class: type[Model]
    named: Mapping[str, Size]

    total = "first token"
    square = False
    padded_elsewhere = True

    @property
    def sizes(self) -> tuple[str, ...]:
        return tuple(self.named)

    @property
    def about(self) -> dict[str, str]:
        return {name: size.about for name, size in self.named.items()}

    def config(self, options: SoundOptions) -> Any:
        """Returns the model's configuration, before any weight is made or read."""
        if options.folder is not None:
            return read_config(self.model_class, options)
        size = self.named[options.size or ""]
        return replace(self.model_class.sizes[size.name], **size.changes)

    def make(self, options: SoundOptions) -> Any:
        """Returns the model."""
        if options.folder is not None:
            return self.model_class.from_pretrained(options.folder)
        size = self.named[options.size or ""]
        return self.model_class.from_size(size.name, seed=options.seed, **size.changes)


@dataclass(frozen=True, kw_only=True)
class Heard:
    """What the stages take of a sound.

    Args:
        samples: float32 ``[n]``, on the CPU.
        seconds: how long it is.
        extractor: transformers' feature extractor.
        features: log-mel ``[1, bands, frames]``, on the model's device and in its dtype.
    """

    samples: Tensor
    seconds: float
    extractor: Any
    features: Tensor

    def mel(self) -> Tensor:
        """Computes the features."""
        found = log_mel(self.samples, SAMPLING_RATE, seconds=self.seconds, extractor=self.extractor).features
        return found.to(self.features)


def _mel(model: Any, inputs: Any, state: None) -> Tensor:
    heard: Heard = inputs.heard
    return heard.mel()


MEL = Stage("mel", "the log-mel spectrogram, by transformers' feature extractor, on the CPU", _mel, shared=True)


def hear(sound: Sound, seconds: float, extractor: Any, like: Tensor) -> Heard:
    """Returns the first seconds of a sound.

    Args:
        like: a weight of the model, whose device and dtype the features have.
    """
    heard = Heard(samples=sound.first(seconds), seconds=seconds, extractor=extractor, features=like.new_empty(0))
    return Heard(**vars(heard) | {"features": heard.mel()})


def feature_extractor(folder: Path | None, bands: int) -> Any:
    """Returns transformers' feature extractor: the checkpoint's, if it has one, else Whisper's with so many bands."""
    made = import_transformers("computing features").WhisperFeatureExtractor
    if folder is not None and (folder / "preprocessor_config.json").exists():
        return made.from_pretrained(str(folder))
    return made(feature_size=bands)


def check_room(text: int, sound: int, decoded: int, most: int) -> None:
    """Raises `BadInput` unless a text, tokens of sound in it and what is decoded behind it are at most `most`."""
    length = text + sound + decoded
    if length > most:
        raise BadInput(
            f"--text-length must leave the prompt and {decoded} tokens more within {most}, got {length} by {text}"
            + f" and {sound} tokens of sound" * bool(sound)
        )


def check_seconds(options: SoundOptions, positions: int) -> None:
    """Raises `BadInput` unless the encoder hears all of the sound at once; `positions`: the most features of one."""
    assert options.seconds
    most = 2 * positions / FRAMES_PER_SECOND
    if options.seconds[-1] > most:
        raise BadInput(f"--seconds must be at most {most:g}, what the model hears at once; got {options.seconds[-1]:g}")


def random_ids(below: int, length: int, seed: int) -> Tensor:
    """Returns random tokens, int64 ``[1, length]``."""
    return torch.randint(below, (1, length), generator=torch.Generator().manual_seed(seed))
