"""`info_nce` over 4 ranks of this machine: beside one process with all pairs, and beside open_clip's gather."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import ring_peers
from ring_peers import GATHER, GATHER_LOCAL, ONE

from mmkernels.bench.rounds import Peaks
from mmkernels.machine import memory_rate
from mmkernels.meters import memory_why_not
from mmkernels.options import DTYPES
from mmkernels.planning.processes import on_ranks
from mmkernels.planning.ring import Step, memory_parts
from mmkernels.runtime import host
from mmkernels.targets import OURS, ExtraMemory, Measured, MemoryRatio, Speedup, Target

RANKS, DIM = 4, 512
PAIRS, MANY = 2048, 16_384  # of a rank
CPU, TIME, MEMORY = "CPU time", "time", "memory"
_ROUNDS = 5
_TIMEOUT = 1200.0  # seconds that a rank may wait


@dataclass(frozen=True, repr=False)
class Row:
    """A row of the benchmark.

    Args:
        what: `CPU` compares the CPU time of all ranks with that of one process, `TIME` the time of a step with that of
            open_clip's gather, `MEMORY` judges the peak alone.
    """

    what: str
    dtype: str
    quick: bool

    @property
    def pairs(self) -> int:
        return MANY if self.what == MEMORY else PAIRS

    @property
    def name(self) -> str:
        return f"{self.what}, {RANKS} ranks of {self.pairs:,} pairs, d {DIM}"

    def __str__(self) -> str:
        return f"{self.name}, {self.dtype}, forward + backward"

    __repr__ = __str__


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.getoption
    on_cpu = option("device") == "cpu" and not option("compile_only")
    dtypes = option("dtypes").split(",") if on_cpu else []
    whats = (CPU, TIME) if option("quick") else (CPU, TIME, MEMORY)
    metafunc.parametrize("row", [Row(what, dtype, option("quick")) for dtype in dtypes for what in whats], ids=str)


def test_ring(benchmark: Any, row: Row) -> None:
    """Checks every rank's loss and gradients, then measures."""
    rounds = 1 if row.what == MEMORY else 3 if row.quick else _ROUNDS
    found = benchmark.pedantic(_measured, args=(row.pairs, row.dtype, rounds), rounds=1, iterations=1)
    for rank, of_rank in enumerate(found):
        assert of_rank["wrong"] is None, f"info_nce is wrong at {row} on rank {rank}, {of_rank['wrong']}"
    if row.what == CPU:
        seconds = {OURS: _over_ranks(found, "cpu", OURS, sum), ONE: statistics.median(found[0]["cpu"][ONE])}
        memory: dict[str, float | None] = dict.fromkeys(seconds)
    else:
        seconds = {name: _over_ranks(found, "seconds", name, max) for name in found[0]["seconds"]}
        memory = {name: _largest([of_rank["memory"][name] for of_rank in found]) for name in seconds}
    step = Step(row.pairs * RANKS, DIM, RANKS, row.dtype)
    peaks = Peaks(DTYPES[row.dtype], "cpu")
    peaks.measure_if_due()
    work = step.flops * RANKS
    moved = memory_parts(step)["features"] * RANKS
    measured = Measured(work, moved, seconds, memory, peaks.flops, memory_rate("cpu"))
    benchmark.group = f"ring, {row.dtype}, forward + backward"
    benchmark.extra_info |= _description(row, measured)
    benchmark.extra_info["targets"] = [target.judge(measured) for target in _targets(row)]


@cache
def _measured(pairs: int, dtype: str, rounds: int) -> list[dict[str, Any]]:
    if pairs == MANY:
        return on_ranks(RANKS, ring_peers.measure_alone, pairs, DIM, dtype, timeout=_TIMEOUT)
    cores = host.physical_cores()
    return on_ranks(RANKS, ring_peers.measure_beside, pairs, DIM, dtype, rounds, cores, timeout=_TIMEOUT)


def _over_ranks(found: list[dict[str, Any]], kind: str, name: str, join: Any) -> float:
    """Returns the median over rounds of all ranks' figures of a round, joined."""
    return statistics.median(join(values) for values in zip(*(of_rank[kind][name] for of_rank in found), strict=True))


def _largest(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return max(known) if len(known) == len(values) else None


def _targets(row: Row) -> list[Target]:
    """At most 1.25 times the CPU time of one process; a tenth of the gather's memory, in less time; two blocks."""
    if row.what == CPU:
        return [Speedup(row.dtype, True, 1 / 1.25, ONE)]
    if row.what == TIME:
        return [
            *(Speedup(row.dtype, True, 1.0, peer) for peer in (GATHER, GATHER_LOCAL)),
            MemoryRatio(row.dtype, True, 10.0, GATHER),
        ]
    block = row.pairs * DIM * DTYPES[row.dtype].itemsize
    return [ExtraMemory(row.dtype, True, 2 * block / 1e6 + 60)]


def _description(row: Row, measured: Measured) -> dict[str, Any]:
    """Returns the JSON of a row; the names contain the units."""
    seconds = measured.seconds[OURS]
    return {
        "op": "ring",
        "configuration": row.name,
        "dtype": row.dtype,
        "pass": "forward + backward",
        "device": "cpu",
        "seconds": seconds,
        "peers": {
            name: {
                "seconds": measured.seconds[name],
                "ratio": measured.ratio(name),
                "peak_memory_bytes": measured.memory[name],
            }
            for name in measured.seconds
            if name != OURS
        },
        "peak_memory_bytes": measured.memory[OURS],
        "memory_why_not": memory_why_not("cpu"),
        "flops": measured.flops,
        "flops_per_second": measured.rate,
        "share_of_compute_peak": measured.share_of_peak,
        "share_of_bandwidth_peak": measured.share_of_bandwidth,
    }
