"""The contrastive loss in Triton: one matrix product of the features gives the sums of both directions.

The exponentials of a tile are taken relative to the tile's largest logit, so that their sums along rows and along
columns serve both directions. Tiles in which a row or a column lies too far below that logit are found afterwards and
recomputed with a reference for each row and column.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.ops.common.triton.constants import INFINITY
from mmkernels.ops.contrastive.info_nce.reduction import Arguments
from mmkernels.ops.contrastive.info_nce.triton.states import REFERENCE, SUM, Best, DirectionState, Fields
from mmkernels.ops.contrastive.triton import call as triton_call
from mmkernels.ops.contrastive.triton.call import Block, hard_pairing, pairing
from mmkernels.ops.contrastive.triton.pairs import crosses_diagonal, fill_invisible, may_have_positives, positive_pairs
from mmkernels.ops.contrastive.triton.tiles import (
    LARGE,
    above_zero,
    best_dots,
    column_lines,
    fold_sign,
    load_partial,
    position,
    row_lines,
    softmax_partial,
    store_partial,
    tile_corner,
)
from mmkernels.runtime.triton import launch

OP = "info_nce"
_SMALLEST_SUM = tl.constexpr(2.0**-80)  # of exponentials; a smaller one may have lost terms to float32's range
_NO_INDEX = tl.constexpr(2**31 - 1)


@triton.jit
def best_of_lines(scores, positive, is_nan, indices, AXIS: tl.constexpr):
    """Returns the best score of each line along AXIS, and the smallest of its `indices`.

    scores: [rows, columns], -inf where there is no positive; is_nan: int32, where there is one with a NaN score.
    """
    best = tl.max(scores, AXIS)
    is_best = positive & (scores == tl.expand_dims(best, AXIS))
    index = tl.min(tl.where(is_best, tl.expand_dims(indices, 1 - AXIS), _NO_INDEX), AXIS)
    nan: tl.constexpr = float("nan")
    return tl.where(tl.max(is_nan, AXIS) > 0, nan, best), index


@triton.jit
def best_positives_kernel(
    image, text, logit_scale, codes, row_scores, row_indices, column_scores, column_indices, strides, sizes,
    PAIRS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Store the best positive of each row and column of tiles that have positives, and its index. Grid: (programs,).

    The results, [1, tiles, lines], hold scores of -inf beforehand, and keep them in all other tiles. Hard texts have
    only those of rows.
    """
    for t in tl.range(tl.program_id(0), sizes.row_tiles * sizes.column_tiles, tl.num_programs(0)):
        corner = tile_corner(t, sizes, TILE)
        at = position(corner, TILE.BLOCK_Q, TILE.BLOCK_K)
        if may_have_positives(codes, at, sizes, PAIRS):
            dots, _ = best_dots(image, text, corner, strides, sizes, TILE)
            dots, scale = fold_sign(dots, logit_scale)
            positive = positive_pairs(codes, at, sizes, PAIRS)
            rows, columns = row_lines(at, sizes), column_lines(at, sizes)
            positive = positive & rows.live[:, None] & columns.live[None, :]
            scores = tl.where(positive, dots * scale, -INFINITY)
            is_nan = (scores != scores).to(tl.int32)
            scores = tl.where(scores == scores, scores, -INFINITY)
            best, index = best_of_lines(scores, positive, is_nan, at.j, 1)
            store_partial(row_scores, 0, rows, best)
            store_partial(row_indices, 0, rows, index)
            if column_scores is not None:
                best, index = best_of_lines(scores, positive, is_nan, at.i, 0)
                store_partial(column_scores, 0, columns, best)
                store_partial(column_indices, 0, columns, index)


