"""The options of `mmkernels profile`, checked before anything is computed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from mmkernels.options import DTYPES, BadInput, check_device, one_of, parse_list
from mmkernels.runtime.dispatch import BACKENDS

CHOICES = ("fused", *BACKENDS)
"""What to compare: "fused" is the automatic choice, the others force a backend; "reference" is the naive baseline."""

_NAMES = {"reference": "naive"}

_MOST_IMAGES, _MOST_TOKENS = 1000, 65536


@dataclass(frozen=True)
class Options:
    """Settings of one profile.

    Args:
        model: a name in `mmkernels.profiling.profiler.MODELS`.
        image: the photograph.
        tokens: visual tokens per image, each a row of the profile; sorted, without repeats.
        images: crops of the photograph in the prompt.
        text_length: tokens of text, markers of the images included.
        backends: names in `CHOICES`.
        dtype: a name in `DTYPES`.
        device: as torch names it.
        size: of the model, a name that it offers.
        train: also measure a training step.
        seed: of weights and text.

    Raises:
        BadInput: a name is unknown, a number is out of range, or the device is missing.
    """

    model: str
    image: Path
    tokens: tuple[int, ...] = (16, 64, 256, 1024)
    images: int = 5
    text_length: int = 512
    backends: tuple[str, ...] = ("fused", "reference")
    dtype: str = "fp32"
    device: str = "cpu"
    size: str = "small"
    train: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.tokens or min(self.tokens) < 1 or max(self.tokens) > _MOST_TOKENS:
            raise BadInput(
                f"--tokens must be integers from 1 to {_MOST_TOKENS}, such as 16,64; got {_join(self.tokens)}"
            )
        object.__setattr__(self, "tokens", tuple(sorted(set(self.tokens))))
        if not 1 <= self.images <= _MOST_IMAGES:
            raise BadInput(f"--images must be from 1 to {_MOST_IMAGES}, got {self.images}")
        if self.text_length <= self.images:
            raise BadInput(
                f"--text-length must be above the number of images, {self.images}, each of which has a marker in the "
                f"text; got {self.text_length}"
            )
        object.__setattr__(self, "backends", tuple(dict.fromkeys(self.backends)))
        for backend in self.backends or ("",):
            one_of("--backend", backend, CHOICES)
        one_of("--dtype", self.dtype, tuple(DTYPES))
        check_device(self.device)

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]


def name_of(backend: str) -> str:
    """Returns the name that people read for a backend, in tables, pictures and progress: "reference" is "naive"."""
    return _NAMES.get(backend, backend)


def parse_tokens(text: str) -> tuple[int, ...]:
    """Returns the numbers of a text such as "16,64,256"."""
    try:
        return tuple(int(part) for part in parse_list(text))
    except ValueError:
        raise BadInput(f"--tokens must be integers, such as 16,64; got {text!r}") from None


def _join(numbers: tuple[int, ...]) -> str:
    return ",".join(map(str, numbers)) or "nothing"
