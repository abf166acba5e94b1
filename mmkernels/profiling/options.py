"""The options of `mmkernels profile`, checked before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple, TypeVar

import torch

from mmkernels.options import DTYPES, BadInput, check_device, one_of, parse_list
from mmkernels.runtime.dispatch import BACKENDS

CHOICES = ("fused", *BACKENDS)
"""What to compare: "fused" is the automatic choice, the others force a backend; "reference" is the naive baseline."""

ORIGINAL, PATCHED = "original", "patched"
"""What is compared of a model of transformers: as it is, and after `mmkernels.patch`."""

_NAMES = {"reference": "naive", ORIGINAL: "before patch", PATCHED: "after patch"}

TOKENS, TOKENS_OF_BLIP2 = (16, 64, 256, 1024), (8, 32, 128)
"""The visual tokens per image that are profiled where nothing else is asked for."""

UNREDUCED = "none"
"""The reducer that leaves all tokens: the first row of a profile of reducers, with which the others are compared."""

FIXED_SIZE = ("deepseek_vl", "deepseek_vl_hybrid", "janus")
"""The `VISION_LANGUAGE` models whose images all have one size: nothing is left to ``--resolutions``."""

UNREDUCIBLE = ("deepseek_vl2",)
"""The `VISION_LANGUAGE` models that take no reducer: nothing is left to ``--reduce``."""

VISION_LANGUAGE = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", *FIXED_SIZE, *UNREDUCIBLE)
"""The models in which images are tokens of the text: how many follows from an image's size, and from a reducer."""

QUERIES = ("blip2",)
"""The models whose images have as many tokens as there are queries: nothing is left to a reducer or an image's size."""

RESOLUTIONS, REDUCERS = (224, 448, 896), (UNREDUCED, "pool:2", "tome:0.5", "select:0.25")
"""What is profiled of the `VISION_LANGUAGE` models where nothing else is asked for."""


class Choice(NamedTuple):
    """What one row of a profile of reducers is about.

    Attributes:
        reducer: as `mmkernels.nn.TokenReducer.parse` reads it.
        resolution: each image has about as many pixels as a square of this side; None: those of the model.
    """

    reducer: str
    resolution: int | None = None

    def __str__(self) -> str:
        return self.reducer if self.resolution is None else f"{self.resolution} {self.reducer}"

    @property
    def source(self) -> object:
        """What a model's inputs depend on: rows with the same source share them."""
        return self.resolution


class Excerpt(NamedTuple):
    """What one row of a profile of sound is about.

    Attributes:
        seconds: the model hears the first ones of the sound.
        pool: so many of the encoder's features, one behind the other, become one token: their mean.
    """

    seconds: float
    pool: int

    def __str__(self) -> str:
        return f"{self.seconds:g} s, pool {self.pool}"

    @property
    def source(self) -> object:
        """What a model's inputs depend on: rows with the same source share them."""
        return self.seconds


class Side(NamedTuple):
    """What one row of a profile of a transformers model is about.

    Attributes:
        resolution: the photograph has about as many pixels as a square of this side.
    """

    resolution: int

    def __str__(self) -> str:
        return f"{self.resolution:,} px"


Row = int | Choice | Excerpt
"""What one row of a profile is about: a number of visual tokens per image, a reducer, or a part of a sound."""

MOST_TOKENS = 65536
"""Visual tokens per image."""

_MOST_IMAGES, _MOST_REDUCERS, _MOST_RESOLUTIONS, _MOST_PIXELS = 1000, 24, 8, 8192
_IMAGES, _TEXT_LENGTH, _BACKENDS, _SIZE = 5, 512, ("fused", "reference"), "small"
_ONE_IMAGE, _QUESTION = 1, 64  # of the models in which an image's tokens stand in the text


@dataclass(frozen=True)
class Settings:
    """What every profile is told, whatever its rows are about.

    Args:
        model: a name that the profiler knows.
        backends: names in `CHOICES`.
        dtype: a name in `DTYPES`.
        device: as torch names it.
        size: of the model, a name that it offers; None: "small", or that of `folder`.
        folder: a checkpoint with weights; None: they are random.
        train: also measure a training step.
        seed: of weights and text.

    Raises:
        BadInput: a name is unknown, a number is out of range, two settings exclude each other, or the device is
            missing.
    """

    model: str
    _: KW_ONLY
    backends: tuple[str, ...] | None = None
    dtype: str = "fp32"
    device: str = "cpu"
    size: str | None = None
    folder: Path | None = None
    train: bool = False
    seed: int = 0

    choices: ClassVar[tuple[str, ...]] = CHOICES

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _fill_with(self, **values: object) -> None:
        """Gives settings that were left out these values."""
        for name, value in values.items():
            if getattr(self, name) is None:
                self._set(name, value)

    def _check_run(self) -> None:
        """Checks how the model runs."""
        if self.folder is not None and self.size is not None:
            raise BadInput(f"--size must not be given with --model, whose checkpoint has a size; got {self.size!r}")
        assert self.backends is not None
        self._set("backends", tuple(dict.fromkeys(self.backends)))
        for backend in self.backends or ("",):
            one_of("--backend", backend, self.choices)
        one_of("--dtype", self.dtype, tuple(DTYPES))
        check_device(self.device)

    @property
    def rows(self) -> tuple[Row | Side, ...]:
        """What the rows of the profile are about."""
        raise NotImplementedError

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]