@triton.jit
def count_before(
    dots, scale, codes, row_best, column_best, at, sizes, near, row_partials, column_partials, rows, columns,
    PAIRS: tl.constexpr, FIELD: tl.constexpr,
):  # fmt: skip
    """Store how many negatives of a tile rank before the best positive of each row and column.

    near: whether the tile may have positives.
    """
    nan: tl.constexpr = float("nan")  # ranks before nothing
    scores = fill_invisible(dots * scale, codes, at, sizes, nan, PAIRS)
    if near:
        scores = tl.where(positive_pairs(codes, at, sizes, PAIRS), nan, scores)
    best = tl.load(row_best.score + at.i, mask=rows.live, other=0.0)[:, None]
    before = scores > best
    if PAIRS != "none":  # other hard texts come after all positives, so equal ones rank behind
        index = tl.load(row_best.index + at.i, mask=rows.live, other=0)[:, None]
        before = before | ((scores == best) & (at.j[None, :] < index))
    store_partial(row_partials, FIELD, rows, tl.sum(before.to(tl.int32), 1))
    if column_partials is not None:
        best = tl.load(column_best.score + at.j, mask=columns.live, other=0.0)[None, :]
        index = tl.load(column_best.index + at.j, mask=columns.live, other=0)[None, :]
        before = (scores > best) | ((scores == best) & (at.i[:, None] < index))
        store_partial(column_partials, FIELD, columns, tl.sum(before.to(tl.int32), 0))


@triton.jit
def store_positive_sums(
    dots, codes, at, sizes, near, row_partials, column_partials, rows, columns,
    PAIRS: tl.constexpr, FIELD: tl.constexpr,
):  # fmt: skip
    """Store the sums of the positives' dot products of each row and column."""
    row_sum, column_sum = tl.zeros_like(at.i).to(tl.float32), tl.zeros_like(at.j).to(tl.float32)
    if near:
        positive = tl.where(positive_pairs(codes, at, sizes, PAIRS), dots, 0.0)
        row_sum, column_sum = tl.sum(positive, 1), tl.sum(positive, 0)
    store_partial(row_partials, FIELD, rows, row_sum)
    if column_partials is not None:
        store_partial(column_partials, FIELD, columns, column_sum)


@triton.jit
def info_nce_kernel(
    image, text, logit_scale, codes, row_partials, column_partials, row_best, column_best, strides, sizes,
    PAIRS: tl.constexpr, FIELDS: tl.constexpr, FLATTEN_LOOP: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Store both directions' partial results of each tile. Grid: (programs,).

    row_partials, column_partials: float32 [fields, tiles, lines] of REFERENCE, SUM and FIELDS; hard texts have only
    those of rows.
    row_best, column_best: `Best`, read if FIELDS has a field for ranks. Indices count from the block's first text.
    """
    for t in tl.range(tl.program_id(0), sizes.row_tiles * sizes.column_tiles, tl.num_programs(0), flatten=FLATTEN_LOOP):
        corner = tile_corner(t, sizes, TILE)
        dots, _ = best_dots(image, text, corner, strides, sizes, TILE)
        dots, scale = fold_sign(dots, logit_scale)
        at = position(corner, TILE.BLOCK_Q, TILE.BLOCK_K)
        rows, columns = row_lines(at, sizes), column_lines(at, sizes)
        near = may_have_positives(codes, at, sizes, PAIRS)
        if FIELDS.positive > 0:
            store_positive_sums(
                dots, codes, at, sizes, near, row_partials, column_partials, rows, columns,
                PAIRS=PAIRS, FIELD=FIELDS.positive,
            )  # fmt: skip
        if FIELDS.before > 0:
            count_before(
                dots, scale, codes, row_best, column_best, at, sizes, near, row_partials, column_partials, rows,
                columns, PAIRS=PAIRS, FIELD=FIELDS.before,
            )  # fmt: skip
        if FIELDS.all > 0:
            visible = fill_invisible(dots, codes, at, sizes, 0.0, PAIRS)
            store_partial(row_partials, FIELDS.all, rows, tl.sum(visible, 1))
            if column_partials is not None:
                store_partial(column_partials, FIELDS.all, columns, tl.sum(visible, 0))
        dots = fill_invisible(dots, codes, at, sizes, -INFINITY, PAIRS)
        scale = above_zero(scale)
        top = tl.ceil(tl.max(tl.max(dots, 1), 0) * scale)
        top = tl.where(top > -INFINITY, top, 0.0)
        weights = tl.exp2(tl.fma(dots, scale, -top))
        # A sum of 0 makes exact_info_nce_kernel recompute the tile.
        precise = tl.where(tl.abs(top) < LARGE, 1.0, 0.0)
        store_partial(row_partials, REFERENCE, rows, tl.zeros_like(at.i).to(tl.float32) + top)
        store_partial(row_partials, SUM, rows, tl.sum(weights, 1) * precise)
        if column_partials is not None:
            store_partial(column_partials, REFERENCE, columns, tl.zeros_like(at.j).to(tl.float32) + top)
            store_partial(column_partials, SUM, columns, tl.sum(weights, 0) * precise)


@triton.jit
def smallest_sum(partials, lines):
    """Returns the smallest sum of a tile's lines, 0 if one of them is NaN, which a minimum would pass over."""
    sums = load_partial(partials, SUM, lines, 1.0)
    return tl.min(tl.where(sums == sums, sums, 0.0), 0)


@triton.jit
def exact_info_nce_kernel(
    image, text, logit_scale, codes, row_partials, column_partials, positive_dots, strides, sizes,
    PAIRS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Recompute some tiles of `info_nce_kernel` with a reference for each row and column. Grid: (programs,).

    These are the tiles with a sum that is not finite, or so small that the tile's reference was too large for it; and
    those that cross the diagonal, whose positives are stored in `positive_dots` [rows]: `info_nce_kernel` has no
    registers left for that.
    """
    for t in tl.range(tl.program_id(0), sizes.row_tiles * sizes.column_tiles, tl.num_programs(0)):
        corner = tile_corner(t, sizes, TILE)
        at = position(corner, TILE.BLOCK_Q, TILE.BLOCK_K)
        rows, columns = row_lines(at, sizes), column_lines(at, sizes)
        smallest = smallest_sum(row_partials, rows)
        if column_partials is not None:
            smallest = tl.minimum(smallest, smallest_sum(column_partials, columns))
        recompute = smallest < _SMALLEST_SUM
        if PAIRS == "diagonal" or PAIRS == "hidden":
            recompute = recompute | crosses_diagonal(at, sizes)
        if recompute:
            dots, _ = best_dots(image, text, corner, strides, sizes, TILE)
            dots, scale = fold_sign(dots, logit_scale)
            scale = above_zero(scale)
            if PAIRS == "diagonal" or PAIRS == "hidden":
                positive = tl.sum(tl.where(positive_pairs(codes, at, sizes, PAIRS), dots, 0.0), 1)
                end_column = tl.minimum(at.first_column + TILE.BLOCK_K, sizes.columns)
                in_tile = (at.i >= at.first_column + sizes.diagonal) & (at.i < end_column + sizes.diagonal)
                tl.store(positive_dots + at.i, positive, mask=rows.live & in_tile)
            dots = fill_invisible(dots, codes, at, sizes, -INFINITY, PAIRS)
            top, total = softmax_partial(dots, scale, 1)
            store_partial(row_partials, REFERENCE, rows, top)
            store_partial(row_partials, SUM, rows, total)
            if column_partials is not None:
                top, total = softmax_partial(dots, scale, 0)
                store_partial(column_partials, REFERENCE, columns, top)
                store_partial(column_partials, SUM, columns, total)


def forward(args: Arguments) -> tuple[Tensor, ...]:
    """Returns `Results` but for the loss."""
    image, text, logit_scale, hard_texts = args.image, args.text, args.logit_scale, args.hard_texts
    label_smoothing = args.label_smoothing
    pairs = pairing(args.image_ids, args.text_ids, args.ignore)
    hard = None
    if hard_texts is not None and len(hard_texts):
        pairs, of_hard = hard_pairing(pairs, args.image_ids, args.hard_text_ids)
        hard = Block(OP, "contrastive", image, hard_texts, of_hard, hard=True)
    block = Block(OP, "contrastive", image, text, pairs)
    by_code = pairs.kind == "code"
    fields = Fields.of(positive=by_code, all=label_smoothing > 0, before=args.stats)
    positive_dots = None if by_code else image.new_empty(block.rows, dtype=torch.float32)
    images, texts = (DirectionState(n, image, fields, positive_dots) for n in (block.rows, block.columns))
    if args.stats:
        add_best(block, images, texts, logit_scale)
        if hard is not None and hard.pairs == "code":
            add_best(hard, images, texts, logit_scale, first_column=block.columns)
    add_block(block, images, texts, logit_scale, positive_dots)
    columns = block.columns
    if hard is not None:
        columns += hard.columns
        add_block(hard, images, texts, logit_scale, positive_dots, first_column=block.columns)
    image_loss, image_state, image_rank = images.finish(
        logit_scale, label_smoothing, pairs.positives[0], pairs.hidden[0], columns
    )
    text_loss, text_state, text_rank = texts.finish(
        logit_scale, label_smoothing, pairs.positives[1], pairs.hidden[1], block.rows
    )
    return image_loss, text_loss, image_state, text_state, image_rank, text_rank


def add_best(
    block: Block, images: DirectionState, texts: DirectionState, logit_scale: Tensor, first_column: int = 0
) -> None:
    """Add a block's best positives to both directions; hard texts only to the images.

    Args:
        first_column: the number of the block's first text among all that images are compared to.
    """
    _, across = block.tiles(slice(0, block.rows))
    columns = 0 if block.hard else block.columns
    for at in block.groups(8 * (across * block.config.block_q + columns), triton_call.PARTIAL_BYTES):
        down, across = block.tiles(at)
        rows = _no_best(logit_scale, across, at.stop - at.start)
        others = None if block.hard else _no_best(logit_scale, down, columns)
        launch(
            best_positives_kernel, block.grid(at), block.config,
            *block.operands, logit_scale, block.pairing.codes, *rows, *((None, None) if others is None else others),
            block.strides, block.sizes(at), PAIRS=block.pairs, TILE=block.tile,
        )  # fmt: skip
        if first_column:  # where there is no positive, the index means nothing
            rows = rows._replace(index=torch.where(rows.score == -torch.inf, rows.index, rows.index + first_column))
        images.add_best(*rows, at.start)
        if others is not None:
            texts.add_best(*others)


def _no_best(like: Tensor, tiles: int, lines: int) -> Best:
    """Returns the best positives [1, tiles, lines] before there are any."""
    score = like.new_full((1, tiles, lines), -torch.inf, dtype=torch.float32)
    return Best(score, like.new_empty(score.shape, dtype=torch.int32))


def add_block(
    block: Block,
    images: DirectionState,
    texts: DirectionState,
    logit_scale: Tensor,
    positive_dots: Tensor | None,
    first_column: int = 0,
) -> None:
    """Add a block of texts to both directions; hard texts only to the images.

    Args:
        positive_dots: float32 [N], receives the dot products of the pairs on the diagonal.
        first_column: the number of the block's first text among all that images are compared to.
    """
    fields = images.fields if block.pairs != "none" else images.fields.without_positive()
    best = images.best
    if best is not None and first_column:
        best = best._replace(index=best.index - first_column)
    _, across = block.tiles(slice(0, block.rows))
    columns = 0 if block.hard else block.columns
    tile_bytes = 4 * fields.size * (across * block.config.block_q + columns)
    for at in block.groups(tile_bytes, triton_call.PARTIAL_BYTES):
        down, across = block.tiles(at)
        rows = logit_scale.new_empty(fields.size, across, at.stop - at.start, dtype=torch.float32)
        others = None if block.hard else rows.new_empty(fields.size, down, columns)
        features = (*block.operands, logit_scale, block.pairing.codes)
        launch(
            info_nce_kernel, block.grid(at), block.config,
            *features, rows, others, best, texts.best, block.strides, block.sizes(at),
            PAIRS=block.pairs, FIELDS=fields, FLATTEN_LOOP=block.flatten_loop, TILE=block.tile,
        )  # fmt: skip
        launch(
            exact_info_nce_kernel, block.grid(at), block.config,
            *features, rows, others, positive_dots, block.strides, block.sizes(at), PAIRS=block.pairs, TILE=block.tile,
        )  # fmt: skip
        images.add(rows, fields, at.start)
        if others is not None:
            texts.add(others, fields)
