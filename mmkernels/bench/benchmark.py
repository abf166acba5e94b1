"""The benchmark harness: one row is one configuration, dtype and pass of an op, beside its peers.

A bench file has the op's peers and one test of three lines; ``benchmarks/conftest.py`` makes the rows. Peers run in
turns with the op, in one process, on the same inputs. A wrong result has no time.

On a GPU times are the device's own (`meters.time_calls`), and a row of forward + backward also times each candidate's
forward alone: the difference is its backward pass. FLOP are counted as attention papers do: 2 matrix products forward,
and 5 backward (the scores again, and four gradients), whatever a kernel computes more than once.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mmkernels.bench.gate import Call, Gate, draw_cotangents, flat, with_gradients
from mmkernels.bench.gate import memory as memory_of
from mmkernels.bench.products import FirstRun
from mmkernels.machine import matmul_rate, memory_rate
from mmkernels.meters import memory_why_not, time_calls
from mmkernels.options import DTYPES
from mmkernels.spec import Benchmark, Inputs, OpSpec, Target, cast

_BUDGET = 1.0  # seconds of counted rounds for one row, all candidates together
_ROUNDS = (5, 200)
_LONG = 3.0  # seconds of the least work at the peak, above which every run of a row counts
_LONG_BUDGET = 100.0  # seconds of such a row's rounds
_NAIVE_TENSORS = 3  # of the largest tensor's size, that the naive formula holds at least
_SAMPLE = 2e-3  # seconds that one sample lasts at least: shorter calls are repeated within it
_NARROW = ("bf16", "fp16")
_OFF = 0.05  # relative L2 distance from the truth at which a peer computes something else
_MOST_MEMORY = 0.5  # of a GPU's, that a peer may take: one that leaves others no room disturbs their times
_OURS, _YARDSTICK, _FORWARD = "ours", "yardstick", ", forward"  # candidates beside the peers; a suffix of any
_MEMORY_OF, _EXTRA = "memory of ", "extra MB"  # what targets may be about


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
        compile_only: nothing is measured; each candidate but the naive one runs once, so that what its compiler keeps
            on disk is there when the row is measured.
    """

    spec: OpSpec
    config: Benchmark
    dtype: str
    backward: bool
    device: str = "cpu"
    compile_only: bool = False

    def __str__(self) -> str:  # also what the JSON says of it
        return f"{self.config.id}, {self.dtype}, {self.passes}"

    __repr__ = __str__

    @property
    def passes(self) -> str:
        return "forward + backward" if self.backward else "forward"

    @property
    def grads(self) -> tuple[str, ...]:
        """Names of the arguments that the row differentiates by."""
        return self.config.grads if self.backward else ()

    @property
    def targets(self) -> list[Target]:
        """Those that are set for this row."""
        own = (self.dtype, self.backward, _kind(self.device))
        return [target for target in self.config.targets if (target.dtype, target.backward, target.device) == own]


def rows(spec: OpSpec, dtypes: Iterable[str], device: str = "cpu", contains: str = "") -> list[Row]:
    """All rows of an op for this kind of device whose name contains `contains`."""
    found = [
        Row(spec, config, dtype, backward, device)
        for dtype in dtypes
        for backward in (False, True)
        for config in spec.benchmarks
        if (config.grads or not backward) and _kind(device) in config.devices
    ]
    return [row for row in found if contains in str(row)]


def _kind(device: str) -> str:
    return "cpu" if torch.device(device).type == "cpu" else "gpu"


