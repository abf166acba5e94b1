"""`OpSpec`: what tests, benchmarks and tuning need to know about an op, defined once in ``ops/<op>/spec.py``."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmkernels.masks import SpanMask
from mmkernels.targets import Target

Inputs = dict[str, Any]
"""Keyword arguments of an op's public function."""


def flatten(outputs: Any) -> tuple[Tensor, ...]:
    """Returns the tensors of a call's result: one tensor, or tuples of tensors and of sizes, which are left out."""
    if isinstance(outputs, Tensor):
        return (outputs,)
    return () if isinstance(outputs, int) else tuple(x for part in outputs for x in flatten(part))


@dataclass(frozen=True)
class Case:
    """One correctness case.

    Args:
        make: draws the public function's keyword arguments from a generator, floating tensors in float64.
        grads: the arguments whose gradient is compared.
        seeded: the op draws random numbers: every call is made under the same ``torch.manual_seed``.
    """

    id: str
    make: Callable[[torch.Generator], Inputs]
    grads: tuple[str, ...] = ()
    seeded: bool = False


@dataclass(frozen=True)
class Cost:
    """The least work of one call: what must be computed, and what must be read and written."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Benchmark:
    """One benchmark configuration at published widths; it is never changed to meet a target.

    Args:
        make: as in `Case`.
        grads: arguments that a training step differentiates; empty: forward only.
        params: the shape by name, for the table and the JSON.
        targets: what its rows must reach.
        devices: the kinds of device that it is measured on, of "cpu" and "gpu".
        yardstick: another configuration of the op, timed beside this one for the FLOP a second that it reaches.
        headline: it is one of the few that ``mmkernels bench --quick`` measures.
    """

    id: str
    make: Callable[[torch.Generator], Inputs]
    params: Mapping[str, Any]
    grads: tuple[str, ...] = ()
    tags: frozenset[str] = frozenset()
    targets: tuple[Target, ...] = ()
    devices: tuple[str, ...] = ("cpu", "gpu")
    yardstick: Benchmark | None = None
    headline: bool = False


Shard = Callable[[Any], Any]
"""Takes an argument, an output or a gradient of a call; returns the part of it that belongs to one shard."""


class Expected(NamedTuple):
    """What is right in one part of a problem.

    Args:
        share: (index, result) -> the slice of that result which this part checks; outputs come first, then gradients.
        naive, true: what the definition gives for each slice, in the inputs' dtype and in float64.
    """

    share: Callable[[int, Tensor], Tensor]
    naive: Sequence[Tensor]
    true: Sequence[Tensor]


@dataclass(frozen=True)
class Parts:
    """How a problem is checked whose naive formula in float64 does not fit into memory: on parts of its results.

    Args:
        elements: inputs -> the number of elements of the largest tensor that the naive formula builds.
        shards: inputs -> some shards, each computed by the same op from its part of the arguments alone.
        expected: where every result depends on every input, so that there are no shards: inputs, names of those
            differentiated by, cotangents -> what is right in some parts, computed by other means.
    """

    elements: Callable[[Inputs], int]
    shards: Callable[[Inputs], Sequence[Shard]] | None = None
    expected: Callable[[Inputs, Sequence[str], Sequence[Tensor]], Sequence[Expected]] | None = None


@dataclass(frozen=True)
class OpSpec:
    """An op's reference, cases, benchmarks, error budget and cost.

    Args:
        name: of the op's folder and of its public function, whose ``backend="reference"`` is the definition.
        cases: correctness cases, small enough for an interpreter.
        cost: inputs, and whether backward is included -> `Cost`.
        floor: absolute error below which no comparison is made, by dtype, relative to the largest reference value.
        always_wide: arguments that stay float32 beside 16-bit inputs.
        factor: an error may be at most this many times the same-dtype reference's error against float64.
        parts: how benchmark configurations are checked whose naive formula does not fit; None: all of them fit.
    """

    name: str
    cases: tuple[Case, ...]
    cost: Callable[[Inputs, bool], Cost]
    benchmarks: tuple[Benchmark, ...] = ()
    always_wide: frozenset[str] = frozenset()
    factor: float = 2.0
    floor: Mapping[torch.dtype, float] = field(
        default_factory=lambda: {
            torch.float64: 1e-13,
            torch.float32: 1e-6,
            torch.bfloat16: 4e-3,
            torch.float16: 5e-4,
        }
    )
    parts: Parts | None = None

    @property
    def function(self) -> Callable[..., Any]:
        """The public function."""
        ops = importlib.import_module("mmkernels.ops")
        return getattr(importlib.import_module(ops.MODULES[self.name]), self.name)

    def over_budget(self, ours: Tensor, naive: Tensor, true: Tensor) -> str | None:
        """Returns what is wrong with a result, or None.

        Its largest error and its root mean square error, which depends less on luck, may be `factor` times the
        reference's in the same dtype, plus `floor` times the largest true value; for integers nothing is added.

        Args:
            ours, naive: the result and the reference's, in the dtype under test.
            true: the reference's in float64 (or float32, for 16-bit results too large for that).
        """
        if ours.shape != true.shape:
            return f"shape {tuple(ours.shape)}, expected {tuple(true.shape)}"
        whole = not true.is_floating_point()
        dtype = naive.dtype if naive.dtype in self.floor else torch.float32
        true = true.double() if whole else true
        ours, naive = ours.to(true), naive.to(true)
        finite = true.isfinite()
        same = torch.isclose(ours, true, equal_nan=True)  # only looked at where the truth is not finite
        if not bool(same[~finite].all()) or not bool(ours[finite].isfinite().all()):
            return "not finite where it should be, or finite where it should not"
        if not bool(finite.any()):
            return None
        floor = 0.0 if whole else self.floor[dtype] * max(1.0, float(true[finite].abs().max()))
        errors = (ours - true)[finite], (naive - true)[finite]
        for kind, size in (("largest", torch.inf), ("root mean square", 2)):
            mean = errors[0].numel() ** -0.5 if size == 2 else 1.0
            error, baseline = (mean * float(torch.linalg.vector_norm(x, size)) for x in errors)
            if not error <= self.factor * baseline + floor:
                return f"{kind} error {error:.3g}, allowed {self.factor * baseline + floor:.3g}"
        return None


def cast(
    inputs: Inputs, dtype: torch.dtype, device: torch.device | str = "cpu", always_wide: frozenset[str] = frozenset()
) -> Inputs:
    """Returns the same inputs with floating tensors in `dtype`, on `device`; strided views stay strided."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def move(name: str, x: Any) -> Any:
        if isinstance(x, Tensor) and x.is_floating_point():
            return _laid_out_as(x, x.to(device, wide if name in always_wide else dtype))
        return x.to(device) if isinstance(x, Tensor | SpanMask) else x

    return {name: move(name, x) for name, x in inputs.items()}


def _laid_out_as(view: Tensor, x: Tensor) -> Tensor:
    """Returns x with the strides of `view`. `Tensor.to` closes the gaps of a view; here they hold NaN."""
    if x.stride() == view.stride() or not x.numel():
        return x
    shape, strides, offset = view.shape, view.stride(), view.storage_offset()
    size = offset + 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    laid_out = x.new_full((size,), torch.nan).as_strided(shape, strides, offset)
    once = tuple(slice(1) if stride == 0 else slice(None) for stride in strides)
    laid_out[once].copy_(x[once])
    return laid_out
