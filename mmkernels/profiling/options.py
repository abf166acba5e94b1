"""The options of `mmkernels profile`, checked before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mmkernels.options import DTYPES, BadInput, check_device, one_of, parse_list
from mmkernels.runtime.dispatch import BACKENDS

CHOICES = ("fused", *BACKENDS)
"""What to compare: "fused" is the automatic choice, the others force a backend; "reference" is the naive baseline."""

_NAMES = {"reference": "naive"}

TOKENS = (16, 64, 256, 1024)
"""The visual tokens per image that are profiled where nothing else is asked for."""

UNREDUCED = "none"
"""The reducer that leaves all tokens: the first row of a profile of reducers, with which the others are compared."""

Row = int | str
"""What one row of a profile is about: a number of visual tokens per image, or a reducer."""

MOST_TOKENS = 65536
"""Visual tokens per image."""

_MOST_IMAGES, _MOST_REDUCERS = 1000, 24


@dataclass(frozen=True)
class Options:
    """Settings of one profile.

    Args:
        model: a name in `mmkernels.profiling.profiler.MODELS`.
        image: the photograph.
        tokens: visual tokens per image, each a row of the profile; sorted, without repeats. None: `TOKENS`, or none
            with `reduce`.
        reduce: reducers, each a row of the profile instead of `tokens`, as `mmkernels.nn.TokenReducer.parse` reads
            them; `UNREDUCED` comes first, given or not.
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
    tokens: tuple[int, ...] | None = None
    reduce: tuple[str, ...] | None = None
    images: int = 5
    text_length: int = 512
    backends: tuple[str, ...] = ("fused", "reference")
    dtype: str = "fp32"
    device: str = "cpu"
    size: str = "small"
    train: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.reduce is None:
            object.__setattr__(self, "tokens", _checked_tokens(TOKENS if self.tokens is None else self.tokens))
        elif self.tokens is None:
            object.__setattr__(self, "reduce", _checked_reducers(self.reduce))
        else:
            raise BadInput(
                "--tokens and --reduce can't be given together: each says what the rows are; "
                f"got {_join(self.tokens)} and {_join(self.reduce)}"
            )
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
    def rows(self) -> tuple[Row, ...]:
        """What the rows of the profile are about."""
        return self.reduce or self.tokens or ()

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]


def name_of(backend: str) -> str:
    """Returns the name that people read for a backend, in tables, pictures and progress: "reference" is "naive"."""
    return _NAMES.get(backend, backend)


def title_of(row: Row) -> str:
    """Returns what people read of a row: "64 tokens per image", or the reducer."""
    return row if isinstance(row, str) else f"{row:,} tokens per image"


def baseline_of(backends: Sequence[str], *, reducing: bool) -> str:
    """Returns the backend from whose outputs drift is measured, if it is among those that run.

    With reducers there is always one: drift is also that of the reducer, from the unreduced model.
    """
    return backends[0] if reducing and "reference" not in backends else "reference"


def parse_tokens(text: str) -> tuple[int, ...]:
    """Returns the numbers of a text such as "16,64,256"."""
    try:
        return tuple(int(part) for part in parse_list(text))
    except ValueError:
        raise BadInput(f"--tokens must be integers, such as 16,64; got {text!r}") from None


def _checked_tokens(tokens: tuple[int, ...]) -> tuple[int, ...]:
    if not tokens or min(tokens) < 1 or max(tokens) > MOST_TOKENS:
        raise BadInput(f"--tokens must be integers from 1 to {MOST_TOKENS}, such as 16,64; got {_join(tokens)}")
    return tuple(sorted(set(tokens)))


def _checked_reducers(texts: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the texts without repeats, `UNREDUCED` first. Whether they name reducers is for the model to find."""
    if not 1 <= len(texts) <= _MOST_REDUCERS:
        raise BadInput(f"--reduce must be 1 to {_MOST_REDUCERS} reducers, such as pool:2,tome:0.5; got {_join(texts)}")
    return tuple(dict.fromkeys((UNREDUCED, *texts)))


def _join(parts: tuple[Row, ...]) -> str:
    return ",".join(map(str, parts)) or "nothing"
