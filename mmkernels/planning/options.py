"""The options of `mmkernels plan contrastive`, checked before anything is computed or measured."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from mmkernels.options import DTYPES, BadInput, one_of, parse_list
from mmkernels.planning.devices import DEVICES
from mmkernels.planning.ring import Step
from mmkernels.planning.runlog import RunShape, read_log

__all__ = ["BATCHES", "HERE", "Options", "read_options"]

HERE = "here"
"""The device that is this machine, measured."""
BATCHES = tuple(2**power for power in range(15, 21))
"""The batches that are priced where no other is asked for: 32k to 1M."""
DIM, RANKS, DTYPE = 1024, 8, "bf16"
"""What neither an option nor a log says."""
_MOST = {"--batch": 2**36, "--dim": 2**16, "--ranks": 2**16}
_Value = TypeVar("_Value", int, str)


@dataclass(frozen=True)
class Options:
    """Settings of one plan.

    Args:
        steps: the rows of the table.
        device: `HERE` or a name in `DEVICES`.
        wire_rate: bytes a second between two ranks, in one direction; None: the data sheet's, or as measured.
        encoder_seconds: of a rank's encoders, forward and backward, for one pair; None: not known.
        run: the run whose shapes are planned.
    """

    steps: tuple[Step, ...]
    device: str
    wire_rate: float | None
    encoder_seconds: float | None
    run: RunShape | None


def read_options(
    *,
    batch: str = "",
    dim: int | None = None,
    ranks: int | None = None,
    dtype: str = "",
    device: str = HERE,
    bandwidth: float | None = None,
    encoder_ms: float | None = None,
    log: Path | None = None,
) -> Options:
    """Returns the settings that a command line asks for.

    Args:
        batch: pairs over all ranks, comma-separated; "": the log's and `BATCHES`.
        dim, ranks, dtype: None or "": the log's, or `DIM`, `RANKS`, `DTYPE` where there is no log.
        bandwidth: GB/s.
        encoder_ms: of a rank's pairs of the first batch; None: the log's time of a step.
        log: see `read_log`.

    Raises:
        BadInput: a name is unknown, a number is out of range, or the log can't be used.
    """
    one_of("--device", device, (HERE, *DEVICES))
    one_of("--dtype", dtype or DTYPE, tuple(DTYPES))
    for name, value in (("--bandwidth", bandwidth), ("--encoder-ms", encoder_ms)):
        if value is not None and not 0 < value < math.inf:
            raise BadInput(f"{name} must be a number above 0, got {value}")
    run = None if log is None else read_log(log)
    dim = _resolve("--dim", dim, DIM, log, None if run is None else run.dim)
    ranks = _resolve("--ranks", ranks, RANKS, log, None if run is None else run.ranks)
    dtype = _resolve("--dtype", dtype or None, DTYPE, log, None if run is None else run.dtype)
    batches = _batches(batch, run)
    for name, number in (("--dim", dim), ("--ranks", ranks), *(("--batch", size) for size in batches)):
        if not 1 <= number <= _MOST[name]:
            raise BadInput(f"{name} must be from 1 to {_MOST[name]}, got {number}")
    if min(batches) < ranks:
        raise BadInput(f"--batch must be at least --ranks, {ranks}, so that each has a pair; got {min(batches)}")
    gpu = device != HERE or torch.cuda.is_available()
    steps = tuple(Step(size, dim, ranks, dtype, gpu) for size in batches)
    encoder = None
    if encoder_ms is not None:
        encoder = encoder_ms / 1e3 / steps[0].rows
    elif run is not None and run.step_seconds is not None and run.batch is not None:
        encoder = run.step_seconds / Step(run.batch, dim, run.ranks or ranks, dtype).rows
    return Options(steps, device, None if bandwidth is None else bandwidth * 1e9, encoder, run)


def _resolve(name: str, given: _Value | None, default: _Value, log: Path | None, logged: _Value | None) -> _Value:
    if given is not None or log is None:
        return default if given is None else given
    if logged is None:
        raise BadInput(f"{name} must be given with --from-log {log}, which does not say it")
    return logged


def _batches(text: str, run: RunShape | None) -> tuple[int, ...]:
    own = () if run is None or run.batch is None else (run.batch,)
    if not text:
        return (*own, *(size for size in BATCHES if size > max(own, default=0)))
    try:
        given = tuple(dict.fromkeys(int(part) for part in parse_list(text)))
    except ValueError:
        given = ()
    if not given:
        raise BadInput(f"--batch must be one or more integers, such as 32768,262144; got {text!r}")
    return given
