"""Measures one row: a model after `mmkernels.patch` beside itself before, on each of its own attentions.

All candidates alternate on the same weights and inputs; one of them is the patched model without the ops, which bounds
the speed-up (Amdahl). A wrong result has no time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from integrations_models import Case
from integrations_targets import Found
from models_clock import Clock
from models_measure import kept_for_backward, rounds_for
from torch import Tensor, nn
from transformers_measure import open_gates, rounded

import mmkernels
from mmkernels.bench.rounds import Peaks, alternate
from mmkernels.meters import memory_why_not, peak_memory
from mmkernels.ops.linear.linear_cross_entropy.spec import SPEC
from mmkernels.options import DTYPES
from mmkernels.profiling.point import REMOVED, amdahl, running_as
from mmkernels.targets import OURS
from mmkernels.testing.models import seeded

Results = tuple[Tensor, ...]


@dataclass(frozen=True, repr=False)
class Row:
    """One row of the benchmark.

    Args:
        dtype: a name in `DTYPES`.
        compile_only: the patched model runs once and nothing is measured.
        quick: one round may be enough.
    """

    case: Case
    dtype: str
    device: str = "cpu"
    compile_only: bool = False
    quick: bool = False

    def __str__(self) -> str:
        return f"{self.case.id}, {self.dtype}, {self.case.passes}"

    __repr__ = __str__


class Trial:
    """A model with its inputs, in one dtype at a time, patched or not."""

    def __init__(self, row: Row) -> None:
        self.case, self.device = row.case, torch.device(row.device)
        with seeded(0):
            self.net: Any = row.case.build()
        open_gates(self.net)
        self.net.to(self.device).train(row.case.trains)
        for module in self.net.modules():  # dropout would make every candidate another problem
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        with seeded(0):
            drawn = row.case.inputs()
        self._inputs = {
            name: rounded(x, DTYPES[row.dtype]).to(self.device) if isinstance(x, Tensor) else x
            for name, x in drawn.items()
        }
        self._state = ""
        self.to(DTYPES[row.dtype])

    def to(self, dtype: torch.dtype) -> None:
        """Converts weights and inputs; buffers keep their precision, as in models that were loaded in `dtype`."""
        for x in self.net.parameters():
            x.data = x.data.to(dtype)
        self.inputs = {
            name: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x
            for name, x in self._inputs.items()
        }

    def prepare(self, name: str) -> None:
        """Does what a run of a candidate needs and is not timed."""
        self.net.zero_grad(set_to_none=True)
        state = OURS if name == REMOVED else name
        if state == self._state:
            return
        if self._state == OURS:
            mmkernels.unpatch(self.net, verbose=False)
        if state == OURS:
            mmkernels.patch(self.net, verbose=False)
        elif len(self.case.own) > 1:
            self.net.set_attn_implementation(state)
        self._state = state

    def run(self, name: str) -> Results:
        """Runs a candidate that is prepared."""
        with running_as(REMOVED if name == REMOVED else "fused"):
            out = self.net(**self.inputs)
            if not self.case.trains:
                return self.case.outputs(out)
            out.loss.backward()
        gradients = [self.net.get_parameter(path).grad for path in self.case.gradients]
        assert None not in gradients, f"{self.case.id} has parameters without a gradient"
        return (out.loss.detach(), *(x[:1000].clone() if x.dim() else x.clone() for x in gradients))

    def results(self, name: str) -> Results:
        """Returns the results of a run, of positions that are not padding."""
        self.prepare(name)
        results = tuple(x.detach() for x in self.run(name))
        valid = self.inputs.get("attention_mask")
        if valid is None or self.case.trains:
            return results
        return tuple(x[valid.bool()] if x.shape[: valid.dim()] == valid.shape else x for x in results)


class ModuleClock:
    """The time inside of modules of one class, without that of the linear layers in them.

    Args:
        net: the model. name: the class; "": none.
        device: on which they run.

    Attributes:
        seconds: since it was last set to 0.
    """

    def __init__(self, net: nn.Module, name: str, device: torch.device) -> None:
        self._device, self.seconds = device, 0.0
        self._attention = [module for module in net.modules() if type(module).__name__ == name]
        assert self._attention or not name, f"no {name} in the model"
        self._linear = [part for module in self._attention for part in module.modules() if isinstance(part, nn.Linear)]

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Times the calls inside of the ``with`` block."""
        handles = []
        for sign, modules in ((1.0, self._attention), (-1.0, self._linear)):
            for module in modules:
                handles.append(module.register_forward_pre_hook(self._add(-sign)))
                handles.append(module.register_forward_hook(self._add(sign)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _add(self, sign: float) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            self.seconds += sign * time.perf_counter()

        return hook


def measure(benchmark: Any, row: Row) -> None:
    """Checks the patched model, then times it beside itself, into ``benchmark.extra_info``.

    Args:
        benchmark: pytest-benchmark's fixture.

    Raises:
        AssertionError: the result is wrong, or nothing was patched.
    """
    with torch.set_grad_enabled(row.case.trains):
        trial = Trial(row)
        if row.compile_only:
            trial.results(OURS)
            return
        _check(trial, row)
        seconds = time.perf_counter()
        memory = {name: _memory(trial, name, row) for name in (*row.case.own, OURS)}
        seconds = (time.perf_counter() - seconds) / len(memory)
        benchmark.group = f"integrations, {row.dtype}, {row.case.passes}"
        found, samples = _time(benchmark, trial, row, seconds, memory)
    benchmark.extra_info |= _description(row, found, samples)


def _check(trial: Trial, row: Row) -> None:
    """Raises `AssertionError` unless the patched model is at most twice as far from a wider dtype as it was before."""
    names = (trial.case.own[-1], OURS)
    theirs, ours = (trial.results(name) for name in names)
    trial.to(torch.float64 if row.dtype == "fp32" else torch.float32)
    truth = trial.results(names[0])
    trial.to(DTYPES[row.dtype])
    for place, results in enumerate(zip(ours, theirs, truth, strict=True)):
        problem = SPEC.over_budget(*results)
        assert problem is None, f"{row} is wrong after patch, result {place}: {problem}"


def _memory(trial: Trial, name: str, row: Row) -> int | None:
    """Returns what a forward pass takes above the model and its inputs, or what a training step keeps."""
    trial.prepare(name)
    if not row.case.trains:
        return peak_memory(lambda: trial.run(name), row.device)
    head = trial.net.get_parameter(row.case.head).shape if row.case.head else None
    with kept_for_backward([trial.net], head) as kept:
        trial.run(name)
    return sum(kept.values())


def _time(
    benchmark: Any, trial: Trial, row: Row, seconds: float, memory: dict[str, int | None]
) -> tuple[Found, dict[str, list[float]]]:
    """Returns what was found, and the seconds of every run by candidate; `seconds`: of one run."""
    candidates = (*row.case.own, REMOVED, OURS)
    calls, modules = Clock(row.device), ModuleClock(trial.net, row.case.attention, trial.device)
    attention: dict[str, list[float]] = {name: [] for name in candidates}
    of_calls: list[float] = []

    def run(name: str) -> None:
        calls.clear()
        modules.seconds = 0.0
        trial.run(name)
        attention[name].append(modules.seconds)
        if name == OURS:
            of_calls.append(calls.seconds)

    peaks = Peaks(DTYPES[row.dtype], row.device)
    with calls.watching(), modules.watching():
        samples = alternate(
            benchmark,
            {name: lambda name=name: run(name) for name in candidates},
            peaks,
            trial.device,
            rounds_for(seconds * len(candidates), row.quick),
            before=trial.prepare,
        )
    found = Found(
        seconds={name: median(times) for name, times in samples.items()},
        attention={name: median(times) for name, times in attention.items()},
        calls=median(of_calls),
        flops=calls.flops(),  # the last candidate of a round is ours
        memory=memory,
        products=row.case.products,
        peak_flops=peaks.flops,
    )
    return found, samples


def _description(row: Row, found: Found, samples: dict[str, list[float]]) -> dict[str, Any]:
    """Returns the JSON of a row; the names contain the units."""
    seconds = found.seconds
    peers = {
        name: {
            "seconds": seconds[name],
            "ratio": seconds[name] / seconds[OURS],
            "peak_memory_bytes": found.memory[name],
        }
        for name in row.case.own
    }
    on_a_cpu = torch.device(row.device).type == "cpu"
    return {
        "op": "integrations",
        "configuration": row.case.id,
        "dtype": row.dtype,
        "pass": row.case.passes,
        "device": row.device,
        "seconds": seconds[OURS],
        "peers": peers,
        "peak_memory_bytes": found.memory[OURS],
        "memory_why_not": memory_why_not(row.device),
        "amdahl": amdahl(seconds[found.peer], seconds[OURS], seconds[REMOVED]),
        "attention_calls": {
            "seconds": found.calls,
            "flops": found.flops,
            "share_of_peak": found.share_of_peak,
            "peak_flops_per_second": found.peak_flops,
        },
        "attention_modules": {"seconds": found.attention, "ratio": found.attention_ratio},
        "samples_seconds": samples,
        "targets": [target.judge(found) for target in row.case.targets] if on_a_cpu else [],
    }