def measure(benchmark: Any, row: Row, peers: Iterable[Peer], *, counts_products: bool = False) -> None:
    """Check the op, then time and weigh it beside the naive baseline and `peers`, into ``benchmark.extra_info``.

    Nothing of that where the row says `compile_only`. Where the least work alone takes `_LONG` seconds, a candidate's
    first run serves for checking and weighing it, and no round is run that does not count.

    Args:
        benchmark: pytest-benchmark's fixture.
        counts_products: count the matrix products that each candidate makes; the op's forward pass needs one.

    Raises:
        AssertionError: the op's result is wrong.
    """
    spec, device = row.spec, torch.device(row.device)
    inputs = _inputs(row)
    leaves = [inputs[name] for name in row.grads]
    ours = partial(spec.function, **inputs)
    long = _is_long(row, inputs)
    cotangents = draw_cotangents(_outputs_like(row, inputs) if long else flat(ours())) if leaves else []
    passes = partial(with_gradients, leaves=leaves, cotangents=cotangents)
    if row.compile_only:
        passes(ours)()
        for peer in peers:
            with suppress(Exception):  # the measurement will say why
                passes(peer.prepare(inputs))()
        return
    gate = Gate(spec, inputs, row.grads, cotangents)
    first = partial(FirstRun, device=device, long=long, counts_products=counts_products)
    run = first(passes(ours))
    problem = gate.problem(run.results)
    assert problem is None, f"{spec.name} is wrong at {row}, {problem}"

    calls: dict[str, Call] = {_OURS: ours}
    memory, products = {_OURS: run.memory()}, {_OURS: run.flops}
    spent = run.seconds
    del run
    why_not: dict[str, str] = {}
    for peer in (Peer("naive", partial(_naive, row)), *peers):
        try:
            call = peer.prepare(inputs)
            run = first(passes(call))
            wider = partial(_in_float32, peer, inputs, row.grads, cotangents) if row.dtype in _NARROW else None
            memory[peer.name], products[peer.name] = _admit(run, gate, device, wider), run.flops
            spent += run.seconds
            calls[peer.name] = call
        except CantRunError as error:
            why_not[peer.name] = str(error)
        except Exception as error:  # a peer's own limits, such as memory, are no fault of the op
            why_not[peer.name] = f"fails: {type(error).__name__}: {first_line(error)}"
            _make_room(device)
    checked = "parts at full length, and all for being finite" if gate.partial else "everything"
    del gate

    candidates = {name: passes(call) for name, call in calls.items()}
    if leaves and _kind(row.device) == "gpu":
        candidates |= {name + _FORWARD: call for name, call in calls.items()}
    yardstick = _yardstick(row)
    if yardstick is not None:
        candidates[_YARDSTICK] = yardstick[0]
    rounds = min(max(1, int(_LONG_BUDGET / spent)), _ROUNDS[0]) if long else None
    times = _time(benchmark, candidates, device, rounds)
    medians = {name: statistics.median(samples) for name, samples in times.items()}
    benchmark.group = f"{spec.name}, {row.dtype}, {row.passes}"
    figures = _Figures(row, inputs, medians, None if yardstick is None else yardstick[1])
    benchmark.extra_info.update(
        figures.description(memory, products, why_not) | {"checked": checked, "rounds": len(times[_OURS])}
    )


def _inputs(row: Row) -> Inputs:
    """The row's inputs, drawn on its device, the same at each call."""
    device = torch.device(row.device)
    _make_room(device)
    with device:
        drawn = row.config.make(torch.Generator(device).manual_seed(0))
    inputs = cast(drawn, DTYPES[row.dtype], device, row.spec.always_wide)
    return {name: x.detach().requires_grad_() if name in row.grads else x for name, x in inputs.items()}


def _yardstick(row: Row) -> tuple[Call, float] | None:
    """The op at the configuration that a target compares rates with, and its FLOP."""
    if row.config.yardstick is None or all(target.than != _YARDSTICK for target in row.targets):
        return None
    other = replace(row, config=row.config.yardstick)
    inputs = _inputs(other)
    call = partial(row.spec.function, **inputs)
    leaves = [inputs[name] for name in other.grads]
    cotangents = draw_cotangents(flat(call())) if leaves else []
    return with_gradients(call, leaves, cotangents), row.spec.cost(inputs, row.backward).flops


def _is_long(row: Row, inputs: Inputs) -> bool:
    flops = row.spec.cost(inputs, row.backward).flops
    return flops / matmul_rate(DTYPES[row.dtype], row.device) > _LONG


def _outputs_like(row: Row, inputs: Inputs) -> list[Tensor]:
    """Tensors as the op's outputs, without computing them."""
    device = torch.device(row.device)
    on_meta = cast(inputs, DTYPES[row.dtype], "meta", row.spec.always_wide)
    return [torch.empty_like(x, device=device) for x in flat(row.spec.function(**on_meta))]