@dataclass(frozen=True)
class Options(Settings):
    """Settings of one profile.

    Args:
        model: a name in `mmkernels.profiling.profiler.MODELS`.
        image: the photograph.
        tokens: visual tokens per image, each a row of the profile; sorted, without repeats. None: `TOKENS`, or none
            with `reduce` or `resolutions`, and of `VISION_LANGUAGE` models; `TOKENS_OF_BLIP2` of `QUERIES`.
        reduce: reducers, each a row of the profile instead of `tokens`, as `mmkernels.nn.TokenReducer.parse` reads
            them; `UNREDUCED` comes first, given or not. None: `REDUCERS` of `VISION_LANGUAGE` models but those that
            are `UNREDUCIBLE`.
        resolutions: sides of squares in pixels, each a row with each of the reducers; the largest comes first. None:
            `RESOLUTIONS` of `VISION_LANGUAGE` models but those of `FIXED_SIZE`, else the model's own.
        images: pictures in the prompt, parts of the photograph; None: 1 of `VISION_LANGUAGE` models and `QUERIES`, else
            5.
        text_length: tokens of text, of other models with a marker for each image; None: 64 of `VISION_LANGUAGE` models
            and `QUERIES`, else 512.
        backends: as of `Settings`; None: "fused", and "reference" unless it is a `VISION_LANGUAGE` model, whose naive
            attention to large images takes more memory than many machines have.
        prompt: what is asked about the images, where `folder` has a tokenizer; None: random tokens.

    The others are as of `Settings`.
    """

    image: Path
    tokens: tuple[int, ...] | None = None
    reduce: tuple[str, ...] | None = None
    resolutions: tuple[int, ...] | None = None
    images: int | None = None
    text_length: int | None = None
    prompt: str | None = None

    def __post_init__(self) -> None:
        self._fill()
        self._check_rows()
        assert self.images is not None and self.text_length is not None and self.backends is not None
        if not 1 <= self.images <= _MOST_IMAGES:
            raise BadInput(f"--images must be from 1 to {_MOST_IMAGES}, got {self.images}")
        if self.text_length <= self.images:
            raise BadInput(
                f"--text-length must be above the number of images, {self.images}, each of which has a marker in the "
                f"text; got {self.text_length}"
            )
        self._check_run()

    def _fill(self) -> None:
        """Gives settings that were left out the values that suit the model."""
        whole, fixed = self.model in VISION_LANGUAGE, self.model in FIXED_SIZE
        in_text = whole or self.model in QUERIES
        self._fill_with(
            images=_ONE_IMAGE if in_text else _IMAGES,
            text_length=_QUESTION if in_text else _TEXT_LENGTH,
            backends=_BACKENDS[:1] if whole else _BACKENDS,
            size=None if self.folder else _SIZE,
            resolutions=RESOLUTIONS if whole and not fixed else None,
            reduce=(UNREDUCED,) if self.model in UNREDUCIBLE else REDUCERS if whole else None,
        )
        if self.resolutions is not None and self.reduce is None:
            self._set("reduce", (UNREDUCED,))

    def _check_rows(self) -> None:
        if self.tokens is not None and self.model in VISION_LANGUAGE:
            raise BadInput(
                f"--tokens must not be given for {self.model}, whose images have as many tokens as their size and "
                f"--reduce leave them, such as --reduce pool:<=64; got {_join(self.tokens)}"
            )
        if self.resolutions is not None and self.model in FIXED_SIZE:
            raise BadInput(
                f"--resolutions must not be given for {self.model}, whose images all have one size; "
                f"got {_join(self.resolutions)}"
            )
        if self.reduce is not None and set(self.reduce) - {UNREDUCED} and self.model in UNREDUCIBLE:
            raise BadInput(
                f"--reduce must not be given for {self.model}, in which each row of an image's tokens has an end: "
                f"--resolutions says how many there are; got {_join(self.reduce)}"
            )
        if self.reduce is not None and self.model in QUERIES:
            by, rows = ("--resolutions", self.resolutions) if self.reduce == (UNREDUCED,) else ("--reduce", self.reduce)
            raise BadInput(
                f"{by} must not be given for {self.model}, whose visual tokens are its queries: --tokens says how "
                f"many; got {_join(rows or ())}"
            )
        if self.reduce is None:
            usual = TOKENS_OF_BLIP2 if self.model in QUERIES else TOKENS
            self._set("tokens", _checked_tokens(usual if self.tokens is None else self.tokens))
        elif self.tokens is None:
            self._set("reduce", _checked_reducers(self.reduce))
        else:
            by, rows = ("--resolutions", self.resolutions) if self.reduce == (UNREDUCED,) else ("--reduce", self.reduce)
            raise BadInput(
                f"--tokens and {by} can't be given together: each says what the rows are; "
                f"got {_join(self.tokens)} and {_join(rows or ())}"
            )
        if self.resolutions is not None:
            self._set("resolutions", checked_resolutions(self.resolutions))
        if self.folder is not None and self.model not in VISION_LANGUAGE:
            must = f"must be for one of {', '.join(VISION_LANGUAGE)}, whose numbers of tokens need no other weights"
            raise BadInput(f"--model {must}; got {self.model}")
        if self.prompt is not None and self.folder is None:
            raise BadInput("--prompt must be given with --model, whose tokenizer reads it; got it alone")

    @property
    def rows(self) -> tuple[Row, ...]:
        """What the rows of the profile are about."""
        if self.reduce is None:
            return self.tokens or ()
        return tuple(Choice(reducer, side) for side in self.resolutions or (None,) for reducer in self.reduce)


