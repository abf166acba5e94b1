"""The benchmark harness: one row is one configuration, dtype and pass of an op, beside its peers.

A bench file has the op's peers and one test of three lines; ``benchmarks/conftest.py`` makes the rows. Peers run in
turns with the op, in one process, on the same inputs. A wrong result has no time.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mmkernels.profiling.machine import matmul_rate, memory_rate
from mmkernels.profiling.meters import memory_why_not, peak_memory
from mmkernels.profiling.options import DTYPES
from mmkernels.spec import Benchmark, Inputs, OpSpec, cast

Call = Callable[[], Any]

_BUDGET = 1.0  # seconds of counted rounds for one row, all candidates together
_ROUNDS = (5, 200)
_SAMPLE = 2e-3  # seconds that one sample lasts at least: shorter calls are repeated within it
_OFF = 0.05  # relative L2 distance from the truth at which a peer computes something else


class CantRunError(Exception):
    """A peer can't compute this row; the message says why."""


@dataclass(frozen=True)
class Peer:
    """Another way to compute what an op computes.

    Args:
        name: in tables and JSON.
        prepare: takes the op's keyword arguments, those to differentiate by with ``requires_grad``; answers the call to
            time. What a user does once for many calls, such as building a mask or compiling, is done here, untimed.
            Raises `CantRunError`.
    """

    name: str
    prepare: Callable[[Inputs], Call]


@dataclass(frozen=True, repr=False)
class Row:
    """One row of a benchmark.

    Args:
        dtype: a name in `DTYPES`.
        backward: forward + backward instead of forward.
    """

    spec: OpSpec
    config: Benchmark
    dtype: str
    backward: bool
    device: str = "cpu"

    def __str__(self) -> str:  # also what the JSON says of it
        return f"{self.config.id}, {self.dtype}, {self.passes}"

    __repr__ = __str__

    @property
    def passes(self) -> str:
        return "forward + backward" if self.backward else "forward"


def rows(spec: OpSpec, dtypes: Iterable[str], device: str = "cpu", contains: str = "") -> list[Row]:
    """All rows of an op whose name contains `contains`."""
    found = [
        Row(spec, config, dtype, backward, device)
        for dtype in dtypes
        for backward in (False, True)
        for config in spec.benchmarks
        if config.grads or not backward
    ]
    return [row for row in found if contains in str(row)]


def measure(benchmark: Any, row: Row, peers: Iterable[Peer]) -> None:
    """Check the op, then time and weigh it beside the naive baseline and `peers`, into ``benchmark.extra_info``.

    Args:
        benchmark: pytest-benchmark's fixture.

    Raises:
        AssertionError: the op's result is wrong.
    """
    spec, dtype, device = row.spec, DTYPES[row.dtype], torch.device(row.device)
    inputs = cast(row.config.make(torch.Generator().manual_seed(0)), dtype, device, spec.always_wide)
    inputs = {name: x.detach().requires_grad_() if row.backward and name in row.config.grads else x
              for name, x in inputs.items()}  # fmt: skip
    ours = _passes(row, inputs, partial(spec.function, **inputs))
    naive = _passes(row, inputs, partial(spec.function, **inputs, backend="reference"))
    wide = {name: x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x
            for name, x in cast(inputs, torch.float64, device).items()}  # fmt: skip
    truth = _flat(_passes(row, wide, partial(spec.function, **wide, backend="reference"))())
    for place, found in enumerate(zip(_flat(ours()), _flat(naive()), truth, strict=True)):
        problem = spec.over_budget(*found)
        assert problem is None, f"{spec.name} is wrong at {row}, result {place}: {problem}"

    calls: dict[str, Call] = {"naive": naive}
    why_not: dict[str, str] = {}
    for peer in peers:
        try:
            call = _passes(row, inputs, peer.prepare(inputs))
            _check_peer(_flat(call()), truth)
            calls[peer.name] = call
        except CantRunError as error:
            why_not[peer.name] = str(error)
    del truth, wide

    memory = {name: peak_memory(call, device) for name, call in {"ours": ours, **calls}.items()}
    times = _time(benchmark, ours, calls, device)
    benchmark.group = f"{spec.name}, {row.dtype}, {row.passes}"
    benchmark.extra_info.update(_description(row, inputs, times, memory, why_not))


def _passes(row: Row, inputs: Inputs, call: Call) -> Call:
    """`call`, or `call` and the gradients of what the row differentiates by."""
    leaves = [inputs[name] for name in row.config.grads] if row.backward else []
    if not leaves:
        return call
    cotangents: list[Tensor] = []

    def both() -> tuple[Tensor, ...]:
        out = call()
        outputs = out if isinstance(out, tuple) else (out,)
        if not cotangents:
            generator = torch.Generator().manual_seed(1)
            cotangents.extend(torch.randn(x.shape, generator=generator).to(x) for x in outputs)
        return (*outputs, *torch.autograd.grad(outputs, leaves, cotangents))

    return both


def _flat(out: Any) -> list[Tensor]:
    return [x.detach() for x in (out if isinstance(out, tuple) else (out,))]


def _rms(x: Tensor) -> float:
    return float(x.nan_to_num().square().mean().sqrt()) if x.numel() else 0.0


def _check_peer(found: list[Tensor], truth: list[Tensor]) -> None:
    """A peer needs no more than to compute the same thing: its own rounding is its affair."""
    for mine, true in zip(found, truth, strict=False):
        off = _rms(mine.to(true.dtype) - true) / max(_rms(true), 1e-30)
        if mine.shape != true.shape or not off < _OFF:
            raise CantRunError(f"computes something else: relative distance {off:.2g}")


def _time(benchmark: Any, ours: Call, peers: dict[str, Call], device: torch.device) -> dict[str, list[float]]:
    """Seconds of single calls, by candidate; each round times every peer, then ours."""
    candidates = {"ours": ours, **peers}
    repeats = {name: max(1, math.ceil(_SAMPLE / _seconds(call, device))) for name, call in candidates.items()}
    batches = {name: partial(_batch, call, repeats[name], device) for name, call in candidates.items()}
    round_seconds = sum(_seconds(batch, device) for batch in batches.values())
    samples: dict[str, list[float]] = {name: [] for name in candidates}

    def time_peers() -> None:
        for name in peers:
            gc.collect(0)
            begin = time.perf_counter()
            batches[name]()
            samples[name].append((time.perf_counter() - begin) / repeats[name])

    rounds = min(max(_ROUNDS[0], int(_BUDGET / round_seconds)), _ROUNDS[1])
    benchmark.pedantic(batches["ours"], setup=time_peers, rounds=rounds, iterations=1, warmup_rounds=1)
    for name in peers:
        del samples[name][0]  # the warm-up round
    samples["ours"] = [seconds / repeats["ours"] for seconds in benchmark.stats.stats.data]
    benchmark.extra_info["calls_per_round"] = repeats["ours"]
    return samples


def _batch(call: Call, repeats: int, device: torch.device) -> None:
    for _ in range(repeats):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _seconds(call: Call, device: torch.device) -> float:
    begin = time.perf_counter()
    _batch(call, 1, device)
    return time.perf_counter() - begin


def _description(
    row: Row,
    inputs: Inputs,
    times: dict[str, list[float]],
    memory: dict[str, int | None],
    why_not: dict[str, str],
) -> dict[str, Any]:
    """What the JSON says about a row; units stand in the names."""
    medians = {name: statistics.median(samples) for name, samples in times.items()}
    seconds = medians["ours"]
    cost = row.spec.cost(inputs, row.backward)
    compute, bandwidth = matmul_rate(DTYPES[row.dtype], row.device), memory_rate(row.device)
    peers: dict[str, Any] = {
        name: {"seconds": medians[name], "ratio": medians[name] / seconds, "peak_memory_bytes": memory[name]}
        for name in medians
        if name != "ours"
    }
    shares = {"peak": cost.flops / seconds / compute, "bandwidth": cost.bytes / seconds / bandwidth}
    least_seconds = max(cost.flops / compute, cost.bytes / bandwidth)
    targets = [
        {
            "than": target.than,
            "least": target.least,
            "found": shares[target.than] if target.than in shares else peers[target.than]["ratio"],
            "at_peak": 1.0 if target.than in shares else medians[target.than] / least_seconds,
        }
        for target in row.config.targets
        if (target.dtype, target.backward) == (row.dtype, row.backward)
        and row.device == "cpu"
        and (target.than in shares or target.than in medians)
    ]
    return {
        "op": row.spec.name,
        "configuration": row.config.id,
        "parameters": dict(row.config.params),
        "tags": sorted(row.config.tags),
        "dtype": row.dtype,
        "pass": row.passes,
        "device": row.device,
        "seconds": seconds,
        "peers": peers | {name: {"why_not": reason} for name, reason in why_not.items()},
        "peak_memory_bytes": memory["ours"],
        "memory_why_not": memory_why_not(row.device),
        "flops": cost.flops,
        "bytes": cost.bytes,
        "flops_per_second": cost.flops / seconds,
        "bytes_per_second": cost.bytes / seconds,
        "share_of_compute_peak": shares["peak"],
        "share_of_bandwidth_peak": shares["bandwidth"],
        "targets": targets,
        "rounds": len(times["ours"]),
    }
