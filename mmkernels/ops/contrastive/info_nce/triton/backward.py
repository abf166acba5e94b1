"""The contrastive loss's backward pass in Triton: strips of the logits' gradients, which a library multiplies.

A pair's exponential is computed once, relative to one reference for its tile; factors of its row and column turn it
into the probabilities of both directions. Tiles whose references lie too far apart for that are recomputed with two
exponentials for each pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.ops.common.kept import scaled
from mmkernels.ops.common.triton.launch import loss_scale_of
from mmkernels.ops.common.triton.tiles import split_columns
from mmkernels.ops.contrastive.info_nce.triton.states import CLASS_FACTOR, POSITIVE_FACTOR, softmax_factors
from mmkernels.ops.contrastive.triton.arguments import Strip
from mmkernels.ops.contrastive.triton.call import Block, GradientStrips, hard_pairing, pairing
from mmkernels.ops.contrastive.triton.pairs import (
    crosses_diagonal,
    has_hidden_pairs,
    is_ragged,
    may_have_positives,
    positive_pairs,
    visible_pairs,
)
from mmkernels.ops.contrastive.triton.tiles import (
    LARGE,
    best_dots,
    exponents,
    fold_sign,
    position,
    store_gradients,
    tile_corner,
)
from mmkernels.runtime.triton import launch

OP = "info_nce"
_SMALLEST_GRADIENT = 1e-30  # smaller upstream gradients are not scaled up to the loss scale
_WIDEST = tl.constexpr(100.0)  # range of references for one exponential a pair: it stays between 2^-126 and 2^127


class Factors(NamedTuple):
    """`softmax_factors` of both directions; text's are None for hard texts.

    Args:
        image, text: float32 [4, rows] and [4, columns].
        image_ranges, text_ranges: float32 [tiles, 2].
        rows: the number of images.
    """

    image: Any
    text: Any
    image_ranges: Any
    text_ranges: Any
    rows: Any


@triton.jit
def load_factors(factors, field, at, sizes):
    """Returns one field of a tile's rows [rows] and columns [columns]; of hard texts 0."""
    row = tl.load(factors.image + tl.cast(factors.rows, tl.int64) * field + at.i, mask=at.i < sizes.end_row, other=0.0)
    column = tl.zeros_like(at.j).to(tl.float32)
    if factors.text is not None:
        offset = tl.cast(sizes.columns, tl.int64) * field
        column = tl.load(factors.text + offset + at.j, mask=at.j < sizes.columns, other=0.0)
    return row, column


@triton.jit
def weighted_sum(x, row, column):
    """Returns the sum of x [rows, columns], each element once times its row's weight and once times its column's."""
    return tl.sum(tl.sum(x * row[:, None] + x * column[None, :], 1), 0)


@triton.jit
def reference_range(factors, row_tile, column_tile):
    """Returns the smallest and the largest reference of a tile's rows and columns."""
    low, high = tl.load(factors.image_ranges + 2 * row_tile), tl.load(factors.image_ranges + 2 * row_tile + 1)
    if factors.text is not None:
        low = tl.minimum(low, tl.load(factors.text_ranges + 2 * column_tile))
        high = tl.maximum(high, tl.load(factors.text_ranges + 2 * column_tile + 1))
    return low, high


@triton.jit
def softmax_gradients(dots, scale, factors, base, at, sizes, EXACT: tl.constexpr):
    """Returns each probability times the gradient of its line's loss, summed over both directions: [rows, columns]."""
    live, live_column = at.i < sizes.end_row, at.j < sizes.columns
    reference = tl.load(factors.image + at.i, mask=live, other=0.0)
    weight = tl.load(factors.image + factors.rows + at.i, mask=live, other=0.0)
    if factors.text is not None:
        column_reference = tl.load(factors.text + at.j, mask=live_column, other=0.0)
        column_weight = tl.load(factors.text + sizes.columns + at.j, mask=live_column, other=0.0)
    if EXACT:
        gradient = tl.exp2(exponents(dots, scale, reference[:, None])) * weight[:, None]
        if factors.text is not None:
            gradient += tl.exp2(exponents(dots, scale, column_reference[None, :])) * column_weight[None, :]
    else:
        weights = (weight * tl.exp2(base - reference))[:, None]
        if factors.text is not None:
            weights = weights + (column_weight * tl.exp2(base - column_reference))[None, :]
        gradient = tl.exp2(tl.fma(dots, scale, -base)) * weights
    return gradient


