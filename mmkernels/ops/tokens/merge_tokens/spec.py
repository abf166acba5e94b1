"""The definition of merged tokens: the naive formula, its cases, its benchmark configurations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from mmkernels.ops.common.cases import normal
from mmkernels.ops.tokens.groups import group_means, group_sums
from mmkernels.ops.tokens.match_tokens.spec import alike, packed, similarity_flops
from mmkernels.runtime.arguments import Differentiable, Sizes
from mmkernels.spec import Benchmark, Case, Cost, Inputs, OpSpec
from mmkernels.targets import ExtraMemory, Speedup


class Arguments(NamedTuple):
    """The record of `merge_tokens`."""

    x: Differentiable  # [N, C]
    sizes: Differentiable | None  # [N], in the wide dtype
    assignment: Tensor  # int64 [N]
    kept: Sizes  # the tokens of each image that are left


class Results(NamedTuple):
    """What `merge_tokens` returns."""

    merged: Differentiable  # [N', C]
    merged_sizes: Differentiable  # [N'], in the wide dtype


def reference(args: Arguments) -> tuple[Tensor, Tensor]:
    """The naive formula."""
    means, total = group_means(args.x, args.sizes, args.assignment, sum(args.kept))
    return means.to(args.x.dtype), total


def formula(args: Any) -> tuple[Tensor, ...]:
    """Returns the outputs for a backward record."""
    return reference(args)


def reference_backward(args: Any) -> tuple[Tensor, Tensor]:
    """Returns the gradients of x and sizes.

    With s the sizes, S their sums, g the groups and y the means: d x_i = s_i / S_g(i) d y_g(i), and
    d s_i = d y_g(i) . (x_i - y_g(i)) / S_g(i) + d S_g(i).
    """
    x, group, total = args.x, args.assignment, args.merged_sizes
    weights = (torch.ones_like(total[group]) if args.sizes is None else args.sizes) / total[group]
    grad_x, grad_sizes, flow = x.new_empty(0), x.new_empty(0), args.grad_merged
    if args.need_x:
        grad_x = torch.zeros_like(x, memory_format=torch.contiguous_format)
        if flow is not None:
            grad_x = (flow[group].to(total.dtype) * weights[:, None]).to(x.dtype)
    if args.need_sizes:
        grad_sizes = torch.zeros_like(weights) if args.grad_merged_sizes is None else args.grad_merged_sizes[group]
        if flow is not None:
            dots = (flow[group].to(total.dtype) * x.to(total.dtype)).sum(1)
            grad_sizes = grad_sizes + (dots - group_sums(weights * dots, group, len(total))[group]) / total[group]
    return grad_x, grad_sizes


# Cases.


def _inputs(
    g: Generator,
    lengths: tuple[int, ...],
    keep: Any,
    channels: int,
    metric: int = 16,
    protect: int = 0,
    sizes: bool = False,
) -> Inputs:
    inputs: Inputs = {"x": normal(g, sum(lengths), channels), "lengths": lengths, "keep": keep, "protect": protect}
    inputs["metric"] = packed(g, lengths, metric, protect)
    if sizes:
        inputs["sizes"] = torch.randint(1, 5, (sum(lengths),), generator=g).double()
    return inputs


def _case(
    id: str, lengths: tuple[int, ...], keep: Any, channels: int, grads: tuple[str, ...] = ("x",), **more: Any
) -> Case:
    return Case(id, lambda g: _inputs(g, lengths, keep, channels, **more), grads)


def _own_metric(g: Generator) -> Inputs:
    return {"x": packed(g, (21, 50), 33, 1), "lengths": (21, 50), "keep": 0.5, "protect": 1}


def _batched(g: Generator) -> Inputs:
    x = normal(g, 3, 33, 24)
    metric = torch.stack([alike(g, 33, 20, 1) for _ in range(3)])
    sizes = torch.randint(1, 5, (3, 33), generator=g).double()
    return {"x": x, "lengths": 33, "keep": 20, "metric": metric, "sizes": sizes, "protect": 1}


def _given(g: Generator) -> Inputs:
    parts = [  # of each image, in any order and with no empty group
        first + torch.cat([torch.randperm(kept, generator=g), torch.randint(kept, (tokens - kept,), generator=g)])
        for first, kept, tokens in ((0, 5, 20), (5, 6, 31))
    ]
    sizes = 0.5 + torch.rand(51, generator=g).double()
    return {"x": normal(g, 51, 70), "lengths": (20, 31), "keep": (5, 6), "assignment": torch.cat(parts), "sizes": sizes}


def _cost(inputs: Inputs, backward: bool) -> Cost:
    """Forward: x is read, x' is written. Backward: its gradient is read, that of x is written."""
    x = inputs["x"]
    flops = 0.0 if "assignment" in inputs else similarity_flops(inputs | {"metric": inputs.get("metric", x)})
    share = inputs["keep"] if isinstance(inputs["keep"], float) else 1.0
    moved = x.numel() * x.element_size() * (1.0 + share)
    return Cost(flops + 2.0 * x.numel() * (2 if backward else 1), moved * (2 if backward else 1))


def _benchmark(lengths: tuple[int, ...], keep: float, protect: int = 0) -> Callable[[Generator], Inputs]:
    return lambda g: _inputs(g, lengths, keep, 1024, metric=64, protect=protect)


SPEC = OpSpec(
    name="merge_tokens",
    cases=(
        _case("some of two images", (40, 27), (30, 20), 72),
        _case("several rounds with sizes", (50, 7, 0, 1), (9, 7, 0, 1), 130, ("x", "sizes"), metric=40, sizes=True),
        Case("x is the metric", _own_metric, ("x",)),
        Case("images of one size", _batched, ("x", "sizes")),
        Case("an assignment that is given", _given, ("x", "sizes")),
    ),
    cost=_cost,
    benchmarks=(
        Benchmark(
            "4,096 tokens, half of them",
            _benchmark((4096,), 0.5),
            {"N": 4096, "C": 1024, "D": 64, "keep": 0.5},
            targets=(
                Speedup("fp32", False, 3.0, "formula"),
                Speedup("bf16", False, 3.0, "formula"),
                ExtraMemory("fp32", False, 20.0),
            ),
            headline=True,
        ),
        Benchmark(
            "32 images of 577 tokens, a class token",
            _benchmark((577,) * 32, 0.6, protect=1),
            {"images": 32, "tokens": 577, "C": 1024, "D": 64, "keep": 0.6},
            grads=("x",),
        ),
        Benchmark(
            "one image of 256 tokens",
            _benchmark((256,), 0.5),
            {"N": 256, "C": 1024, "D": 64, "keep": 0.5},
            targets=(Speedup("fp32", False, 1.0, "formula"),),
        ),
    ),
    always_wide=frozenset({"sizes"}),
)
