"""The definition of retrieval ranks: the naive formula, its cases, its benchmark configurations."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from mmkernels.ops.contrastive import parts
from mmkernels.ops.contrastive.cases import features
from mmkernels.ops.contrastive.formula import count_before, ranks
from mmkernels.runtime.checks import check_range
from mmkernels.spec import Benchmark, Case, Cost, Inputs, OpSpec
from mmkernels.targets import ExtraMemory, PeakShare


class Arguments(NamedTuple):
    """The record of `retrieval_ranks`."""

    query: Tensor  # [N, d]
    gallery: Tensor  # [M, d]
    target: Tensor  # int64 [N]


class Results(NamedTuple):
    """What `retrieval_ranks` returns."""

    ranks: Tensor  # int64 [N]


def reference(args: Arguments) -> Tensor:
    """Returns int64 [N] by the naive formula."""
    check_range("target", args.target, 0, len(args.gallery) - 1)
    return ranks_of(args.query @ args.gallery.mT, args.target)


def ranks_of(scores: Tensor, target: Tensor) -> Tensor:
    """Returns the ranks of some queries, int64 [rows]. A NaN target ranks last, other NaN before nothing.

    A target outside of the gallery has the rank M: on a GPU targets are not checked.

    Args:
        scores: [rows, M].
        target: int64 [rows].
    """
    items = scores.shape[1]
    inside = target.clamp(0, items - 1)
    best = scores.gather(1, inside[:, None])[:, 0]
    before = count_before(scores, best, inside, torch.ones_like(scores, dtype=torch.bool))
    return torch.where(inside == target, ranks(before, best, items - 1), items)


def before_of(scores: Tensor, best: Tensor, index: Tensor) -> Tensor:
    """Returns how many items of a piece stand before the right answers, int64 [rows]; -1 where one's score is NaN.

    Args:
        scores: [rows, M].
        best: [rows], the right answer's score.
        index: int64 [rows], its place relative to the piece's first item.
    """
    others = torch.arange(scores.shape[1], device=scores.device) != index[:, None]
    return torch.where(best.isnan(), -1, count_before(scores, best, index, others))


def _case(id: str, n: int, m: int, dim: int) -> Case:
    return Case(id, lambda g: _inputs(g, n, m, dim))


def _inputs(g: Generator, n: int, m: int, dim: int) -> Inputs:
    gallery = features(g, m, dim)
    target = torch.randint(m, (n,), generator=g)
    return {"query": gallery[target] + 0.5 * features(g, n, dim), "gallery": gallery, "target": target}


def _ties(g: Generator) -> Inputs:
    """Small integers, whose products are exact in every dtype: most scores occur many times."""
    query, gallery = (torch.randint(-2, 3, (n, 6), generator=g).double() for n in (40, 90))
    return {"query": query, "gallery": gallery, "target": torch.randint(90, (40,), generator=g)}


def _cost(inputs: Inputs, backward: bool) -> Cost:
    query, gallery = inputs["query"], inputs["gallery"]
    return Cost(2.0 * query.numel() * gallery.shape[0], float(query.element_size() * (query.numel() + gallery.numel())))


def _benchmark(n: int, dim: int) -> Callable[[Generator], Inputs]:
    return lambda g: _inputs(g, n, n, dim)


SPEC = OpSpec(
    name="retrieval_ranks",
    cases=(
        _case("a few", 9, 30, 16),
        _case("one of one", 1, 1, 8),
        _case("more than a tile", 150, 333, 72),
        _case("odd sizes", 71, 13, 13),
        Case("ties", _ties),
    ),
    cost=_cost,
    benchmarks=(
        Benchmark("a gallery of 8,192", _benchmark(8192, 512), {"N": 8192, "M": 8192, "d": 512}, headline=True),
        Benchmark(
            "a gallery of 50,000",
            _benchmark(50_000, 512),
            {"N": 50_000, "M": 50_000, "d": 512},
            targets=(PeakShare("fp32", False, 0.6), ExtraMemory("fp32", False, 100.0)),
        ),
    ),
    parts=parts.RANKS,
)
