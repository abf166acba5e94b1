"""Retrieval ranks in Triton: the targets' scores, then how many items of each tile of the gallery rank before them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.ops.common.triton.launch import ceil_div
from mmkernels.ops.contrastive.retrieval_ranks.spec import Arguments
from mmkernels.ops.contrastive.triton import call as triton_call
from mmkernels.ops.contrastive.triton.call import Block
from mmkernels.ops.contrastive.triton.tiles import (
    best_dots,
    dots_of_rows,
    position,
    row_lines,
    store_partial,
    tile_corner,
)
from mmkernels.runtime.triton import launch

OP = "retrieval_ranks"


@triton.jit
def target_scores_kernel(query, gallery, target, score, strides, queries, items, TILE: tl.constexpr):
    """Store the score of each query's target. Grid: (tiles of queries,).

    Computes a whole tile of dot products for those on its diagonal: each score is then summed as `ranks_kernel` sums
    it, so that equal rows of the gallery have equal scores to the last bit.
    """
    BLOCK_Q: tl.constexpr = TILE.BLOCK_Q
    BLOCK_K: tl.constexpr = TILE.BLOCK_K
    i = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    scores = tl.zeros([BLOCK_Q], tl.float32)
    for first in range(0, BLOCK_Q, BLOCK_K):
        j = tl.program_id(0) * BLOCK_Q + first + tl.arange(0, BLOCK_K)
        item = tl.load(target + j, mask=j < queries, other=0)
        item = tl.minimum(tl.maximum(item, 0), items - 1)  # the score of a target outside of the gallery is not used
        rows = tl.minimum(i, queries - 1).to(tl.int64)
        dots = dots_of_rows(
            query + rows * strides.image_row * TILE.STRIDE_UNIT,
            gallery + item.to(tl.int64) * strides.text_row * TILE.STRIDE_UNIT,
            TILE,
        )
        scores += tl.sum(tl.where(i[:, None] == j[None, :], dots, 0.0), 1)
    tl.store(score + i, scores, mask=i < queries)


@triton.jit
def ranks_kernel(
    query, gallery, target, score, partials, strides, sizes, FLATTEN_LOOP: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Store how many items of each tile rank before a query's target. Grid: (programs,).

    partials: int32 [tiles across, queries].
    """
    for t in tl.range(tl.program_id(0), sizes.row_tiles * sizes.column_tiles, tl.num_programs(0), flatten=FLATTEN_LOOP):
        corner = tile_corner(t, sizes, TILE)
        dots, _ = best_dots(query, gallery, corner, strides, sizes, TILE)
        at = position(corner, TILE.BLOCK_Q, TILE.BLOCK_K)
        rows = row_lines(at, sizes)
        best = tl.load(score + at.i, mask=rows.live, other=0.0)
        item = tl.load(target + at.i, mask=rows.live, other=0)
        # Equal scores rank by index. The target is clamped to an int32 that is no item if it is outside of the gallery.
        item = tl.minimum(tl.maximum(item, -1), sizes.columns).to(tl.int32)
        before = (dots > best[:, None]) | ((dots == best[:, None]) & (at.j[None, :] < item[:, None]))
        before = before & (at.j < sizes.columns)[None, :] & (at.j[None, :] != item[:, None])
        store_partial(partials, 0, rows, tl.sum(before.to(tl.int32), 1))


def forward(args: Arguments) -> Tensor:
    """Returns int64 [N]."""
    query, target = args.query, args.target.contiguous()
    if not len(query):
        return query.new_empty(0, dtype=torch.int64)
    gallery = Block(OP, "ranks", query, args.gallery, None)
    score = _scores(gallery, target)
    ranks = torch.where(score.isnan(), gallery.columns - 1, _count_before(gallery, target, score))
    return torch.where((target < 0) | (target >= gallery.columns), gallery.columns, ranks)


def block(args: Any) -> Tensor:
    """Returns int64 [N], see `block.Block`."""
    query, right = args.query, Block(OP, "ranks", args.query, args.right, None)
    score = _scores(right, torch.arange(len(query), device=query.device))
    gallery = Block(OP, "ranks", query, args.gallery, None)
    return torch.where(score.isnan(), -1, _count_before(gallery, args.right_index.contiguous(), score))


def _scores(block: Block, item: Tensor) -> Tensor:
    """Returns each query's score with one of a block's items, float32 [N]."""
    score = item.new_empty(block.rows, dtype=torch.float32)
    launch(
        target_scores_kernel, (ceil_div(block.rows, block.config.block_q),), replace(block.config, stages=1),
        block.image, block.text, item, score, block.strides, block.rows, block.columns, TILE=block.tile,
    )  # fmt: skip
    return score


def _count_before(block: Block, target: Tensor, score: Tensor) -> Tensor:
    """Returns how many of a block's items stand before each query's target, int64 [N].

    Args:
        target: int64 [N], the place relative to the block's first item; it may be outside.
        score: float32 [N], the target's.
    """
    before = torch.empty_like(target)
    plan = block.config
    across = ceil_div(block.columns, plan.block_k)
    for at in block.groups(4 * across * plan.block_q, triton_call.PARTIAL_BYTES):
        partials = score.new_empty(across, at.stop - at.start, dtype=torch.int32)
        launch(
            ranks_kernel, block.grid(at), plan,
            *block.operands, target, score, partials, block.strides, block.sizes(at),
            FLATTEN_LOOP=block.flatten_loop, TILE=block.tile,
        )  # fmt: skip
        torch.sum(partials, 0, dtype=torch.int64, out=before[at])
    return before
