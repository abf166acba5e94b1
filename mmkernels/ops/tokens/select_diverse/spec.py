"""The definition of diverse selection: the naive formulas, its cases, its benchmark configurations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from mmkernels.ops.common.cases import normal
from mmkernels.ops.common.dtypes import wide_dtype
from mmkernels.ops.tokens.cosine import unit_rows
from mmkernels.runtime.arguments import Sizes
from mmkernels.spec import Benchmark, Case, Cost, Inputs, OpSpec
from mmkernels.targets import ExtraMemory, Speedup

NOTHING_NEW = 1e-5
"""What a token adds at least, of its squared length or of the largest distance; less counts as nothing, as rounding."""


class Arguments(NamedTuple):
    """The record of `select_diverse`."""

    x: Tensor  # [tokens, C]
    quality: Tensor | None  # float32 or float64 [tokens]
    lengths: Sizes  # of each image
    keep: Sizes  # of each image
    method: str


class Results(NamedTuple):
    """What `select_diverse` returns."""

    places: Tensor  # int64 [sum of keep]


def images_of(args: Arguments) -> Iterator[tuple[int, int, int]]:
    """Gives each image's first token, the one behind its last, and how many are kept."""
    first = 0
    for length, keep in zip(args.lengths, args.keep, strict=True):
        yield first, first + length, keep
        first += length