@triton.jit
def gradient_tile(
    dots, winner, logit_scale, codes, factors, base, strip, scale_partials, n, corner, sizes,
    PAIRS: tl.constexpr, SMOOTH: tl.constexpr, EXACT: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr,
    FIRST: tl.constexpr,
):  # fmt: skip
    """Store the gradients of a tile's logits, and as the n-th partial of the scale's gradient their sum times the dots.

    Takes the COLUMNS columns of the tile from its column FIRST on.

    The targets' share of that sum is computed first: later the gradients occupy the registers of the dots.
    """
    dots, scale = fold_sign(dots, logit_scale)
    at = position(corner, TILE.BLOCK_Q, COLUMNS, FIRST)
    # Without EXACT a tile on the diagonal is recomputed, so its positives are left out here.
    SUBTRACT: tl.constexpr = PAIRS == "code" or (EXACT and PAIRS != "none")
    of_targets = tl.full([], 0.0, tl.float32)
    if SUBTRACT:
        near = may_have_positives(codes, at, sizes, PAIRS)
        if near:
            positive = positive_pairs(codes, at, sizes, PAIRS)
            if EXACT:  # the diagonal goes on past the end
                positive = positive & visible_pairs(codes, at, sizes, PAIRS)
            positive = tl.where(positive, dots, 0.0)
            row, column = load_factors(factors, POSITIVE_FACTOR, at, sizes)
            of_targets += weighted_sum(positive, row, column)
    if SMOOTH:
        visible = dots
        if EXACT:
            visible = tl.where(visible_pairs(codes, at, sizes, PAIRS), visible, 0.0)
        row, column = load_factors(factors, CLASS_FACTOR, at, sizes)
        of_targets += weighted_sum(visible, row, column)
    gradient = softmax_gradients(dots, scale, factors, base, at, sizes, EXACT=EXACT)
    if EXACT:
        gradient = tl.where(visible_pairs(codes, at, sizes, PAIRS), gradient, 0.0)
    total = tl.sum(tl.sum(gradient * dots, 1), 0) - of_targets
    tl.store(scale_partials + n, tl.where(tl.load(logit_scale).to(tl.float32) < 0, -total, total))
    if SUBTRACT:
        if near:
            row, column = load_factors(factors, POSITIVE_FACTOR, at, sizes)
            positive = positive_pairs(codes, at, sizes, PAIRS)
            gradient = tl.where(positive, gradient - row[:, None] - column[None, :], gradient)
    if SMOOTH:
        row, column = load_factors(factors, CLASS_FACTOR, at, sizes)
        smoothed = gradient - row[:, None] - column[None, :]
        if EXACT and PAIRS == "hidden":
            smoothed = tl.where(visible_pairs(codes, at, sizes, PAIRS), smoothed, gradient)
        gradient = smoothed
    if strip.gradient is not None:
        store_gradients(strip, gradient, winner, at, sizes)


