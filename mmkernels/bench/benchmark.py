"""Measures one row of an op's benchmark: correctness first, then memory, then times beside the peers.

A bench file has one line, `rows_of` with the op's peers; the rows are made by ``benchmarks/conftest.py``. Peers run in
turns with the op, in one process, on the same inputs. A wrong result has no time.

On a GPU times are the device's (`meters.time_calls`), and a row of forward + backward also times each candidate's
forward alone: the difference is its backward pass. FLOP are counted as attention papers do: 2 matrix products forward,
and 5 backward (the scores again, and four gradients), whatever a kernel computes more than once.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from mmkernels.bench.first_run import FirstRun
from mmkernels.bench.gate import Gate, draw_cotangents, draw_inputs, flat, with_gradients
from mmkernels.bench.peers import MOST_MEMORY, Call, CantRunError, Peer, check_room, first_line
from mmkernels.bench.rounds import Peaks, alternate
from mmkernels.bench.rows import Row, kind
from mmkernels.machine import matmul_rate, memory_of
from mmkernels.meters import memory_why_not
from mmkernels.options import DTYPES
from mmkernels.spec import Inputs, OpSpec, cast
from mmkernels.targets import OURS, Measured, YardstickShare

_LONG = 3.0  # seconds of the least work at the peak, above which every run of a row counts
_LONG_BUDGET = 100.0  # seconds of such a row's rounds
_QUICK_BUDGET = 8.0  # and of a quick row's
_LONG_ROUNDS = 5
_NAIVE_TENSORS = 3  # of the largest tensor's size, which the naive formula keeps at least
_NARROW = ("bf16", "fp16")
_DISTANCE = 0.05  # relative L2 distance from the truth at which a peer computes something else
_YARDSTICK, _FORWARD = "yardstick", ", forward"  # a candidate beside the peers; a suffix of any candidate


def rows_of(spec: OpSpec, peers: Sequence[Peer] = (), **options: Any) -> Callable[..., None]:
    """Returns the test of an op's bench file: for each of the op's rows, `measure` with these peers and options."""

    @pytest.mark.rows_of(spec)
    def test(benchmark: Any, row: Row) -> None:
        measure(benchmark, row, peers, **options)

    return test


def measure(benchmark: Any, row: Row, peers: Iterable[Peer], *, counts_products: bool = False) -> None:
    """Checks the op, then measures it beside the naive baseline and `peers`, into ``benchmark.extra_info``.

    Nothing of that where the row says `compile_only`. Where the least work alone takes `_LONG` seconds, a candidate's
    first run serves for its check and its memory too, and every round counts.

    Args:
        benchmark: pytest-benchmark's fixture.
        counts_products: count the matrix products that each candidate makes; the op's forward pass needs one.

    Raises:
        AssertionError: the op's result is wrong.
    """
    problem = _Problem(row)
    peers = [peer for peer in peers if peer.device in ("", problem.device.type)]
    if row.compile_only:
        problem.run_all(peers)
        return
    peers = [Peer("naive", partial(_naive, row), checked=False), *peers]
    left_out = {peer.name for peer in peers if row.quick and peer.slow}
    admitted = _Admitted(problem, counts_products)
    admitted.check_ours()
    for peer in peers:
        if peer.name not in left_out:
            admitted.admit(peer)
    checked = "parts at full length, and all for being finite" if admitted.gate.partial else "everything"
    del admitted.gate  # and with it the truth, before anything is timed
    rounds = None
    if problem.long or admitted.seconds > _LONG_BUDGET / _LONG_ROUNDS:  # peers may be long where the op is not
        budget = _QUICK_BUDGET if row.quick else _LONG_BUDGET
        rounds = min(max(1, int(budget / admitted.seconds)), _LONG_ROUNDS)
    yardstick, yardstick_flops = _yardstick(row)
    peaks = Peaks(DTYPES[row.dtype], row.device)
    samples = alternate(benchmark, admitted.candidates() | yardstick, peaks, problem.device, rounds)
    medians = {name: statistics.median(times) for name, times in samples.items()}
    cost = row.spec.cost(problem.inputs, row.backward)
    forward_flops = row.spec.cost(problem.inputs, False).flops
    backward = {
        name: _backward(medians, name, cost.flops - forward_flops) for name in medians if name + _FORWARD in medians
    }
    measured = Measured(
        flops=cost.flops,
        bytes=cost.bytes,
        seconds=medians,
        memory={name: _extra(size, problem) for name, size in admitted.memory.items()},
        peak_flops=peaks.flops,
        peak_bytes=peaks.bytes,
        backward_rate=backward[OURS]["backward_flops_per_second"] if OURS in backward else None,
        yardstick_rate=yardstick_flops / medians[_YARDSTICK] if yardstick else None,
    )
    benchmark.group = f"{row.spec.name}, {row.dtype}, {row.passes}"
    more = {
        name: backward.get(name, {}) | ({} if flops is None else {"gemms": flops / forward_flops})
        for name, flops in admitted.products.items()
    }
    benchmark.extra_info |= {"checked": checked} | _description(row, measured, admitted, more)
    benchmark.extra_info["targets"] = [
        target.judge(measured) for target in row.targets if getattr(target, "peer", "") not in left_out
    ]


class _Problem:
    """A row's inputs, the same at each call, and how a call on them is differentiated."""

    def __init__(self, row: Row) -> None:
        self.row, self.device = row, torch.device(row.device)
        _make_room(self.device)
        self.inputs = draw_inputs(row.spec, row.config.make, DTYPES[row.dtype], self.device, row.grads)
        self.leaves = [self.inputs[name] for name in row.grads]
        self.ours: Call = partial(row.spec.function, **self.inputs)
        flops = row.spec.cost(self.inputs, row.backward).flops
        self.long = flops / matmul_rate(DTYPES[row.dtype], row.device) > (_LONG / 20 if row.quick else _LONG)
        outputs = () if not self.leaves else self._outputs_like() if self.long else flat(self.ours())
        self.cotangents = draw_cotangents(outputs)

    def _outputs_like(self) -> list[Tensor]:
        """Returns tensors as the op's outputs, without computing them."""
        row = self.row
        on_meta = cast(self.inputs, DTYPES[row.dtype], "meta", row.spec.always_wide)
        return [torch.empty_like(x, device=self.device) for x in flat(row.spec.function(**on_meta))]

    def passes(self, call: Call) -> Call:
        """Returns `call`, with its gradients where the row has a backward pass."""
        return with_gradients(call, self.leaves, self.cotangents)

    def run_all(self, peers: Iterable[Peer]) -> None:
        """Runs every candidate but the naive one once."""
        self.passes(self.ours)()
        for peer in peers:
            with suppress(Exception):  # the measurement will say why
                self.passes(peer.prepare(self.inputs))()


