"""Runs the ring on ranks of this machine, and holds what the model predicts against what is measured."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from mmkernels.meters import peak_memory
from mmkernels.ops.contrastive.info_nce import info_nce
from mmkernels.options import DTYPES
from mmkernels.planning.measure import Samples, curves, sample
from mmkernels.planning.model import MeasuredRates, predict
from mmkernels.planning.processes import on_ranks
from mmkernels.planning.ring import Step
from mmkernels.runtime import host

__all__ = ["Checked", "check", "full_check", "quick_check", "step_on"]

_ROUNDS = 5
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


def full_check(dim: int, dtype: str, limit: float) -> tuple[list[Checked], list[Step]]:
    """Returns 2, 4 and 8 ranks at 1k to 64k pairs, and the steps that `limit` seconds leave no time for."""
    steps = [Step(2**power, dim, ranks, dtype) for power in range(10, 17, 2) for ranks in (2, 4, 8)]
    return check(steps, limit)


def quick_check(dim: int, dtype: str) -> list[Checked]:
    """Returns one small step over 2 ranks: a few seconds."""
    return check([Step(4096, dim, 2, dtype)], 20.0)[0]


def check(steps: Sequence[Step], limit: float) -> tuple[list[Checked], list[Step]]:
    """Predicts and measures steps, all of one dim and dtype.

    What the model stands on is measured between the steps, in the same noise, by as many ranks as there are cores.

    Args:
        steps: in the order of their time.
        limit: seconds after which no more begins.

    Returns:
        The steps that were run, and those that were left out.
    """
    cores = host.physical_cores()
    found = on_ranks(max(step.ranks for step in steps), _measure, list(steps), min(cores, 2), limit, timeout=_TIMEOUT)
    samples = [one for rank in found for one in rank[0]]
    checked, left_out = [], []
    for index, step in enumerate(steps):
        times = [max(at) for at in zip(*(rank[1][index] for rank in found[: step.ranks]))]
        if not times:
            left_out.append(step)
            continue
        prediction = predict(step, rates_of(samples, step, cores))
        peaks = [rank[2][index] for rank in found[: step.ranks]]
        predicted = prediction.memory_bytes - prediction.memory["features"]
        memory = None if None in peaks else (float(predicted), float(statistics.median(peaks)))
        checked.append(Checked(step, (prediction.seconds, statistics.median(times)), memory))
    return checked, left_out


def rates_of(samples: Sequence[Samples], step: Step, cores: int) -> MeasuredRates:
    """Returns the rates of ranks that share this machine's cores."""
    return curves(samples, max(1.0, step.ranks / cores), step.ranks, None)


def _measure(
    steps: list[Step], anchors: int, limit: float
) -> tuple[list[Samples], list[list[float]], list[float | None]]:
    """Returns, of one rank: samples of what the model stands on, the times of each step, the peak memory of each."""
    begin = time.monotonic()
    rank = dist.get_rank()
    counts = {anchors, *(step.ranks for step in steps)}
    groups = {count: dist.new_group(list(range(count))) for count in sorted(counts)}
    samples: list[Samples] = []
    times: list[list[float]] = [[] for _ in steps]
    peaks: list[float | None] = [None for _ in steps]
    for round_ in range(_ROUNDS):
        if rank < anchors:
            samples.append(sample(steps[0].dim, steps[0].dtype, "cpu", groups[anchors]))
        dist.barrier()
        for index, step in enumerate(steps):
            if not _agreed(_fits(times, index, steps, limit - (time.monotonic() - begin))):
                continue
            if rank < step.ranks:
                run = step_on(step, groups[step.ranks])
                if round_ == 0:
                    run()
                    peaks[index] = peak_memory(run)
                dist.barrier(groups[step.ranks])
                start = time.perf_counter()
                run()
                times[index].append(time.perf_counter() - start)
            dist.barrier()
    return samples, times, peaks


def _fits(times: list[list[float]], index: int, steps: list[Step], left: float) -> bool:
    """Returns whether a step ends within the seconds that are left, by its last time or that of a smaller batch."""
    if times[index]:
        return times[index][-1] < left
    smaller = [(steps[i].batch, found[-1]) for i, found in enumerate(times[:index]) if found]
    if not smaller:
        return left > 0
    batch, seconds = max(smaller)
    return 3 * seconds * (steps[index].batch / batch) ** 2 < left  # a first run, one for memory, and the timed one


def _agreed(mine: bool) -> bool:
    """Returns rank 0's answer."""
    answer = torch.tensor([mine])
    dist.broadcast(answer, 0)
    return bool(answer)


def step_on(step: Step, group: dist.ProcessGroup) -> Callable[[], Any]:
    """Returns a call of the loss and its gradients on this rank's pairs."""
    rank = dist.get_rank(group)
    begin = min(rank * step.rows, step.batch)
    rows = min(step.rows, step.batch - begin)
    generator = torch.Generator().manual_seed(rank)
    image, text = (
        F.normalize(torch.randn(rows, step.dim, generator=generator), dim=1).to(DTYPES[step.dtype]).requires_grad_()
        for _ in range(2)
    )
    scale = torch.tensor(50.0, requires_grad=True)

    def run() -> None:
        loss = info_nce(image, text, scale, group=group)
        torch.autograd.grad(loss, (image, text, scale))

    return run
