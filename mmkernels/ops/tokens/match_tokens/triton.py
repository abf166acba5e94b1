"""Bipartite soft matching in Triton: the best partner of each token by tiles, then what merges by two sorts."""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.ops.common.triton.constants import INFINITY
from mmkernels.ops.common.triton.launch import precision
from mmkernels.ops.tokens.keep import Round, sides
from mmkernels.ops.tokens.match_tokens.spec import WORST, Arguments, in_rounds
from mmkernels.ops.tokens.triton.cosine import row_products
from mmkernels.ops.tokens.triton.groups import group_means, groups_of
from mmkernels.runtime.arguments import Sizes
from mmkernels.runtime.triton import launch
from mmkernels.runtime.tuning import config

OP = "match_tokens"
_STEP_BYTES = 128  # of a row in one step of a product
_NO_ROW = tl.constexpr(2**30)


@triton.jit
def best_kernel(
    rows, inverse, tiles, best, partner, dim, even, odd, worst,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store for some tokens at even places the largest cosine with one at an odd place, and that token. Grid: (tiles,).

    Args:
        rows: [N, dim], near length 1.
        inverse: float32 [N], 1 / their lengths; NaN for a row that was not finite.
        tiles: int32 [tiles, 3]: an image's first token, its length, and the first of the tile's tokens at even places.
        even, odd: the first places of either kind.
        worst: in place of NaN.
    """
    first = tl.load(tiles + tl.program_id(0) * 3)
    length = tl.load(tiles + tl.program_id(0) * 3 + 1)
    i = even + 2 * (tl.load(tiles + tl.program_id(0) * 3 + 2) + tl.arange(0, BLOCK_Q))
    live = i < length
    i = first + tl.minimum(i, length - 1)
    x_rows = rows + i.to(tl.int64) * dim
    top = tl.full([BLOCK_Q], -INFINITY, tl.float32)
    who = tl.zeros([BLOCK_Q], tl.int32)
    for start in range(0, (length - odd + 1) // 2, BLOCK_K):
        b = start + tl.arange(0, BLOCK_K)
        exists = odd + 2 * b < length
        j = first + tl.minimum(odd + 2 * b, length - 1)
        y_rows = rows + j.to(tl.int64) * dim
        dots = row_products(x_rows, y_rows, live, exists, 1, 1, dim, BLOCK_Q, BLOCK_K, BLOCK_D, PRECISION)
        cosines = dots * tl.load(inverse + j)[None, :]
        cosines = tl.where(exists[None, :] & (cosines == cosines), cosines, -INFINITY)
        tile_top = tl.max(cosines, 1)
        tile_who = tl.min(tl.where(cosines == tile_top[:, None], b[None, :], _NO_ROW), 1)  # the first of equal ones
        more = tile_top > top
        top = tl.where(more, tile_top, top)
        who = tl.where(more, tile_who, who)
    scale = tl.load(inverse + i)
    finite = scale == scale
    top = tl.where(finite & (top > -INFINITY), top * scale, worst)
    who = tl.where(finite, who, 0)
    tl.store(best + i, top, mask=live)
    tl.store(partner + i, (first + odd + 2 * who).to(tl.int64), mask=live)


def forward(args: Arguments) -> Tensor:
    """Returns int64 [N]."""
    return in_rounds(args, _match, _means)


def _means(x: Tensor, sizes: Tensor | None, group: Tensor, count: int) -> tuple[Tensor, Tensor]:
    plan = config(OP, "sum", x.device, x.dtype, x.shape[1])
    return group_means(x, sizes, groups_of(group, count), torch.float32, plan)


def _match(metric: Tensor, step: Round, protect: int) -> Tensor:
    """Returns the assignment of one round."""
    dim, device = metric.shape[1], metric.device
    plan = config(OP, "best", device, metric.dtype, dim)
    rows, inverse = _near_one(metric)
    best = torch.full_like(inverse, -torch.inf)
    root = torch.arange(metric.shape[0], device=device)
    partner = root.clone()
    tables = _tables(tuple(step.lengths), step.merges, protect, plan.block_q, device)
    launch(
        best_kernel, (tables.tiles.shape[0],), plan,
        rows, inverse, tables.tiles, best, partner, dim, protect + protect % 2, protect + 1 - protect % 2, WORST,
        BLOCK_Q=plan.block_q, BLOCK_K=plan.block_k, PRECISION=precision(rows.dtype),
        BLOCK_D=min(max(16, triton.next_power_of_2(dim)), _STEP_BYTES // rows.element_size()),
    )  # fmt: skip
    # The tokens by image, in each the most similar first: two stable sorts. Those that merge are the first of each.
    order = best.argsort(descending=True, stable=True)
    order = order[tables.image[order].argsort(stable=True)]
    gone = torch.empty_like(root, dtype=torch.bool)
    gone[order] = root < tables.end
    return (torch.cumsum(~gone, 0) - 1)[torch.where(gone, partner, root)]


class _Tables(NamedTuple):
    """What follows from sizes alone.

    Args:
        tiles: as `best_kernel` says.
        image: int64 [N], of each token.
        end: int64 [N], of each token's image: its first token plus how many merge.
    """

    tiles: Tensor
    image: Tensor
    end: Tensor


@lru_cache(maxsize=64)
def _tables(lengths: Sizes, merges: Sizes, protect: int, rows: int, device: torch.device) -> _Tables:
    """Returns tables that are kept: a copy to the device would not be captured into a CUDA graph."""
    starts = [*accumulate(lengths, initial=0)][:-1]
    tiles = [
        (start, length, a)
        for start, length, count in zip(starts, lengths, merges, strict=True)
        for a in range(0, sides(length, protect)[0] if count else 0, rows)
    ]
    image = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    end = torch.tensor([start + count for start, count in zip(starts, merges, strict=True)])[image]
    return _Tables(torch.tensor(tiles, dtype=torch.int32, device=device), image.to(device), end.to(device))


def _near_one(metric: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the rows, each times a power of two, in metric's dtype, and 1 / their lengths, see `best_kernel`."""
    wide = metric.to(torch.float32)
    largest = wide.abs().amax(1, keepdim=True) if wide.shape[1] else wide.new_zeros(len(wide), 1)
    finite = largest.isfinite()
    wide = torch.where(finite, torch.ldexp(wide, -torch.frexp(torch.where(finite, largest, 1.0)).exponent), 0.0)
    length = torch.linalg.vector_norm(wide, dim=1)
    inverse = torch.where(finite[:, 0], torch.where(length > 0, 1 / length, 0.0), torch.nan)
    return wide.to(metric.dtype).contiguous(), inverse