def directions(args: Arguments, first: int, last: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns an image's tokens scaled to length 1, 0 where they have none; their qualities; which of them count.

    A token that is not finite, or whose quality is not, does not count: it is chosen after all others.
    """
    rows = args.x[first:last].to(wide_dtype(args.x))
    quality = torch.ones_like(rows[:, 0]) if args.quality is None else args.quality[first:last].to(rows.dtype)
    counts = rows.isfinite().all(1) & quality.isfinite()
    return unit_rows(rows.where(counts[:, None], 0)), quality.where(counts, 0), counts


def reference(args: Arguments) -> Tensor:
    """Returns the kept tokens, int64 [sum of keep], by the formulas of the papers, with every similarity in memory."""
    select = _by_determinant if args.method == "determinant" else _by_distance
    found = [first + select(*directions(args, first, last), keep) for first, last, keep in images_of(args) if keep]
    return torch.cat(found) if found else args.x.new_empty(0, dtype=torch.int64)


def _by_determinant(rows: Tensor, quality: Tensor, counts: Tensor, keep: int) -> Tensor:
    """Greedy maximisation of a determinant: Chen et al. 2018, algorithm 1."""
    kernel = quality[:, None] * (rows @ rows.mT) * quality
    gains = squared_lengths(rows, quality)
    least = NOTHING_NEW * gains
    values = _ranked(gains, least, counts)
    factors = rows.new_zeros(keep, len(rows))
    found = []
    for step in range(keep):
        best = int(values.argmax())
        found.append(best)
        if float(values[best]) > 0:
            factors[step] = (kernel[best] - factors[:step, best] @ factors[:step]) / gains[best].sqrt()
            gains -= factors[step] ** 2
        values = _ranked(gains, least, counts)
        values[found] = -2
    return torch.tensor(found, device=rows.device)


def squared_lengths(rows: Tensor, quality: Tensor) -> Tensor:
    """Returns the squared lengths of directions times qualities, without rounding: equal qualities must stay equal."""
    return (quality * quality).where((rows != 0).any(1), 0)


def symmetric(rows: Tensor, others: Tensor) -> Tensor:
    """Returns inner products that are the same from either side: tokens that are nearest to each other must tie."""
    return torch.maximum(rows @ others.mT, (others @ rows.mT).mT)


def _by_distance(rows: Tensor, quality: Tensor, counts: Tensor, keep: int) -> Tensor:
    """Greedy maximisation of the least distance: Alvar et al. 2025, algorithm 1."""
    apart = 1 - symmetric(rows, rows)
    apart.masked_fill_(~counts, 2.0)  # distance from one that does not count
    nearest = apart.clone().fill_diagonal_(torch.inf).amin(1) if len(rows) > 1 else rows.new_ones(1)
    found: list[int] = []
    for _ in range(keep):
        values = _ranked(nearest, torch.full_like(nearest, NOTHING_NEW), counts)
        values[found] = -2
        best = int(values.argmax())
        nearest = torch.minimum(nearest, apart[:, best]) if found else apart[:, best].clone()
        found.append(best)
    return torch.tensor(found, device=rows.device)


def _ranked(gains: Tensor, least: Tensor, counts: Tensor) -> Tensor:
    """Returns gains with 0 for those that are at most `least`, and -1 for tokens that don't count."""
    return gains.where(gains > least, 0).where(counts, -1)


def check_method(method: str) -> None:
    if method not in ("determinant", "distance"):
        raise ValueError(f"method must be determinant or distance, got {method!r}")


def _images(g: Generator, lengths: Sizes, dim: int) -> Tensor:
    """Tokens as images have them: a few things, each seen by many tokens that are alike, and a common direction."""
    things = normal(g, 7, dim)
    which = torch.randint(7, (sum(lengths),), generator=g)
    return things[which] + 0.5 * normal(g, sum(lengths), dim) + 0.5 * normal(g, 1, dim)


def _case(id: str, lengths: Sizes, keep: Sizes, dim: int, method: str, *, quality: bool = False) -> Case:
    def make(g: Generator) -> Inputs:
        inputs: Inputs = {"x": _images(g, lengths, dim), "lengths": lengths, "keep": keep, "method": method}
        if quality:
            inputs["quality"] = 0.1 + torch.rand(sum(lengths), generator=g, dtype=torch.float64)
        return inputs

    return Case(id, make)


def _alike(method: str) -> Callable[[Generator], Inputs]:
    """Equal tokens, tokens of length 0, tokens that are not finite, and more kept than there are different ones."""

    def make(g: Generator) -> Inputs:
        x = torch.eye(6, 8, dtype=torch.float64)[torch.tensor([0, 0, 1, 2, 2, 3, 0, 4, 5, 5])]
        x[3] *= 4  # of the same direction as another one
        x[5] = 0
        x[7, 2], x[8, 1] = torch.nan, torch.inf
        return {"x": x, "lengths": (10,), "keep": (9,), "method": method}

    return make


def _twice(g: Generator) -> Inputs:
    """Each token twice: no token is apart from its nearest one."""
    return {"x": _images(g, (6,), 8).repeat(2, 1), "lengths": (12,), "keep": (9,), "method": "distance"}


def _cost(inputs: Inputs, backward: bool) -> Cost:
    """Of a token compared with every chosen one, the tokens read once."""
    x = inputs["x"].reshape(-1, inputs["x"].shape[-1])
    kept = inputs["keep"] if isinstance(inputs["keep"], int) else max(inputs["keep"])
    return Cost(2.0 * x.numel() * kept, float(x.numel() * x.element_size()))


def _benchmark(tokens: int, dim: int, keep: int, method: str) -> Callable[[Generator], Inputs]:
    def make(g: Generator) -> Inputs:
        inputs: Inputs = {
            "x": _images(g, (tokens,), dim).to(g.device, torch.float32),
            "lengths": (tokens,),
            "keep": (keep,),
            "method": method,
        }
        if method == "determinant":
            inputs["quality"] = torch.rand(tokens, generator=g, device=g.device)
        return inputs

    return make


SPEC = OpSpec(
    name="select_diverse",
    cases=(
        _case("determinant, three images", (40, 1, 9), (6, 1, 0), 24, "determinant"),
        _case("determinant, with qualities", (40, 15), (7, 4), 33, "determinant", quality=True),
        _case("distance, three images", (40, 1, 9), (5, 1, 3), 24, "distance"),
        _case("distance, odd sizes", (67,), (7,), 13, "distance"),
        _case("two channels", (9,), (3,), 2, "distance"),
        _case("no image", (), (), 4, "determinant"),
        Case("determinant, tokens that are alike", _alike("determinant")),
        Case("distance, tokens that are alike", _alike("distance")),
        Case("distance, each token twice", _twice),
    ),
    cost=_cost,
    benchmarks=(
        Benchmark(
            "determinant, 2,880 tokens", _benchmark(2880, 1024, 320, "determinant"),
            {"tokens": 2880, "C": 1024, "keep": 320}, headline=True,
            targets=(
                *(Speedup(dtype, False, 2.0, "naive") for dtype in ("fp32", "bf16")),
                ExtraMemory("fp32", False, 4.0),
            ),
        ),
        Benchmark(
            "distance, 2,880 tokens", _benchmark(2880, 1024, 320, "distance"),
            {"tokens": 2880, "C": 1024, "keep": 320}, targets=(Speedup("fp32", False, 2.0, "naive"),),
        ),
        Benchmark(
            "one image of 256", _benchmark(256, 1024, 64, "determinant"), {"tokens": 256, "C": 1024, "keep": 64},
            targets=(Speedup("fp32", False, 1.0, "naive"),),
        ),
    ),
    always_wide=frozenset({"quality"}),
)  # fmt: skip
