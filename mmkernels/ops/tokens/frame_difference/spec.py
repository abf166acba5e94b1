"""The definition of frame differences: the naive formula, its cases, its benchmark configurations."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from mmkernels.ops.common.cases import normal
from mmkernels.ops.common.dtypes import wide_dtype
from mmkernels.ops.tokens.cosine import near_one
from mmkernels.runtime.arguments import Sizes
from mmkernels.spec import Benchmark, Case, Cost, Inputs, OpSpec
from mmkernels.targets import BandwidthShare, MemoryRatio, Speedup


class Arguments(NamedTuple):
    """The record of `frame_difference`."""

    x: Tensor  # [tokens, C] or [images, tokens, C]
    grid: Sizes  # t, h, w of each image, one after the other


class Results(NamedTuple):
    """What `frame_difference` returns."""

    difference: Tensor  # [tokens], float32 or float64


def reference(args: Arguments) -> Tensor:
    """Returns [tokens] by the naive formula."""
    x, parts, first = args.x.flatten(0, -2), [], 0
    for at in range(0, len(args.grid), 3):
        frames, *sides = args.grid[at : at + 3]
        tokens = frames * prod(sides)
        parts.append(_differences(x[first : first + tokens].unflatten(0, (frames, prod(sides)))))
        first += tokens
    return torch.cat(parts) if parts else x.new_empty(0, dtype=wide_dtype(x))


def _differences(frames: Tensor) -> Tensor:
    """Returns [t * positions] of [t, positions, C].

    The lengths of both rows are one square root: of equal rows it is their product without rounding, so they differ by
    exactly 0.
    """
    rows = near_one(frames)
    squares, products = (rows * rows).sum(-1), (rows[1:] * rows[:-1]).sum(-1)
    length = (squares[1:] * squares[:-1]).sqrt()
    changes = 1 - torch.where(length == 0, 0.0, products / length)
    return torch.cat([torch.full_like(squares[:1], torch.inf), changes]).flatten()


# Cases.


def _video(g: Generator, frames: int, positions: int, dim: int) -> Tensor:
    """A video [frames * positions, dim]: each token is a little different from the one before, some are the same."""
    first = normal(g, 1, positions, dim)
    moves = (torch.rand(frames, positions, 1, generator=g) < 0.6).double() * normal(g, frames, positions, dim)
    return (first + 0.3 * moves.cumsum(0)).flatten(0, 1)


def _inputs(g: Generator, dim: int, grid: Any, images: int = 0) -> Inputs:
    sizes = (grid,) * images if images else grid
    x = torch.cat([_video(g, t, h * w, dim) for t, h, w in sizes]) if sizes else torch.zeros(0, dim).double()
    return {"x": x.unflatten(0, (images, prod(grid))) if images else x, "grid": grid}


def _case(id: str, dim: int, grid: Any, images: int = 0) -> Case:
    return Case(id, lambda g: _inputs(g, dim, grid, images))


def _odd_rows(g: Generator) -> Inputs:
    """Rows of zeros, rows that are not finite, and rows whose squares are no float32 (in float16: far from 1)."""
    x = normal(g, 5, 12, 20)
    x[1, 0], x[2, 0] = 0, 0
    x[1, 1, 3], x[3, 2, 0], x[0, 3, 5] = torch.nan, torch.inf, -torch.inf
    x[:, 4:8] *= torch.tensor([1e-4, 1e4, 1e-4, 1e4, 1e4])[:, None, None]
    return {"x": x.flatten(0, 1), "grid": ((5, 3, 4),)}


def _cost(inputs: Inputs, backward: bool) -> Cost:
    """Each element is read once; it is multiplied with itself and with the one before it."""
    x = inputs["x"]
    return Cost(4.0 * x.numel(), float(x.numel() * x.element_size() + 4 * x.numel() // x.shape[-1]))


def _benchmark(
    id: str, dim: int, grid: tuple[Sizes, ...], make: Callable[[Generator], Inputs] | None = None, **more: Any
) -> Benchmark:
    params = {"videos": len(grid), "tokens": sum(map(prod, grid)), "C": dim}
    return Benchmark(id, make or (lambda g: _inputs(g, dim, grid)), params, **more)


SPEC = OpSpec(
    name="frame_difference",
    cases=(
        _case("videos and an image", 24, ((4, 2, 3), (1, 2, 2), (3, 1, 5))),
        _case("videos of one size", 33, (3, 2, 4), images=2),
        _case("audio frames", 16, ((9, 1, 1), (2, 1, 1))),
        _case("one channel", 1, ((4, 2, 2),)),
        _case("more than a tile", 70, ((2, 9, 11), (6, 3, 3))),
        _case("no images", 6, ()),
        Case("odd rows", _odd_rows),
    ),
    cost=_cost,
    benchmarks=(
        _benchmark(
            "64 frames of 14 x 14", 1152, ((64, 14, 14),), headline=True,
            targets=(
                Speedup("fp32", False, 2.0, "EVS"),
                MemoryRatio("fp32", False, 1.0, "EVS"),
                Speedup("bf16", False, 2.0, "EVS"),
                BandwidthShare("bf16", False, 0.8, device="gpu"),
            ),
        ),
        _benchmark(
            "8 videos of 16 frames of 16 x 16", 1024, ((16, 16, 16),) * 8, devices=("cpu",),
            targets=(Speedup("fp32", False, 2.0, "EVS"),),
        ),
        _benchmark(
            "4 frames of 8 x 8", 1024, ((4, 8, 8),), devices=("cpu",), targets=(Speedup("fp32", False, 1.0, "EVS"),)
        ),
    ),
)  # fmt: skip
