"""The definition of bipartite soft matching: the naive formula, its cases, its benchmark configurations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from mmkernels.ops.common.cases import normal
from mmkernels.ops.common.dtypes import wide_dtype
from mmkernels.ops.tokens.cosine import unit_rows
from mmkernels.ops.tokens.groups import group_means
from mmkernels.ops.tokens.keep import Round, check_keep, rounds_of, sides
from mmkernels.runtime.arguments import Sizes
from mmkernels.spec import Benchmark, Case, Cost, Inputs, OpSpec
from mmkernels.targets import ExtraMemory, PeakShare

WORST = -2.0
"""Stands for a similarity that is NaN: below every cosine."""


class Arguments(NamedTuple):
    """The record of `match_tokens`."""

    metric: Tensor  # [N, D]
    sizes: Tensor | None  # [N], in the wide dtype of the metric
    lengths: Sizes  # the tokens of each image
    kept: Sizes  # how many of them are kept
    protect: int  # how many at the front of each image take no part


class Results(NamedTuple):
    """What `match_tokens` returns."""

    assignment: Tensor  # int64 [N]


def reference(args: Arguments) -> Tensor:
    """Returns int64 [N] by the naive formula."""
    return in_rounds(args, _naive)


def in_rounds(
    args: Arguments,
    match: Callable[[Tensor, Round, int], Tensor],
    means: Callable[[Tensor, Tensor | None, Tensor, int], tuple[Tensor, Tensor]] = group_means,
) -> Tensor:
    """Returns int64 [N]: the assignments of all rounds, one applied after the other.

    Args:
        match: metric, round, protect -> the assignment of one round.
        means: what `group_means` returns.
    """
    metric, sizes = args.metric, args.sizes
    found: list[Tensor] = []
    for step in rounds_of(args.lengths, args.kept, args.protect):
        if found:  # tokens are compared as they are by now, unrounded
            metric, sizes = means(metric.to(wide_dtype(metric)), sizes, found[-1], sum(step.lengths))
        found.append(match(metric, step, args.protect))
    if not found:
        return torch.arange(args.metric.shape[0], device=metric.device)
    return reduce(lambda assignment, latest: latest[assignment], found)


def _naive(metric: Tensor, step: Round, protect: int) -> Tensor:
    return match_images(metric, step, protect, lambda a, b: nan_is_worst(a @ b.mT).max(1))


def match_images(
    metric: Tensor, step: Round, protect: int, best_of: Callable[[Tensor, Tensor], Sequence[Tensor]]
) -> Tensor:
    """Returns the assignment of one round, image by image.

    Args:
        metric: [N, D].
        best_of: unit rows [a, D], unit rows [b, D] -> the largest cosine of each row a with a row b, and that row's
            number, the lowest of those that have it.
    """
    images, found, start = unit_rows(metric).split(step.lengths), [], 0
    for rows, length, merges in zip(images, step.lengths, step.merges, strict=True):
        at = torch.arange(length, device=metric.device)
        root = at.clone()
        if merges:
            even, odd = protect + protect % 2, protect + 1 - protect % 2
            best, partner = best_of(rows[even::2], rows[odd::2])
            gone = best.argsort(descending=True, stable=True)[:merges]
            root[even + 2 * gone] = odd + 2 * partner[gone]
        stays = root == at
        found.append(start + (stays.cumsum(0) - 1)[root])
        start += length - merges
    return torch.cat(found) if found else torch.arange(0, device=metric.device)


def nan_is_worst(scores: Tensor) -> Tensor:
    """Returns the scores with `WORST` in place of NaN."""
    return torch.where(scores.isnan(), WORST, scores)


# Cases.


def alike(g: Generator, length: int, dim: int, protect: int = 0) -> Tensor:
    """Returns a metric [length, dim] in which rounding changes no match.

    Each token at an even place is near one of those at odd places, at an angle of its own, and so again among the
    tokens that are left when all at even places are merged.
    """
    rows = normal(g, length, dim)
    a, b = sides(length, protect)
    if length - protect < 2 or not a:
        return rows
    even, odd = protect + protect % 2, protect + 1 - protect % 2
    front = rows[:protect]
    among = alike(g, protect + b, dim, protect)[protect:]
    partner = torch.randint(b, (a,), generator=g)
    target = torch.nn.functional.normalize(among[partner], dim=1)
    away = rows[even::2]
    away = away - (away * target).sum(1, keepdim=True) * target
    angle = 0.1 + 0.4 * (torch.randperm(a, generator=g).double() + 0.2 * torch.rand(a, generator=g)) / a
    near = angle.cos()[:, None] * target + angle.sin()[:, None] * torch.nn.functional.normalize(away, dim=1)
    rows = rows.clone()
    rows[:protect], rows[odd::2], rows[even::2] = front, among, near * among[partner].norm(dim=1, keepdim=True)
    return rows


def packed(g: Generator, lengths: Sequence[int], dim: int, protect: int = 0) -> Tensor:
    """Returns the metric of several images, [tokens, dim]."""
    return torch.cat([alike(g, n, dim, protect) for n in lengths]) if lengths else torch.zeros(0, dim).double()


def _inputs(
    g: Generator, lengths: tuple[int, ...], keep: Any, dim: int, protect: int = 0, sizes: bool = False
) -> Inputs:
    inputs: Inputs = {"metric": packed(g, lengths, dim, protect), "lengths": lengths, "keep": keep, "protect": protect}
    if sizes:
        inputs["sizes"] = torch.randint(1, 5, (sum(lengths),), generator=g).double()
    return inputs


def _case(id: str, lengths: tuple[int, ...], keep: Any, dim: int, **more: Any) -> Case:
    return Case(id, lambda g: _inputs(g, lengths, keep, dim, **more))


def _batched(g: Generator) -> Inputs:
    metric = torch.stack([alike(g, 33, 20, 5) for _ in range(3)])
    return {"metric": metric, "lengths": 33, "keep": 20, "protect": 5}


def _ties(g: Generator) -> Inputs:
    """Rows of 16 signs, of length 4: all cosines are multiples of 1/8, most occur many times. Some rows are other."""
    signs = torch.randint(2, (150, 16), generator=g).double() * 2 - 1
    for value, first in ((torch.nan, 4), (0.0, 31), (torch.inf, 77)):
        signs[[first, first + 11, first + 30]] = value
    return {"metric": signs, "lengths": (90, 60), "keep": (70, 41)}


def similarity_flops(inputs: Inputs) -> float:
    """Returns the FLOP of the products of one call of `match_tokens`, all rounds together."""
    metric, lengths, keep = inputs["metric"], inputs["lengths"], inputs["keep"]
    protect = inputs.get("protect", 0)
    lengths = (lengths,) * metric.shape[0] if isinstance(lengths, int) else tuple(lengths)
    kept, flops = check_keep(keep, lengths, least=protect + 1), 0.0
    for step in rounds_of(lengths, kept, protect):
        for length, merges in zip(step.lengths, step.merges, strict=True):
            a, b = sides(length, protect)
            flops += 2.0 * a * b * metric.shape[-1] if merges else 0.0
    return flops


def _cost(inputs: Inputs, backward: bool) -> Cost:
    metric = inputs["metric"]
    return Cost(similarity_flops(inputs), float(metric.numel() * metric.element_size()))


def _benchmark(lengths: tuple[int, ...], keep: float, dim: int, protect: int = 0) -> Callable[[Generator], Inputs]:
    return lambda g: _inputs(g, lengths, keep, dim, protect)


SPEC = OpSpec(
    name="match_tokens",
    cases=(
        _case("some of two images", (40, 27), (30, 20), 24),
        _case("more than a tile", (300, 3), (200, 2), 72),
        _case("several rounds with sizes", (50, 7, 23), (9, 7, 3), 40, sizes=True),
        _case("half, and a class token", (21, 50), 0.5, 33, protect=1),
        _case("down to one", (13, 1, 2, 0), (1, 1, 1, 0), 12),
        _case("nothing to merge", (5, 4), (5, 4), 8),
        Case("images of one size with registers", _batched),
        Case("ties, NaN and zeros", _ties),
    ),
    cost=_cost,
    benchmarks=(
        Benchmark(
            "4,096 tokens, half of them",
            _benchmark((4096,), 0.5, 64),
            {"N": 4096, "D": 64, "keep": 0.5},
            targets=(PeakShare("fp32", False, 0.6), PeakShare("bf16", False, 0.6)),
            headline=True,
        ),
        Benchmark(
            "16,384 tokens, three quarters",
            _benchmark((16384,), 0.75, 64),
            {"N": 16384, "D": 64, "keep": 0.75},
            targets=(PeakShare("fp32", False, 0.6), ExtraMemory("fp32", False, 20.0)),
        ),
        Benchmark(
            "32 images of 577 tokens, a class token",
            _benchmark((577,) * 32, 0.6, 64, 1),
            {"images": 32, "tokens": 577, "D": 64, "keep": 0.6},
        ),
        Benchmark("one image of 256 tokens", _benchmark((256,), 0.5, 64), {"N": 256, "D": 64, "keep": 0.5}),
    ),
    always_wide=frozenset({"sizes"}),
)
