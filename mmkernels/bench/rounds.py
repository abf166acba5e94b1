"""Times candidates in turns, and between them the rates that the machine sustains."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from mmkernels import machine
from mmkernels.bench.peers import Call
from mmkernels.meters import time_calls
from mmkernels.targets import OURS

BUDGET = 1.0  # seconds of counted rounds for one row, all candidates together
SAMPLE = 2e-3  # seconds that one sample lasts at least: shorter calls are repeated within it
_ROUNDS = (5, 200)
_PEAKS = 0.2  # the share of the time that the bursts may take


class Peaks:
    """The rates of arithmetic and memory, measured in bursts that are spread evenly over the time."""

    def __init__(self, dtype: torch.dtype, device: str) -> None:
        self._flops, self._bytes = machine.arithmetic(dtype, device), machine.memory(device)
        self._samples: list[tuple[float, float]] = []
        self._begin, self._spent = 0.0, 0.0

    def measure_if_due(self) -> None:
        """Measures, unless the bursts have had their share of the time since the first of them."""
        now = time.perf_counter()
        if not self._samples:
            self._begin = now
        elif self._spent > _PEAKS * (now - self._begin):
            return
        self._samples.append((self._flops(), self._bytes()))
        self._spent += time.perf_counter() - now

    @property
    def flops(self) -> float:
        """FLOP a second, the median."""
        return statistics.median(flops for flops, _ in self._samples)

    @property
    def bytes(self) -> float:
        """Bytes a second, the median."""
        return statistics.median(rate for _, rate in self._samples)


def alternate(
    benchmark: Any,
    candidates: Mapping[str, Call],
    peaks: Peaks,
    device: torch.device,
    rounds: int | None = None,
    before: Callable[[str], object] | None = None,
) -> dict[str, list[float]]:
    """Times every other candidate and then the op in each round.

    Args:
        benchmark: pytest-benchmark's fixture.
        candidates: `OURS` and others.
        rounds: how many, of calls so long that none is repeated or warmed up; None: as many as `BUDGET` allows.
        before: called, untimed, with a candidate's name before each call of it; needs `rounds`.

    Returns:
        Seconds of single calls, by candidate.
    """
    if before is not None and rounds is None:
        raise ValueError("rounds must be given with before, as calls are repeated else; got None")
    warm_up = int(rounds is None)
    repeats = dict.fromkeys(candidates, 1)
    if warm_up:
        repeats = {name: max(1, math.ceil(SAMPLE / time_calls(call, 1, device))) for name, call in candidates.items()}
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    prepare = before or (lambda name: None)

    def sample(name: str) -> None:
        samples[name].append(time_calls(candidates[name], repeats[name], device))

    def sample_others() -> None:
        if len(candidates) == 1:
            peaks.measure_if_due()
        for name in candidates:
            if name != OURS:
                gc.collect(0)
                peaks.measure_if_due()
                prepare(name)
                sample(name)
        prepare(OURS)

    if rounds is None:
        seconds = _seconds(sample_others) + _seconds(partial(sample, OURS))
        rounds = min(max(_ROUNDS[0], int(BUDGET / seconds)), _ROUNDS[1])
    benchmark.pedantic(partial(sample, OURS), setup=sample_others, rounds=rounds, iterations=1, warmup_rounds=warm_up)
    for seconds_of_calls in samples.values():
        del seconds_of_calls[:-rounds]  # the warm-up, and the round that decided how many there are
    if device.type != "cuda":  # so that pytest-benchmark's statistics are of the same samples
        samples[OURS] = [seconds / repeats[OURS] for seconds in benchmark.stats.stats.data]
    benchmark.extra_info |= {"calls_per_round": repeats[OURS], "rounds": rounds}
    return samples


def _seconds(run: Callable[[], None]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin
