"""The sound of a profile: a file, or one that is made."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mmkernels.models.blocks.audio import SAMPLING_RATE, AudioError, read_audio
from mmkernels.options import BadInput
from mmkernels.profiling.sound_options import MOST_SECONDS

_TEXT = (
    "The quick brown fox jumps over the lazy dog. Seven of the nine ships had left the harbour before the storm came. "
    "She counted one, two, three, four, five, and then began again. Nobody in the village had seen so much snow, and "
    "the children ran out to look at it. At a quarter past eight the train to the coast was still not there."
)
_NO_SPEECH = "a chirp, as espeakng-loader is not installed"


class Sound(NamedTuple):
    """What a model hears.

    Attributes:
        name: of the file, without its folder; or what was made.
        samples: float32 ``[n]``, `SAMPLING_RATE` a second.
        made: whether it is no file.
    """

    name: str
    samples: Tensor
    made: bool = False

    @property
    def seconds(self) -> float:
        return self.samples.shape[0] / SAMPLING_RATE

    def first(self, seconds: float) -> Tensor:
        """Returns the samples of the first seconds."""
        return self.samples[: round(seconds * SAMPLING_RATE)]


def open_sound(path: Path | None) -> Sound:
    """Returns the sound in a file; without one, half a minute of speech, or of a chirp where no speech can be made.

    Raises:
        BadInput: the file is no sound.
    """
    if path is None:
        return _speech() or Sound(_NO_SPEECH, chirp(MOST_SECONDS), made=True)
    try:
        return Sound(path.name, read_audio(path))
    except ImportError as error:
        raise BadInput(f"--audio can't be read: {error}") from None
    except (AudioError, FileNotFoundError) as error:
        raise BadInput(f"--audio {str(error).removeprefix('sound ')}") from None


def _speech() -> Sound | None:
    from mmkernels.testing.speech import speak

    try:
        spoken = speak(_TEXT, voice="en-us")
    except ImportError:
        return None
    length = round(MOST_SECONDS * SAMPLING_RATE)
    return Sound("synthesised speech", spoken.repeat(-(-length // spoken.shape[0]))[:length], made=True)


def chirp(seconds: float) -> Tensor:
    """Returns tones that rise from 200 Hz to 4 kHz in each second, float32 ``[n]``."""
    low, high = 200.0, 4000.0
    time = torch.arange(round(seconds * SAMPLING_RATE), dtype=torch.float64) / SAMPLING_RATE
    within, octaves = time % 1.0, math.log(high / low)
    phase = 2 * math.pi * low / octaves * torch.expm1(octaves * within)
    return (0.5 * phase.sin() * (math.pi * within).sin()).float()