@triton.jit
def gradient_epilogue(
    dots, winner, logit_scale, codes, factors, base, strip, scale_partials, t, corner, sizes,
    PAIRS: tl.constexpr, SMOOTH: tl.constexpr, EXACT: tl.constexpr, HALVED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Run `gradient_tile` for the t-th tile, or for its two halves."""
    if HALVED:
        HALF: tl.constexpr = TILE.BLOCK_K // 2
        left, right = split_columns(dots, TILE.BLOCK_Q, TILE.BLOCK_K)
        left_winner, right_winner = split_columns(winner, TILE.BLOCK_Q, TILE.BLOCK_K)
        gradient_tile(
            left, left_winner, logit_scale, codes, factors, base, strip, scale_partials, 2 * t, corner, sizes,
            PAIRS=PAIRS, SMOOTH=SMOOTH, EXACT=EXACT, TILE=TILE, COLUMNS=HALF, FIRST=0,
        )  # fmt: skip
        gradient_tile(
            right, right_winner, logit_scale, codes, factors, base, strip, scale_partials, 2 * t + 1, corner, sizes,
            PAIRS=PAIRS, SMOOTH=SMOOTH, EXACT=EXACT, TILE=TILE, COLUMNS=HALF, FIRST=HALF,
        )  # fmt: skip
    else:
        gradient_tile(
            dots, winner, logit_scale, codes, factors, base, strip, scale_partials, t, corner, sizes,
            PAIRS=PAIRS, SMOOTH=SMOOTH, EXACT=EXACT, TILE=TILE, COLUMNS=TILE.BLOCK_K, FIRST=0,
        )  # fmt: skip


@triton.jit
def info_nce_gradient_kernel(
    image, text, logit_scale, codes, factors, strip, scale_partials, strides, sizes,
    PAIRS: tl.constexpr, SMOOTH: tl.constexpr, HALVED: tl.constexpr, FLATTEN_LOOP: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Store the gradients of a strip's logits, and partial sums of the scale's gradient. Grid: (programs,).

    scale_partials: float32, one for each tile, or for each half of one.
    """
    for t in tl.range(tl.program_id(0), sizes.row_tiles * sizes.column_tiles, tl.num_programs(0), flatten=FLATTEN_LOOP):
        corner = tile_corner(t, sizes, TILE)
        dots, winner = best_dots(image, text, corner, strides, sizes, TILE)
        low, high = reference_range(factors, corner.first_row // TILE.BLOCK_Q, corner.column_tile)
        base = tl.floor(0.5 * (low + high))  # close to all references, so that the exponents lose no bits
        gradient_epilogue(
            dots, winner, logit_scale, codes, factors, base, strip, scale_partials, t, corner, sizes,
            PAIRS=PAIRS, SMOOTH=SMOOTH, EXACT=False, HALVED=HALVED, TILE=TILE,
        )  # fmt: skip


@triton.jit
def exact_info_nce_gradient_kernel(
    image, text, logit_scale, codes, factors, strip, scale_partials, strides, sizes,
    PAIRS: tl.constexpr, SMOOTH: tl.constexpr, HALVED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Recompute some tiles of `info_nce_gradient_kernel`. Grid: (programs,).

    These are the tiles with hidden pairs or pairs past the end, those that cross the diagonal, and those whose
    references lie too far from each other, or from 0, for one exponential a pair.
    """
    for t in tl.range(tl.program_id(0), sizes.row_tiles * sizes.column_tiles, tl.num_programs(0)):
        corner = tile_corner(t, sizes, TILE)
        low, high = reference_range(factors, corner.first_row // TILE.BLOCK_Q, corner.column_tile)
        at = position(corner, TILE.BLOCK_Q, TILE.BLOCK_K)
        recompute = ((high - low <= _WIDEST) & (tl.maximum(high, -low) < LARGE)) == 0
        recompute = recompute | is_ragged(at, sizes)
        if PAIRS == "hidden":
            recompute = recompute | has_hidden_pairs(codes, at, sizes)
        if PAIRS == "diagonal" or PAIRS == "hidden":
            recompute = recompute | crosses_diagonal(at, sizes)
        if recompute:
            dots, winner = best_dots(image, text, corner, strides, sizes, TILE)
            gradient_epilogue(
                dots, winner, logit_scale, codes, factors, 0.0, strip, scale_partials, t, corner, sizes,
                PAIRS=PAIRS, SMOOTH=SMOOTH, EXACT=True, HALVED=HALVED, TILE=TILE,
            )  # fmt: skip


def backward(args: Any) -> tuple[Tensor, ...]:
    """Returns the gradients of image, text, logit_scale and hard_texts, empty where none is needed."""
    image, logit_scale, hard_texts = args.image, args.logit_scale, args.hard_texts
    pairs = pairing(args.image_ids, args.text_ids, args.ignore)
    block = Block(OP, "contrastive_grad", image, args.text, pairs)
    blocks, need_texts = [block], [args.need_text]
    if hard_texts is not None and len(hard_texts):
        _, of_hard = hard_pairing(pairs, args.image_ids, args.hard_text_ids)
        blocks.append(Block(OP, "contrastive_grad", image, hard_texts, of_hard, hard=True))
        need_texts.append(args.need_hard_texts)
    image_grad, (text_grad, *hard_grads), scale_grad = gradients(
        args, blocks, need_texts, args.image_state, args.text_state, image.dtype
    )
    hard_grad = hard_grads[0] if hard_grads else None
    if args.need_hard_texts and hard_texts is not None and not hard_grads:
        hard_grad = torch.zeros_like(hard_texts)  # [0, d]
    grads = (
        image_grad,
        text_grad,
        scale_grad.to(logit_scale.dtype).reshape(logit_scale.shape) if args.need_logit_scale else None,
        hard_grad,
    )
    return tuple(image.new_empty(0) if x is None else x for x in grads)


def gradients(
    args: Any,
    blocks: Sequence[Block],
    need_texts: Sequence[bool],
    image_state: Tensor,
    text_state: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor | None, list[Tensor | None], Tensor]:
    """Returns the gradients of image, of each block's texts, None where none is needed, and of the scale, float32.

    Args:
        args: the backward record of the op, or of a block.
        blocks: the texts, which all have the images' direction; the first ones have one of their own.
        image_state, text_state: float32 [4, N] and [4, M].
        dtype: of the features' gradients.
    """
    image, logit_scale, label_smoothing, block = args.image, args.logit_scale, args.label_smoothing, blocks[0]
    loss_scale = loss_scale_of(image.dtype)
    largest = _largest(image, args.grad_image_loss, args.grad_text_loss)
    scales = (largest, loss_scale, label_smoothing)
    of_image, image_ranges = softmax_factors(
        image_state.contiguous(), args.grad_image_loss, *scales, block.config.block_q
    )
    of_text, text_ranges = softmax_factors(text_state.contiguous(), args.grad_text_loss, *scales, block.config.block_k)
    factors = Factors(of_image, of_text, image_ranges, text_ranges, block.rows)

    def fill(block: Block, at: slice, strip: Strip) -> Tensor:
        down, across = block.tiles(at)
        scale_partials = largest.new_empty((1 + block.halved) * down * across)
        arguments = (
            *block.operands, logit_scale, block.pairing.codes,
            factors._replace(text=None, text_ranges=None) if block.hard else factors,
            strip, scale_partials, block.strides, block.sizes(at),
        )  # fmt: skip
        constants = {"PAIRS": block.pairs, "SMOOTH": label_smoothing > 0, "HALVED": block.halved, "TILE": block.tile}
        flatten = {"FLATTEN_LOOP": block.flatten_loop}
        launch(info_nce_gradient_kernel, block.grid(at), block.config, *arguments, **flatten, **constants)
        launch(exact_info_nce_gradient_kernel, block.grid(at), block.config, *arguments, **constants)
        return scale_partials

    unit = largest / loss_scale
    factor = logit_scale.reshape(()).to(torch.float32) * unit
    strips = GradientStrips(blocks, need_texts, args.need_image, fill, dtype)
    scale_grad = strips.run(factor) * unit
    image_grad = None if strips.image_grad is None else strips.image_grad.reshape(image.shape)
    return image_grad, [None if x is None else scaled(x, factor, dtype) for x in strips.text_grads], scale_grad


def _largest(like: Tensor, *grads: Tensor | None) -> Tensor:
    """Returns the largest magnitude of the upstream gradients, float32, 0-D."""
    largest = like.new_full((), _SMALLEST_GRADIENT, dtype=torch.float32)
    for grad in grads:
        if grad is not None:
            largest = torch.maximum(largest, grad.abs().amax())
    return largest
