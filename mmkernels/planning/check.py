"""Runs the ring on ranks of this machine, and holds what the model predicts against what is measured."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from mmkernels.meters import Timing, peak_memory
from mmkernels.planning.measure import Samples, curves, memory_for, pairs, sample_blocks, sample_ring, step_on
from mmkernels.planning.model import predict
from mmkernels.planning.processes import on_ranks
from mmkernels.planning.ring import Step
from mmkernels.runtime import host

__all__ = ["Check", "Checked", "check", "full_check", "quick_check"]

_ROUNDS = 5
_NOT, _ONCE, _OFTEN = range(3)
_LONG = 5.0  # seconds of a step whose first run counts, and which is run in the first round alone
_TIMEOUT = 1800.0  # seconds that a rank may wait for the others, who measure


@dataclass(frozen=True)
class Checked:
    """One step, predicted and measured.

    Args:
        step: which one.
        seconds: predicted, measured.
        memory_bytes: the same, of a rank above its features; None: it can't be measured here.
    """

    step: Step
    seconds: tuple[float, float]
    memory_bytes: tuple[float, float] | None

    @property
    def time_error(self) -> float:
        """The share by which the prediction is above or below what was measured."""
        return self.seconds[0] / self.seconds[1] - 1.0

    @property
    def memory_error(self) -> float | None:
        return None if self.memory_bytes is None else self.memory_bytes[0] / self.memory_bytes[1] - 1.0


class Check(NamedTuple):
    """What a check found.

    Args:
        checked: the steps that were run.
        left_out: those that there was no time for.
        spread: by how much repeated times of the same block differ, see `Timing.spread`; the median over blocks.
    """

    checked: list[Checked]
    left_out: list[Step]
    spread: float


def full_check(dim: int, dtype: str, limit: float) -> Check:
    """Returns 2, 4 and 8 ranks at 1k to 64k pairs, and the steps that `limit` seconds leave no time for."""
    steps = [Step(2**power, dim, ranks, dtype) for power in range(10, 17, 2) for ranks in (2, 4, 8)]
    return check(steps, limit)


def quick_check(dim: int, dtype: str) -> Check:
    """Returns one small step over 2 ranks: a few seconds."""
    return check([Step(4096, dim, 2, dtype)], 20.0)


def check(steps: Sequence[Step], limit: float) -> Check:
    """Predicts and measures steps, all of one dim and dtype.

    What the model stands on is measured between the steps, in the same noise, by two ranks.

    Args:
        steps: in the order of their time.
        limit: seconds after which no more begins.
    """
    cores, most = host.physical_cores(), max(step.ranks for step in steps)
    found = on_ranks(most, _measure, list(steps), limit, timeout=_TIMEOUT)
    samples = [one for rank in found for one in rank[0]]
    checked, left_out = [], []
    for index, step in enumerate(steps):
        times = [max(at) for at in zip(*(rank[1][index] for rank in found[: step.ranks]))]
        if not times:
            left_out.append(step)
            continue
        rates = curves(samples, max(1.0, step.ranks / cores), memory_for(step.ranks), None)
        prediction = predict(step, rates)
        peaks = [rank[2][index] for rank in found[: step.ranks]]
        predicted = prediction.memory_bytes - prediction.memory["features"]
        memory = None if None in peaks else (float(predicted), float(statistics.median(peaks)))
        checked.append(Checked(step, (prediction.seconds, statistics.median(times)), memory))
    blocks = {key for one in samples for key in one if key[0] in ("forward", "backward")}
    spreads = [Timing(tuple(one[key].seconds for one in samples if key in one)).spread for key in sorted(blocks)]
    return Check(checked, left_out, statistics.median(spreads))


def _measure(steps: list[Step], limit: float) -> tuple[list[Samples], list[list[float]], list[float | None]]:
    """Returns, of one rank: samples of what the model stands on, the times of each step, the peak memory of each."""
    begin = time.monotonic()
    rank, dim, dtype = dist.get_rank(), steps[0].dim, steps[0].dtype
    groups = {count: dist.new_group(list(range(count))) for count in sorted({2, *(step.ranks for step in steps)})}
    alone = [dist.new_group([member]) for member in range(2)]
    samples: list[Samples] = []
    times: list[list[float]] = [[] for _ in steps]
    peaks: list[float | None] = [None for _ in steps]
    for round_ in range(_ROUNDS):
        if rank < 2:
            samples.append(
                sample_blocks(dim, dtype, "cpu", groups[2]) | sample_ring(dim, dtype, groups[2], alone[rank])
            )
        dist.barrier()
        for index, step in enumerate(steps):
            how = _agreed(_how(times, index, steps, limit - (time.monotonic() - begin)))
            if how == _NOT or (how == _ONCE and round_ > 0):
                continue
            if rank < step.ranks:
                group, rows = groups[step.ranks], len(range(rank, step.batch, step.ranks))
                run = _Timed(step_on(*pairs(rows, dim, dtype, seed=rank), group))
                if round_ == 0:
                    if how == _OFTEN:
                        run()
                    dist.barrier(group)
                    peaks[index] = peak_memory(run)
                if how == _OFTEN:
                    dist.barrier(group)
                    run()
                times[index].append(run.seconds)
            dist.barrier()
    return samples, times, peaks


class _Timed:
    """A call that notes how long it took."""

    def __init__(self, run: Callable[[], Any]) -> None:
        self._run, self.seconds = run, 0.0

    def __call__(self) -> None:
        start = time.perf_counter()
        self._run()
        self.seconds = time.perf_counter() - start


def _how(times: list[list[float]], index: int, steps: list[Step], left: float) -> int:
    """Returns how a step is measured in the seconds that are left, by its last time or that of a smaller batch."""
    found = [(steps[i].batch, taken[-1]) for i, taken in enumerate(times[: index + 1]) if taken]
    batch, seconds = max(found, default=(steps[index].batch, 0.0))
    seconds *= (steps[index].batch / batch) ** 2
    if seconds > _LONG:
        return _ONCE if seconds < left else _NOT
    return _OFTEN if 3 * seconds < left else _NOT


def _agreed(mine: int) -> int:
    """Returns rank 0's answer."""
    answer = torch.tensor([mine])
    dist.broadcast(answer, 0)
    return int(answer)
