"""The options of `mmkernels profile` for models that hear."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from mmkernels.options import BadInput
from mmkernels.profiling.options import Excerpt, Settings

HEARING = ("whisper", "qwen2_audio")
"""The models that hear."""

SECONDS, POOL = (5.0, 10.0, 30.0), (1, 2, 4)
"""What is profiled where nothing else is asked for: of a shorter sound, what there is."""

MOST_SECONDS = 30.0
"""What the models hear at once."""

STEPS_PER_SECOND = 10
"""Parts of a sound are in whole steps."""

_TEXT_LENGTH = {"whisper": 4, "qwen2_audio": 64}  # Whisper's: start, language, task, no times
_MOST_ROWS, _MOST_POOL = 12, 64


@dataclass(frozen=True)
class SoundOptions(Settings):
    """Settings of a profile of a model that hears.

    Args:
        audio: a sound file; None: speech, or a chirp, that is made.
        seconds: how much of the sound the model hears, from its beginning: rows of the profile, sorted, without
            repeats. None: those of `SECONDS` that the sound has; see `fitted`.
        pool: how many of the encoder's features become one token, rows for each of `seconds`; 1 comes first, given or
            not. None: `POOL`.
        text_length: tokens of the prompt; None: 4 of whisper, 64 of qwen2_audio.

    The others are as of `Settings`; `backends` are "fused" and "reference" unless given.

    Raises:
        BadInput: as of `Settings`.

    Example:
        >>> SoundOptions("whisper", seconds=(5.0,), pool=(2,)).rows
        (Excerpt(seconds=5.0, pool=1), Excerpt(seconds=5.0, pool=2))
    """

    audio: Path | None = None
    seconds: tuple[float, ...] | None = None
    pool: tuple[int, ...] | None = None
    text_length: int | None = None

    def __post_init__(self) -> None:
        if self.model not in HEARING:
            raise BadInput(f"model must be one of {', '.join(HEARING)}; got {self.model!r}")
        self._fill_with(
            pool=POOL,
            text_length=_TEXT_LENGTH[self.model],
            backends=("fused", "reference"),
            size=None if self.folder else "small",
        )
        assert self.pool is not None and self.text_length is not None
        if self.seconds is not None:
            self._set("seconds", _checked_seconds(self.seconds))
        self._set("pool", _checked_pool(self.pool))
        if self.text_length < 1:
            raise BadInput(f"--text-length must be at least 1, got {self.text_length}")
        self._check_run()

    @property
    def rows(self) -> tuple[Excerpt, ...]:
        """What the rows of the profile are about."""
        return tuple(Excerpt(seconds, pool) for seconds in self.seconds or () for pool in self.pool or ())

    def fitted(self, name: str, seconds: float) -> tuple[float, ...]:
        """Returns how much of a sound is heard, by row.

        Args:
            name: of the sound, for errors.
            seconds: that it has.

        Raises:
            BadInput: it has less than what was asked for.
        """
        whole = math.floor(seconds * STEPS_PER_SECOND + 1e-6) / STEPS_PER_SECOND
        if whole == 0:
            raise BadInput(f"--audio must last at least {1 / STEPS_PER_SECOND:g} s, got {seconds:.3g} s of {name}")
        if self.seconds is not None:
            if self.seconds[-1] > whole:
                raise BadInput(f"--seconds must be at most the {whole:g} s of {name}, got {_join(self.seconds)}")
            return self.seconds
        return tuple(part for part in SECONDS if part <= whole) or (whole,)


def _checked_seconds(seconds: tuple[float, ...]) -> tuple[float, ...]:
    """Returns the times without repeats, the shortest first."""
    steps = [part * STEPS_PER_SECOND for part in seconds]
    fine = all(1 - 1e-6 <= step <= MOST_SECONDS * STEPS_PER_SECOND for step in steps)  # False for NaN
    if not (1 <= len(steps) <= _MOST_ROWS and fine and all(abs(step - round(step)) < 1e-6 for step in steps)):
        tenth = 1 / STEPS_PER_SECOND
        must = f"1 to {_MOST_ROWS} times from {tenth:g} to {MOST_SECONDS:g} s in steps of {tenth:g}, such as 5,10,30"
        raise BadInput(f"--seconds must be {must}; got {_join(seconds)}")
    return tuple(sorted({round(step) / STEPS_PER_SECOND for step in steps}))


def _checked_pool(pool: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the numbers without repeats, 1 and then the smallest first."""
    if not (1 <= len(pool) <= _MOST_ROWS and min(pool) >= 1 and max(pool) <= _MOST_POOL):
        must = f"1 to {_MOST_ROWS} integers from 1 to {_MOST_POOL}, such as 1,2,4"
        raise BadInput(f"--pool must be {must}; got {_join(pool)}")
    return tuple(sorted({1, *pool}))


def _join(parts: tuple[float, ...]) -> str:
    return ",".join(f"{part:g}" for part in parts) or "nothing"