def name_of(backend: str) -> str:
    """Returns the name that people read for a backend, in tables, pictures and progress: "reference" is "naive"."""
    return _NAMES.get(backend, backend)


def title_of(row: Row) -> str:
    """Returns what people read of a row: "64 tokens per image", the reducer with its resolution, or "5 s, pool 2"."""
    return f"{row:,} tokens per image" if isinstance(row, int) else str(row)


def baseline_of(backends: Sequence[str], *, reducing: bool) -> str:
    """Returns the backend from whose outputs drift is measured, if it is among those that run.

    With reducers there is always one: drift is also that of the reducer, from the unreduced model.
    """
    if ORIGINAL in backends:
        return ORIGINAL
    return backends[0] if reducing and "reference" not in backends else "reference"


Number = TypeVar("Number", int, float)


def parse_numbers(option: str, text: str, kind: type[Number], example: str) -> tuple[Number, ...]:
    """Returns the numbers of a list such as "16,64,256".

    Args:
        option: for errors.
        text: the list.
        kind: int or float.
        example: of a list, for errors.
    """
    try:
        return tuple(kind(part) for part in parse_list(text))
    except ValueError:
        must = "integers" if kind is int else "numbers"
        raise BadInput(f"{option} must be {must}, such as {example}; got {text!r}") from None


def checked_resolutions(sides: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the sides without repeats, the largest first.

    Raises:
        BadInput: there are none, too many, or too large ones.
    """
    if not 1 <= len(sides) <= _MOST_RESOLUTIONS or min(sides) < 1 or max(sides) > _MOST_PIXELS:
        must = f"1 to {_MOST_RESOLUTIONS} sides in pixels, each at most {_MOST_PIXELS}, such as 224,448"
        raise BadInput(f"--resolutions must be {must}; got {_join(sides)}")
    return tuple(sorted(set(sides), reverse=True))


def _checked_tokens(tokens: tuple[int, ...]) -> tuple[int, ...]:
    if not tokens or min(tokens) < 1 or max(tokens) > MOST_TOKENS:
        raise BadInput(f"--tokens must be integers from 1 to {MOST_TOKENS}, such as 16,64; got {_join(tokens)}")
    return tuple(sorted(set(tokens)))


def _checked_reducers(texts: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the texts without repeats, `UNREDUCED` first. Whether they name reducers is for the model to find."""
    if not 1 <= len(texts) <= _MOST_REDUCERS:
        raise BadInput(f"--reduce must be 1 to {_MOST_REDUCERS} reducers, such as pool:2,tome:0.5; got {_join(texts)}")
    return tuple(dict.fromkeys((UNREDUCED, *texts)))


def _join(parts: Sequence[int | str]) -> str:
    return ",".join(map(str, parts)) or "nothing"
