"""The contrastive loss in Triton: one product of features gives the sums of both directions.

A tile's exponentials are taken relative to the whole tile's largest logit: their sums along rows and along columns
serve both directions. Tiles in which a row or column lies too far below that are found afterwards and computed again,
with a reference for each row and column.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.ops.common.triton.constants import INFINITY
from mmkernels.ops.contrastive.info_nce.reduction import Arguments
from mmkernels.ops.contrastive.triton import call as triton_call
from mmkernels.ops.contrastive.triton.call import Block, pairing
from mmkernels.ops.contrastive.triton.states import Side
from mmkernels.ops.contrastive.triton.tiles import (
    LARGE,
    above_zero,
    best_products,
    load_part,
    masked_dots,
    near_place,
    near_positive,
    positives,
    softmax_part,
    store_part,
    tile_of,
    turned,
)
from mmkernels.runtime.triton import launch

OP = "info_nce"
_LEAST_SUM = tl.constexpr(2.0**-80)  # of exponentials, that has lost nothing to float32's range


@triton.jit
def best_positives_kernel(
    image, text, logit_scale, codes, row_part, row_places, column_part, column_places, strides, sizes, tiles,
    PAIRS: tl.constexpr, QUERIES: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr, DIM: tl.constexpr,
    TMA: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Of tiles with positives the best of each row and column, and where it is. Grid: (programs,).

    The parts, [1, tiles, count], hold -inf where there is none.
    """
    for t in tl.range(tl.program_id(0), tiles[0] * tiles[1], tl.num_programs(0)):
        first_row, first_column, row_tile, column_tile = tile_of(t, sizes, BLOCK_Q, BLOCK_K)
        i, j = first_row + tl.arange(0, BLOCK_Q), first_column + tl.arange(0, BLOCK_K)
        if near_positive(codes, i, j, first_row, first_column, sizes, PAIRS, BLOCK_Q, BLOCK_K):
            dots, _ = best_products(
                image, text, first_row, first_column, strides, sizes,
                QUERIES, PRECISION, UNIT, DIM, TMA, BLOCK_Q, BLOCK_K, BLOCK_D,
            )  # fmt: skip
            dots, scale = turned(dots, logit_scale)
            mine = positives(codes, i, j, sizes, PAIRS) & (i < sizes[1])[:, None] & (j < sizes[2])[None, :]
            scores = tl.where(mine, dots * scale, -INFINITY)
            bad = (scores != scores).to(tl.int32)
            scores = tl.where(scores == scores, scores, -INFINITY)
            nan: tl.constexpr = float("nan")
            best = tl.max(scores, 1)
            place = tl.min(tl.where(mine & (scores == best[:, None]), j[None, :], 2**31 - 1), 1)
            best = tl.where(tl.max(bad, 1) > 0, nan, best)
            live, n, count = i < sizes[1], i - sizes[0], sizes[1] - sizes[0]
            store_part(row_part, 0, column_tile, tiles[1], n, count, live, best)
            tl.store(row_places + column_tile.to(tl.int64) * count + n, place, mask=live)
            best = tl.max(scores, 0)
            place = tl.min(tl.where(mine & (scores == best[None, :]), i[:, None], 2**31 - 1), 0)
            best = tl.where(tl.max(bad, 0) > 0, nan, best)
            store_part(column_part, 0, row_tile, tiles[0], j, sizes[2], j < sizes[2], best)
            tl.store(column_places + row_tile.to(tl.int64) * sizes[2] + j, place, mask=j < sizes[2])


@triton.jit
def count_before(
    dots, scale, codes, best, i, j, first_row, first_column, sizes, near, row_part, column_part, row_tile,
    column_tile, tiles, PAIRS: tl.constexpr, BEFORE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """How many negatives of a tile stand before each row's and column's best positive."""
    nan: tl.constexpr = float("nan")  # stands before nothing
    scores = masked_dots(dots * scale, codes, i, j, first_row, first_column, sizes, nan, PAIRS, BLOCK_Q, BLOCK_K)
    if near:
        scores = tl.where(positives(codes, i, j, sizes, PAIRS), nan, scores)
    live, count = i < sizes[1], sizes[1] - sizes[0]
    score = tl.load(best[0] + i, mask=live, other=0.0)[:, None]
    before = scores > score
    if PAIRS != "none":  # hard texts come after all texts
        place = tl.load(best[1] + i, mask=live, other=0)[:, None]
        before = before | ((scores == score) & (j[None, :] < place))
    store_part(row_part, BEFORE, column_tile, tiles[1], i - sizes[0], count, live, tl.sum(before.to(tl.int32), 1))
    if PAIRS != "none":
        live = j < sizes[2]
        score = tl.load(best[2] + j, mask=live, other=0.0)[None, :]
        place = tl.load(best[3] + j, mask=live, other=0)[None, :]
        before = (scores > score) | ((scores == score) & (i[:, None] < place))
        store_part(column_part, BEFORE, row_tile, tiles[0], j, sizes[2], live, tl.sum(before.to(tl.int32), 0))


@triton.jit
def info_nce_kernel(
    image, text, logit_scale, codes, row_part, column_part, best, strides, sizes, tiles,
    PAIRS: tl.constexpr, POSITIVE: tl.constexpr, EVEN: tl.constexpr, BEFORE: tl.constexpr, QUERIES: tl.constexpr,
    PRECISION: tl.constexpr, UNIT: tl.constexpr, DIM: tl.constexpr, TMA: tl.constexpr, FLAT: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Both directions' parts of each tile. Grid: (programs,), each of which takes every so manieth tile.

    row_part, column_part: float32 [fields, tiles, count], with the fields of `merge_softmax_kernel`; of hard texts rows
    alone.
    """
    for t in tl.range(tl.program_id(0), tiles[0] * tiles[1], tl.num_programs(0), flatten=FLAT):
        first_row, first_column, row_tile, column_tile = tile_of(t, sizes, BLOCK_Q, BLOCK_K)
        dots, _ = best_products(
            image, text, first_row, first_column, strides, sizes,
            QUERIES, PRECISION, UNIT, DIM, TMA, BLOCK_Q, BLOCK_K, BLOCK_D,
        )  # fmt: skip
        dots, scale = turned(dots, logit_scale)
        i, j = first_row + tl.arange(0, BLOCK_Q), first_column + tl.arange(0, BLOCK_K)
        live, n, count = i < sizes[1], i - sizes[0], sizes[1] - sizes[0]
        live_column = j < sizes[2]
        near = near_positive(codes, i, j, first_row, first_column, sizes, PAIRS, BLOCK_Q, BLOCK_K)
        if POSITIVE > 0:
            row_sum, column_sum = tl.zeros([BLOCK_Q], tl.float32), tl.zeros([BLOCK_K], tl.float32)
            if near:
                mine = tl.where(positives(codes, i, j, sizes, PAIRS), dots, 0.0)
                row_sum, column_sum = tl.sum(mine, 1), tl.sum(mine, 0)
            store_part(row_part, POSITIVE, column_tile, tiles[1], n, count, live, row_sum)
            store_part(column_part, POSITIVE, row_tile, tiles[0], j, sizes[2], live_column, column_sum)
        if BEFORE > 0:
            count_before(
                dots, scale, codes, best, i, j, first_row, first_column, sizes, near, row_part, column_part,
                row_tile, column_tile, tiles, PAIRS, BEFORE, BLOCK_Q, BLOCK_K,
            )  # fmt: skip
        if EVEN > 0:
            every = masked_dots(dots, codes, i, j, first_row, first_column, sizes, 0.0, PAIRS, BLOCK_Q, BLOCK_K)
            store_part(row_part, EVEN, column_tile, tiles[1], n, count, live, tl.sum(every, 1))
            if PAIRS != "none":
                store_part(column_part, EVEN, row_tile, tiles[0], j, sizes[2], live_column, tl.sum(every, 0))
        dots = masked_dots(dots, codes, i, j, first_row, first_column, sizes, -INFINITY, PAIRS, BLOCK_Q, BLOCK_K)
        scale = above_zero(scale)
        top = tl.ceil(tl.max(tl.max(dots, 1), 0) * scale)
        top = tl.where(top > -INFINITY, top, 0.0)
        weights = tl.exp2(tl.fma(dots, scale, -top))
        taken = tl.where(tl.abs(top) < LARGE, 1.0, 0.0)  # else for the careful kernel
        store_part(row_part, 0, column_tile, tiles[1], n, count, live, tl.zeros([BLOCK_Q], tl.float32) + top)
        store_part(row_part, 1, column_tile, tiles[1], n, count, live, tl.sum(weights, 1) * taken)
        if PAIRS != "none":
            top = tl.zeros([BLOCK_K], tl.float32) + top
            store_part(column_part, 0, row_tile, tiles[0], j, sizes[2], live_column, top)
            store_part(column_part, 1, row_tile, tiles[0], j, sizes[2], live_column, tl.sum(weights, 0) * taken)


@triton.jit
def careful_info_nce_kernel(
    image, text, logit_scale, codes, row_part, column_part, positive, strides, sizes, tiles,
    PAIRS: tl.constexpr, QUERIES: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr, DIM: tl.constexpr,
    TMA: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compute some tiles again. Grid: (programs,).

    Those in which a sum is so small, or not finite, that its reference was the wrong one; and those with positives by
    place, for whose products, `positive` [rows], the registers would be missed in `info_nce_kernel`.
    """
    for t in tl.range(tl.program_id(0), tiles[0] * tiles[1], tl.num_programs(0)):
        first_row, first_column, row_tile, column_tile = tile_of(t, sizes, BLOCK_Q, BLOCK_K)
        i, j = first_row + tl.arange(0, BLOCK_Q), first_column + tl.arange(0, BLOCK_K)
        live, n, count = i < sizes[1], i - sizes[0], sizes[1] - sizes[0]
        live_column = j < sizes[2]
        least = tl.min(load_part(row_part, 1, column_tile, tiles[1], n, count, live, 1.0), 0)
        if PAIRS != "none":
            sums = load_part(column_part, 1, row_tile, tiles[0], j, sizes[2], live_column, 1.0)
            least = tl.minimum(least, tl.min(sums, 0))
        again = (least >= _LEAST_SUM) == 0
        if PAIRS == "place" or PAIRS == "hidden":
            again = again | near_place(first_row, first_column, sizes, BLOCK_Q, BLOCK_K)
        if again:
            dots, _ = best_products(
                image, text, first_row, first_column, strides, sizes,
                QUERIES, PRECISION, UNIT, DIM, TMA, BLOCK_Q, BLOCK_K, BLOCK_D,
            )  # fmt: skip
            dots, scale = turned(dots, logit_scale)
            scale = above_zero(scale)
            if PAIRS == "place" or PAIRS == "hidden":
                mine = tl.sum(tl.where(positives(codes, i, j, sizes, PAIRS), dots, 0.0), 1)
                here = (i >= first_column + sizes[3]) & (i < tl.minimum(first_column + BLOCK_K, sizes[2]) + sizes[3])
                tl.store(positive + i, mine, mask=live & here)
            dots = masked_dots(dots, codes, i, j, first_row, first_column, sizes, -INFINITY, PAIRS, BLOCK_Q, BLOCK_K)
            top, total = softmax_part(dots, scale, 1)
            store_part(row_part, 0, column_tile, tiles[1], n, count, live, top)
            store_part(row_part, 1, column_tile, tiles[1], n, count, live, total)
            if PAIRS != "none":
                top, total = softmax_part(dots, scale, 0)
                store_part(column_part, 0, row_tile, tiles[0], j, sizes[2], live_column, top)
                store_part(column_part, 1, row_tile, tiles[0], j, sizes[2], live_column, total)


def forward(args: Arguments) -> tuple[Tensor, ...]:
    """Returns the rows of both directions."""
    image, text, logit_scale, hard_texts = args.image, args.text, args.logit_scale, args.hard_texts
    image_ids, text_ids, ignore, label_smoothing = args.image_ids, args.text_ids, args.ignore, args.label_smoothing
    pairs = pairing(image_ids, text_ids, ignore)
    block = Block(OP, "contrastive", image, text, pairs)
    hard = None if hard_texts is None or not len(hard_texts) else Block(OP, "contrastive", image, hard_texts, None)
    by_code, smooth = pairs.kind == "code", label_smoothing > 0
    fields = (2 * by_code, (2 + by_code) * smooth, (2 + by_code + smooth) * args.stats)
    products = None if by_code else image.new_empty(block.rows, dtype=torch.float32)
    sides = [Side(n, image, fields, products) for n in (block.rows, block.columns)]
    if args.stats:
        add_best(block, sides, logit_scale)
    add_block(block, sides, logit_scale, products)
    more = 0
    if hard is not None:
        more = hard.columns
        add_block(hard, sides, logit_scale, None)
    classes = (block.columns + more, block.rows)
    done = [
        side.finish(logit_scale, label_smoothing, pairs.positives[n], pairs.hidden[n], classes[n])
        for n, side in enumerate(sides)
    ]
    return tuple(x for same in zip(*done, strict=True) for x in same)


def add_best(block: Block, sides: list[Side], logit_scale: Tensor) -> None:
    """Bring a block's best positives to both directions."""
    across, columns = block.tiles(slice(0, block.rows))[1], block.columns
    for at in block.groups(8 * (across * block.config.block_q + columns), triton_call.PART_BYTES):
        tiles = block.tiles(at)
        parts = []
        for count, of in ((at.stop - at.start, tiles[1]), (columns, tiles[0])):
            score = logit_scale.new_full((1, of, count), -torch.inf, dtype=torch.float32)
            parts += [score, score.new_empty(score.shape, dtype=torch.int32)]
        launch(
            best_positives_kernel, block.grid(at), block.config,
            *block.operands, logit_scale, block.pairing.codes, *parts, block.strides, block.sizes(at), tiles,
            PAIRS=block.pairs, **block.constants,
        )  # fmt: skip
        sides[0].add_best(parts[0], parts[1], at.start)
        sides[1].add_best(parts[2], parts[3])


def add_block(block: Block, sides: list[Side], logit_scale: Tensor, products: Tensor | None) -> None:
    """Bring a block of texts to the states of both directions; hard texts to that of images alone.

    Args:
        products: [N], takes the products of positives by place.
    """
    hard = block.pairs == "none"
    fields = sides[0].fields_of_hard if hard else sides[0].fields
    count = 2 + sum(n > 0 for n in fields)
    across, columns = block.tiles(slice(0, block.rows))[1], 0 if hard else block.columns
    best = tuple(x for side in sides for x in (side.best, side.place))
    names = dict(zip(("POSITIVE", "EVEN", "BEFORE"), fields, strict=True))
    for at in block.groups(4 * count * (across * block.config.block_q + columns), triton_call.PART_BYTES):
        down, across = tiles = block.tiles(at)
        rows = logit_scale.new_empty(count, across, at.stop - at.start, dtype=torch.float32)
        others = None if hard else rows.new_empty(count, down, columns)
        places = (block.strides, block.sizes(at), tiles)
        launch(
            info_nce_kernel, block.grid(at), block.config,
            *block.operands, logit_scale, block.pairing.codes, rows, others, best, *places,
            PAIRS=block.pairs, FLAT=block.flat, **names, **block.constants,
        )  # fmt: skip
        launch(
            careful_info_nce_kernel, block.grid(at), block.config,
            *block.operands, logit_scale, block.pairing.codes, rows, others, products, *places,
            PAIRS=block.pairs, **block.constants,
        )  # fmt: skip
        sides[0].add(rows, fields, at.start)
        if others is not None:
            sides[1].add(others, fields)