@dataclass
class _Admitted:
    """The candidates whose results are right, and what their first runs told."""

    problem: _Problem
    counts_products: bool
    calls: dict[str, Call] = field(default_factory=dict)
    memory: dict[str, int | None] = field(default_factory=dict)
    products: dict[str, float | None] = field(default_factory=dict)
    why_not: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def __post_init__(self) -> None:
        row, problem = self.problem.row, self.problem
        self.gate = Gate(row.spec, problem.inputs, row.grads, problem.cotangents, parts_only=row.quick)

    def check_ours(self) -> None:
        row, run = self.problem.row, self._first_run(self.problem.ours)
        wrong = self.gate.problem(run.results)
        assert wrong is None, f"{row.spec.name} is wrong at {row}, {wrong}"
        self._add(OURS, self.problem.ours, run, run.memory())

    def admit(self, peer: Peer) -> None:
        """Adds a peer, or the reason why it can't run."""
        problem = self.problem
        try:
            call = peer.prepare(problem.inputs)
            run = self._first_run(call)
            if peer.checked:
                self._check_that_it_computes_the_same(peer, run)
            self._add(peer.name, call, run, _checked_memory(run, problem.device))
        except CantRunError as error:
            self.why_not[peer.name] = str(error)
        except Exception as error:  # a limit of the peer, such as memory, is no fault of the op
            self.why_not[peer.name] = f"fails: {type(error).__name__}: {first_line(error)}"
            _make_room(problem.device)

    def candidates(self) -> dict[str, Call]:
        """Returns what is timed: each candidate, and on a GPU its forward pass too, where the row has another."""
        timed = {name: self.problem.passes(call) for name, call in self.calls.items()}
        if self.problem.leaves and kind(self.problem.row.device) == "gpu":
            timed |= {name + _FORWARD: call for name, call in self.calls.items()}
        return timed

    def _first_run(self, call: Call) -> FirstRun:
        problem = self.problem
        return FirstRun(problem.passes(call), problem.device, problem.long, self.counts_products)

    def _add(self, name: str, call: Call, run: FirstRun, memory: int | None) -> None:
        self.calls[name], self.memory[name], self.products[name] = call, memory, run.flops
        self.seconds += run.seconds

    def _check_that_it_computes_the_same(self, peer: Peer, run: FirstRun) -> None:
        """A peer need not be as exact as the op: in 16 bits its results in float32 decide, if rounding hides them."""
        distance = self.gate.distance(run.results)
        if not distance < _DISTANCE and self.problem.row.dtype in _NARROW:
            distance = self.gate.distance(_in_float32(peer, self.problem))
        if not distance < _DISTANCE:
            raise CantRunError(f"computes something else: relative distance {distance:.2g}")


