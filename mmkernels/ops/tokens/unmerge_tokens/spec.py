"""The definition of unmerging: rows by their numbers, its cases, its benchmark configurations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from mmkernels.ops.common.cases import normal
from mmkernels.ops.common.dtypes import wide_dtype
from mmkernels.ops.tokens.groups import group_sums
from mmkernels.runtime.arguments import Differentiable
from mmkernels.runtime.checks import check_range
from mmkernels.spec import Benchmark, Case, Cost, Inputs, OpSpec


class Arguments(NamedTuple):
    """The record of `unmerge_tokens`."""

    x: Differentiable  # [N', C]
    assignment: Tensor  # int64 [N]


class Results(NamedTuple):
    """What `unmerge_tokens` returns."""

    tokens: Differentiable  # [N, C]


def reference(args: Arguments) -> Tensor:
    """The naive formula."""
    check_range("assignment", args.assignment, 0, len(args.x) - 1)
    return args.x[args.assignment]


def formula(args: Any) -> tuple[Tensor]:
    """Returns the output for a backward record."""
    return (args.x[args.assignment],)


def reference_backward(args: Any) -> Tensor:
    """Returns the gradient of x: the sum over each row's tokens."""
    flow: Tensor = args.grad_tokens
    return group_sums(flow.to(wide_dtype(flow)), args.assignment, len(args.x)).to(flow.dtype)


def _inputs(g: Generator, rows: int, tokens: int, channels: int) -> Inputs:
    return {"x": normal(g, rows, channels), "assignment": torch.randint(max(rows, 1), (tokens,), generator=g)}


def _case(id: str, rows: int, tokens: int, channels: int) -> Case:
    return Case(id, lambda g: _inputs(g, rows, tokens, channels), ("x",))


def _batched(g: Generator) -> Inputs:
    return {"x": normal(g, 3, 11, 24), "assignment": torch.randint(33, (3, 40), generator=g)}


def _cost(inputs: Inputs, backward: bool) -> Cost:
    x, tokens = inputs["x"], inputs["assignment"].numel()
    moved = float(x.element_size() * (x.numel() + tokens * x.shape[-1]))
    return Cost(float(tokens * x.shape[-1]) if backward else 0.0, moved * (2 if backward else 1))


def _benchmark(rows: int, tokens: int, channels: int) -> Callable[[Generator], Inputs]:
    return lambda g: _inputs(g, rows, tokens, channels)


SPEC = OpSpec(
    name="unmerge_tokens",
    cases=(
        _case("a few", 5, 9, 8),
        _case("odd channels", 40, 70, 73),
        _case("one row for all", 1, 50, 130),
        _case("no token", 4, 0, 8),
        Case("images of one size", _batched, ("x",)),
    ),
    cost=_cost,
    benchmarks=(
        Benchmark(
            "4,096 tokens of 2,048",
            _benchmark(2048, 4096, 1024),
            {"N": 4096, "rows": 2048, "C": 1024},
            grads=("x",),
            headline=True,
        ),
        Benchmark("256 tokens of 128", _benchmark(128, 256, 1024), {"N": 256, "rows": 128, "C": 1024}, grads=("x",)),
    ),
)