def _naive(row: Row, given: Inputs) -> Call:
    parts = row.spec.parts
    if parts is not None:
        check_room(_NAIVE_TENSORS * parts.elements(given) * DTYPES[row.dtype].itemsize, row.device)
    return partial(row.spec.function, **given, backend="reference")


def check_room(least: float, device: torch.device | str) -> None:
    """Raise `CantRunError` where `least` bytes are more than a peer may take of a CPU's memory.

    A GPU says itself that its memory is exhausted; a CPU's process is killed.
    """
    device = torch.device(device)
    if device.type == "cpu" and least > _MOST_MEMORY * memory_of(device):
        raise CantRunError(f"would take {least / 1e9:.0f} GB or more of {memory_of(device) / 1e9:.0f} GB: left out")


def _in_float32(peer: Peer, inputs: Inputs, grads: Sequence[str], cotangents: list[Tensor]) -> list[Tensor]:
    """What a peer makes of the same numbers in float32."""
    narrow = [DTYPES[name] for name in _NARROW]
    wide = {
        name: x.detach().float().requires_grad_(x.requires_grad) if isinstance(x, Tensor) and x.dtype in narrow else x
        for name, x in inputs.items()
    }
    leaves = [wide[name] for name in grads]
    return flat(with_gradients(peer.prepare(wide), leaves, cotangents)())


def _admit(run: FirstRun, gate: Gate, device: torch.device, wider: Callable[[], list[Tensor]] | None) -> int | None:
    """A peer's peak memory. It needs no more than to compute the same thing: its own rounding is its affair.

    Args:
        wider: the same in float32, by which a peer is judged whose rounding hides what it computes.
    """
    off = gate.distance(run.results)
    if not off < _OFF and wider is not None:
        off = gate.distance(wider())
    if not off < _OFF:
        raise CantRunError(f"computes something else: relative distance {off:.2g}")
    memory = run.memory()
    if device.type == "cuda" and memory is not None:
        share = memory / memory_of(device)
        if share > _MOST_MEMORY:
            _make_room(device)
            raise CantRunError(f"takes {memory / 1e9:.0f} GB, {share:.0%} of the GPU's memory: left out")
    return memory