def _in_float32(peer: Peer, problem: _Problem) -> list[Tensor]:
    """Returns what a peer makes of the same numbers in float32."""
    narrow = [DTYPES[name] for name in _NARROW]
    wide = {
        name: x.detach().float().requires_grad_(x.requires_grad) if isinstance(x, Tensor) and x.dtype in narrow else x
        for name, x in problem.inputs.items()
    }
    leaves = [wide[name] for name in problem.row.grads]
    return flat(with_gradients(peer.prepare(wide), leaves, problem.cotangents)())


def _checked_memory(run: FirstRun, device: torch.device) -> int | None:
    memory = run.memory()
    if device.type == "cuda" and memory is not None and memory > MOST_MEMORY * memory_of(device):
        _make_room(device)
        share = memory / memory_of(device)
        raise CantRunError(f"takes {memory / 1e9:.0f} GB, {share:.0%} of the GPU's memory: left out")
    return memory


def _naive(row: Row, given: Inputs) -> Call:
    parts = row.spec.parts
    if parts is not None:
        check_room(_NAIVE_TENSORS * parts.elements(given) * DTYPES[row.dtype].itemsize, row.device)
    return partial(row.spec.function, **given, backend="reference")


def _yardstick(row: Row) -> tuple[dict[str, Call], float]:
    """Returns the op at the configuration that a target compares rates with, as a candidate, and its FLOP."""
    if row.config.yardstick is None or not any(isinstance(target, YardstickShare) for target in row.targets):
        return {}, 0.0
    other = _Problem(replace(row, config=row.config.yardstick))
    return {_YARDSTICK: other.passes(other.ours)}, row.spec.cost(other.inputs, row.backward).flops


def _make_room(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# What the JSON says about a row; the names contain the units.


def _backward(medians: dict[str, float], name: str, flops: float) -> dict[str, float]:
    """Returns the figures of the backward pass alone, where the forward was timed too."""
    seconds = max(medians[name] - medians[name + _FORWARD], 1e-9)
    return {"backward_seconds": seconds, "backward_flops_per_second": flops / seconds}


def _extra(size: int | None, problem: _Problem) -> float | None:
    """Returns the bytes above inputs and gradients, at least one."""
    return None if size is None else max(float(size - sum(x.nbytes for x in problem.leaves)), 1.0)


def _description(
    row: Row, measured: Measured, admitted: _Admitted, more: dict[str, dict[str, float]]
) -> dict[str, Any]:
    seconds = measured.seconds[OURS]
    peers: dict[str, Any] = {
        name: {
            "seconds": measured.seconds[name],
            "ratio": measured.ratio(name),
            "ratio_at_peak": measured.ratio_at_peak(name),
            "peak_memory_bytes": memory,
            **more[name],
        }
        for name, memory in admitted.memory.items()
        if name != OURS
    }
    return {
        "op": row.spec.name,
        "configuration": row.config.id,
        "parameters": dict(row.config.params),
        "tags": sorted(row.config.tags),
        "dtype": row.dtype,
        "pass": row.passes,
        "device": row.device,
        "seconds": seconds,
        **more[OURS],
        "peers": peers | {name: {"why_not": reason} for name, reason in admitted.why_not.items()},
        "peak_memory_bytes": admitted.memory[OURS],
        "memory_why_not": memory_why_not(row.device),
        "flops": measured.flops,
        "bytes": measured.bytes,
        "flops_per_second": measured.rate,
        "bytes_per_second": measured.bytes / seconds,
        "peak_flops_per_second": measured.peak_flops,
        "peak_bytes_per_second": measured.peak_bytes,
        "share_of_compute_peak": measured.share_of_peak,
        "share_of_bandwidth_peak": measured.share_of_bandwidth,
        "yardstick_flops_per_second": measured.yardstick_rate,
    }
