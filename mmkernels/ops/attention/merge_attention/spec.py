"""What merging is: the softmax-weighted sum of two partial results."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from mmkernels.runtime.arguments import Differentiable
from mmkernels.spec import Benchmark, Case, Cost, Inputs, OpSpec


class Arguments(NamedTuple):
    """The record of `merge_attention`."""

    out_a: Differentiable  # [B, H, Lq, Dv]
    lse_a: Differentiable  # [B, H, Lq]
    out_b: Differentiable
    lse_b: Differentiable


class Results(NamedTuple):
    """What `merge_attention` returns."""

    out: Differentiable  # [B, H, Lq, Dv], in memory [B, Lq, H, Dv]
    lse: Differentiable  # [B, H, Lq]


def reference(args: Arguments) -> tuple[Tensor, Tensor]:
    """The naive formula."""
    lse = torch.stack([args.lse_a, args.lse_b])
    weights = torch.where(lse == -torch.inf, -1e30, lse).softmax(0) * (lse != -torch.inf)
    out = (weights[0, ..., None] * args.out_a + weights[1, ..., None] * args.out_b).to(args.out_a.dtype)
    return out.transpose(1, 2).contiguous().transpose(1, 2), torch.logsumexp(lse, 0)


def _make(shape: tuple[int, int, int, int], blind: float = 0.0) -> Callable[[Generator], Inputs]:
    def make(generator: Generator) -> Inputs:
        inputs: Inputs = {}
        for side in "ab":
            lse = 3 * torch.randn(shape[:3], generator=generator, dtype=torch.float64)
            hidden = torch.rand(shape[:3], generator=generator) < blind
            out = torch.randn(shape, generator=generator, dtype=torch.float64)
            inputs[f"out_{side}"] = out.masked_fill(hidden[..., None], 0.0)
            inputs[f"lse_{side}"] = lse.masked_fill(hidden, -torch.inf)
        return inputs

    return make


def _cost(inputs: Inputs, backward: bool) -> Cost:
    out = inputs["out_a"]
    moved = 3 * out.numel() * out.element_size() + 3 * inputs["lse_a"].numel() * 4
    return Cost(flops=(8 if backward else 3) * out.numel(), bytes=moved * (3 if backward else 1))


_ALL = ("out_a", "lse_a", "out_b", "lse_b")

SPEC = OpSpec(
    name="merge_attention",
    cases=(
        Case("plain", _make((2, 3, 5, 8)), _ALL),
        Case("some rows see nothing", _make((2, 3, 7, 4), blind=0.5), _ALL),
        Case("no queries", _make((2, 3, 0, 4)), _ALL),
    ),
    benchmarks=(
        Benchmark("resampler", _make((5, 8, 64, 64)), {"B": 5, "H": 8, "Lq": 64, "D": 64}),
        Benchmark("prefill", _make((2, 16, 2048, 64)), {"B": 2, "H": 16, "Lq": 2048, "D": 64}, headline=True),
    ),
    cost=_cost,
    always_wide=frozenset({"lse_a", "lse_b"}),
)