def _make_room(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def first_line(error: Exception) -> str:
    """Of an error's message."""
    return next(iter(str(error).strip().splitlines()), "")


def _time(
    benchmark: Any, candidates: dict[str, Call], device: torch.device, long_rounds: int | None
) -> dict[str, list[float]]:
    """Seconds of single calls, by candidate; each round times every other one, then ours.

    Args:
        long_rounds: how many, of calls so long that none is repeated; None: as many as `_BUDGET` allows, after some
            that don't count.
    """
    repeats = dict.fromkeys(candidates, 1)
    if long_rounds is None:
        repeats = {name: max(1, math.ceil(_SAMPLE / time_calls(call, 1, device))) for name, call in candidates.items()}
    samples: dict[str, list[float]] = {name: [] for name in candidates}

    def sample(name: str) -> None:
        samples[name].append(time_calls(candidates[name], repeats[name], device))

    def sample_others() -> None:
        for name in candidates:
            if name != _OURS:
                gc.collect(0)
                sample(name)

    rounds, warm_up = long_rounds, 0
    if rounds is None:
        begin = time.perf_counter()
        sample_others()
        sample(_OURS)
        rounds, warm_up = int(_BUDGET / (time.perf_counter() - begin)), 1
        rounds = min(max(_ROUNDS[0], rounds), _ROUNDS[1])
    benchmark.pedantic(partial(sample, _OURS), setup=sample_others, rounds=rounds, iterations=1, warmup_rounds=warm_up)
    for taken in samples.values():
        del taken[:-rounds]  # the round that counted the rounds, and the warm-up
    if device.type != "cuda":  # pytest-benchmark's clock is as good, and its own statistics then speak of the same
        samples[_OURS] = [seconds / repeats[_OURS] for seconds in benchmark.stats.stats.data]
    benchmark.extra_info["calls_per_round"] = repeats[_OURS]
    return samples


class _Figures:
    """What the JSON says about a row; units stand in the names."""

    def __init__(self, row: Row, inputs: Inputs, medians: dict[str, float], yardstick_flops: float | None) -> None:
        self.row, self.medians = row, medians
        self.grad_bytes = sum(inputs[name].nbytes for name in row.grads)
        self.cost = row.spec.cost(inputs, row.backward)
        self.forward_flops = row.spec.cost(inputs, False).flops
        self.backward_flops = self.cost.flops - self.forward_flops if row.backward else 0.0
        self.compute, self.bandwidth = matmul_rate(DTYPES[row.dtype], row.device), memory_rate(row.device)
        seconds = medians[_OURS]
        self.shares = {
            "peak": self.cost.flops / seconds / self.compute,
            "bandwidth": self.cost.bytes / seconds / self.bandwidth,
        }
        self.yardstick_rate = None if yardstick_flops is None else yardstick_flops / medians[_YARDSTICK]

    def description(
        self, memory: dict[str, int | None], products: dict[str, float | None], why_not: dict[str, str]
    ) -> dict[str, Any]:
        row, cost, seconds = self.row, self.cost, self.medians[_OURS]
        peers: dict[str, Any] = {
            name: {
                "seconds": self.medians[name],
                "ratio": self.medians[name] / seconds,
                "peak_memory_bytes": memory[name],
                **self.gemms(products[name]),
                **self.backward(name),
            }
            for name in memory
            if name != _OURS
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
            **self.gemms(products[_OURS]),
            **self.backward(_OURS),
            "peers": peers | {name: {"why_not": reason} for name, reason in why_not.items()},
            "peak_memory_bytes": memory[_OURS],
            "memory_why_not": memory_why_not(row.device),
            "flops": cost.flops,
            "bytes": cost.bytes,
            "flops_per_second": cost.flops / seconds,
            "bytes_per_second": cost.bytes / seconds,
            "share_of_compute_peak": self.shares["peak"],
            "share_of_bandwidth_peak": self.shares["bandwidth"],
            "yardstick_flops_per_second": self.yardstick_rate,
            "targets": [self.judged(target, memory) for target in row.targets],
        }

    def gemms(self, flops: float | None) -> dict[str, float]:
        """How many matrix products of the op's size were counted."""
        return {} if flops is None else {"gemms": flops / self.forward_flops}

    def backward(self, name: str) -> dict[str, float]:
        """Of the backward pass alone, where the forward was timed too."""
        forward = self.medians.get(name + _FORWARD)
        if forward is None:
            return {}
        seconds = max(self.medians[name] - forward, 1e-9)
        return {"backward_seconds": seconds, "backward_flops_per_second": self.backward_flops / seconds}

    def extra(self, memory: dict[str, int | None], name: str) -> float | None:
        """Bytes above inputs and gradients; None: not known."""
        peak = memory.get(name)
        return None if peak is None else max(float(peak - self.grad_bytes), 1.0)

    def judged(self, target: Target, memory: dict[str, int | None]) -> dict[str, Any]:
        """A target beside what was found, None where its peer can't run, and what nothing but the least work at the
        measured peaks would reach."""
        limit = {"least": target.least} if target.most is None else {"most": target.most}
        found: float | None
        at_peak: float | None = 1.0
        if target.than in self.shares:
            found = self.shares[target.than]
        elif target.than == "tflops":
            rate = self.backward(_OURS).get("backward_flops_per_second", self.cost.flops / self.medians[_OURS])
            found, at_peak = rate / 1e12, self.compute / 1e12
        elif target.than == _YARDSTICK:
            assert self.yardstick_rate is not None
            found, at_peak = self.cost.flops / self.medians[_OURS] / self.yardstick_rate, None
        elif target.than == _EXTRA:
            extra = self.extra(memory, _OURS)
            found, at_peak = None if extra is None else extra / 1e6, None
        elif target.than.startswith(_MEMORY_OF):
            theirs, own = self.extra(memory, target.than.removeprefix(_MEMORY_OF)), self.extra(memory, _OURS)
            found, at_peak = None if theirs is None or own is None else theirs / own, None
        elif target.than in self.medians:
            other = self.medians[target.than]
            found = other / self.medians[_OURS]
            at_peak = other / max(self.cost.flops / self.compute, self.cost.bytes / self.bandwidth)
        else:
            found = at_peak = None
        return {"than": target.than, **limit, "found": found, "at_peak": at_peak}
