"""Retrieval ranks in Triton: the right answers' scores, then how many of each tile of the gallery stand before them."""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.ops.common.triton.launch import ceil_div
from mmkernels.ops.contrastive.retrieval_ranks.spec import Arguments
from mmkernels.ops.contrastive.triton import call as triton_call
from mmkernels.ops.contrastive.triton.call import Block
from mmkernels.ops.contrastive.triton.tiles import best_products, product_of_rows, tile_of
from mmkernels.runtime.triton import launch

OP = "retrieval_ranks"


@triton.jit
def target_scores_kernel(
    query, gallery, target, score, strides, count, items,
    PRECISION: tl.constexpr, UNIT: tl.constexpr, DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The score of each query's target. Grid: (tiles of queries,).

    A whole tile of products for what stands on its diagonal: so each score is summed as `ranks_kernel` sums it, and
    equal rows of the gallery have equal scores to the last bit.
    """
    i = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    found = tl.zeros([BLOCK_Q], tl.float32)
    for first in range(0, BLOCK_Q, BLOCK_K):
        j = tl.program_id(0) * BLOCK_Q + first + tl.arange(0, BLOCK_K)
        place = tl.load(target + j, mask=j < count, other=0)
        place = tl.minimum(tl.maximum(place, 0), items - 1)  # of a target outside of the gallery: whatever
        rows = tl.minimum(i, count - 1).to(tl.int64)
        dots = product_of_rows(
            query + rows * strides[0] * UNIT, gallery + place.to(tl.int64) * strides[2] * UNIT,
            PRECISION, DIM, BLOCK_Q, BLOCK_K, BLOCK_D,
        )  # fmt: skip
        found += tl.sum(tl.where(i[:, None] == j[None, :], dots, 0.0), 1)
    tl.store(score + i, found, mask=i < count)


@triton.jit
def ranks_kernel(
    query, gallery, target, score, part, strides, sizes, tiles,
    QUERIES: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr, DIM: tl.constexpr, TMA: tl.constexpr,
    FLAT: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """How many items of each tile stand before a query's target: int32 [tiles across, queries]. Grid: (programs,)."""
    for t in tl.range(tl.program_id(0), tiles[0] * tiles[1], tl.num_programs(0), flatten=FLAT):
        first_row, first_column, _, column_tile = tile_of(t, sizes, BLOCK_Q, BLOCK_K)
        dots, _ = best_products(
            query, gallery, first_row, first_column, strides, sizes,
            QUERIES, PRECISION, UNIT, DIM, TMA, BLOCK_Q, BLOCK_K, BLOCK_D,
        )  # fmt: skip
        i, j = first_row + tl.arange(0, BLOCK_Q), first_column + tl.arange(0, BLOCK_K)
        live = i < sizes[1]
        best = tl.load(score + i, mask=live, other=0.0)
        place = tl.load(target + i, mask=live, other=0)
        # Of items with the same score those of a lower number; in one comparison, with an int32 that is no target.
        place = tl.minimum(tl.maximum(place, -1), sizes[2]).to(tl.int32)
        before = (dots > best[:, None]) | ((dots == best[:, None]) & (j[None, :] < place[:, None]))
        before = before & (j < sizes[2])[None, :] & (j[None, :] != place[:, None])
        place = column_tile.to(tl.int64) * (sizes[1] - sizes[0]) + i - sizes[0]
        tl.store(part + place, tl.sum(before.to(tl.int32), 1), mask=live)


def forward(args: Arguments) -> Tensor:
    """[N] int64."""
    query, gallery, target = args.query, args.gallery, args.target
    found = query.new_empty(query.shape[0], dtype=torch.int64)
    if not len(query):
        return found
    block = Block(OP, "ranks", query, gallery, None)
    plan, constants, target = block.config, block.constants, target.contiguous()
    score = query.new_empty(block.rows, dtype=torch.float32)
    used = ("PRECISION", "UNIT", "DIM", "BLOCK_Q", "BLOCK_K", "BLOCK_D")
    launch(
        target_scores_kernel, (ceil_div(block.rows, plan.block_q),), replace(plan, stages=1),
        block.image, block.text, target, score, block.strides, block.rows, block.columns,
        **{name: constants[name] for name in used},
    )  # fmt: skip
    across = ceil_div(block.columns, plan.block_k)
    for at in block.groups(4 * across * plan.block_q, triton_call.PART_BYTES):
        part = score.new_empty(across, at.stop - at.start, dtype=torch.int32)
        launch(
            ranks_kernel, block.grid(at), plan,
            *block.operands, target, score, part, block.strides, block.sizes(at), block.tiles(at),
            FLAT=block.flat, **constants,
        )  # fmt: skip
        torch.sum(part, 0, dtype=torch.int64, out=found[at])
    found = torch.where(score.isnan(), block.columns - 1, found)
    return torch.where((target < 0) | (target >= block.columns), block.columns, found)
