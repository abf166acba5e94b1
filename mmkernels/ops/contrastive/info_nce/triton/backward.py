"""The contrastive loss's backward pass in Triton: strips of the logits' gradients, which a library multiplies.

A pair's exponential is taken once, relative to one reference for its tile, and brought to both directions' own by
factors of rows and columns. Tiles whose references lie too far from each other for that are computed again, with two.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.ops.contrastive.formula import scaled
from mmkernels.ops.contrastive.triton.call import Block, Strips, boost_of, pairing
from mmkernels.ops.contrastive.triton.states import softmax_factors
from mmkernels.ops.contrastive.triton.tiles import (
    LARGE,
    best_products,
    exponents,
    halves,
    hangs_over,
    hides,
    near_place,
    near_positive,
    positives,
    store_gradients,
    taking_part,
    tile_of,
    turned,
)
from mmkernels.runtime.triton import launch

OP = "info_nce"
_LEAST_GRADIENT = 1e-30  # what is smaller is not made larger
_WIDEST = tl.constexpr(100.0)  # range of references that one exponential of a pair serves, between 2^-126 and 2^127


@triton.jit
def load_shares(factors, rows, field, i, j, sizes, PAIRS: tl.constexpr):
    """One field of both directions' factors; of hard texts 0."""
    row = tl.load(factors[0] + tl.cast(rows, tl.int64) * field + i, mask=i < sizes[1], other=0.0)
    column = tl.zeros_like(j).to(tl.float32)
    if PAIRS != "none":
        column = tl.load(factors[1] + tl.cast(sizes[2], tl.int64) * field + j, mask=j < sizes[2], other=0.0)
    return row, column


@triton.jit
def weighed(x, shares):
    """The sum of ``[rows, columns]``, each times its row's and column's share."""
    return tl.sum(tl.sum(x * shares[0][:, None] + x * shares[1][None, :], 1), 0)


@triton.jit
def ranges_of(ranges, row_tile, column_tile, PAIRS: tl.constexpr):
    """Least and largest reference of a tile's rows and columns."""
    low, high = tl.load(ranges[0] + 2 * row_tile), tl.load(ranges[0] + 2 * row_tile + 1)
    if PAIRS != "none":
        low = tl.minimum(low, tl.load(ranges[1] + 2 * column_tile))
        high = tl.maximum(high, tl.load(ranges[1] + 2 * column_tile + 1))
    return low, high


@triton.jit
def softmax_gradients(dots, scale, factors, rows, base, i, j, sizes, PAIRS: tl.constexpr, CAREFUL: tl.constexpr):
    """Probabilities times what their rows' and columns' losses weigh."""
    live, live_column = i < sizes[1], j < sizes[2]
    reference = tl.load(factors[0] + i, mask=live, other=0.0)
    weight = tl.load(factors[0] + rows + i, mask=live, other=0.0)
    if PAIRS != "none":
        column_reference = tl.load(factors[1] + j, mask=live_column, other=0.0)
        column_weight = tl.load(factors[1] + sizes[2] + j, mask=live_column, other=0.0)
    if CAREFUL:
        found = tl.exp2(exponents(dots, scale, reference[:, None])) * weight[:, None]
        if PAIRS != "none":
            found += tl.exp2(exponents(dots, scale, column_reference[None, :])) * column_weight[None, :]
    else:
        shares = (weight * tl.exp2(base - reference))[:, None]
        if PAIRS != "none":
            shares = shares + (column_weight * tl.exp2(base - column_reference))[None, :]
        found = tl.exp2(tl.fma(dots, scale, -base)) * shares
    return found


@triton.jit
def gradient_part(
    dots, winner, logit_scale, codes, factors, rows, base, strip, winners, strip_strides, of_scale, sizes, n,
    first_row, first_column, PAIRS: tl.constexpr, SMOOTH: tl.constexpr, CAREFUL: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Store the gradients of the n-th part's logits, and their sum times the products.

    What is subtracted comes to that sum first: later the gradients lie in the registers of the products.
    """
    dots, scale = turned(dots, logit_scale)
    i, j = first_row + tl.arange(0, BLOCK_Q), first_column + tl.arange(0, BLOCK_K)
    # By place, tiles with positives are for the careful kernel.
    SUBTRACT: tl.constexpr = PAIRS == "code" or (CAREFUL and PAIRS != "none")
    taken = tl.full([], 0.0, tl.float32)
    if SUBTRACT:
        near = near_positive(codes, i, j, first_row, first_column, sizes, PAIRS, BLOCK_Q, BLOCK_K)
        if near:
            mine = tl.where(positives(codes, i, j, sizes, PAIRS), dots, 0.0)
            taken += weighed(mine, load_shares(factors, rows, 2, i, j, sizes, PAIRS))
    if SMOOTH:
        every = dots
        if CAREFUL:
            every = tl.where(taking_part(codes, i, j, sizes, PAIRS), every, 0.0)
        taken += weighed(every, load_shares(factors, rows, 3, i, j, sizes, PAIRS))
    found = softmax_gradients(dots, scale, factors, rows, base, i, j, sizes, PAIRS, CAREFUL)
    if CAREFUL:
        found = tl.where(taking_part(codes, i, j, sizes, PAIRS), found, 0.0)
    total = tl.sum(tl.sum(found * dots, 1), 0) - taken
    tl.store(of_scale + n, tl.where(tl.load(logit_scale).to(tl.float32) < 0, -total, total))
    if SUBTRACT:
        if near:
            row, column = load_shares(factors, rows, 2, i, j, sizes, PAIRS)
            mine = positives(codes, i, j, sizes, PAIRS)
            found = tl.where(mine, found - row[:, None] - column[None, :], found)
    if SMOOTH:
        row, column = load_shares(factors, rows, 3, i, j, sizes, PAIRS)
        less = found - row[:, None] - column[None, :]
        if CAREFUL and PAIRS == "hidden":
            less = tl.where(taking_part(codes, i, j, sizes, PAIRS), less, found)
        found = less
    if strip is not None:
        store_gradients(strip, winners, strip_strides, found, winner, i, j, sizes)


@triton.jit
def gradient_parts(
    dots, winner, logit_scale, codes, factors, rows, base, strip, winners, strip_strides, of_scale, sizes, t,
    first_row, first_column, PAIRS: tl.constexpr, SMOOTH: tl.constexpr, CAREFUL: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`gradient_part` of a whole tile, or of its halves."""
    if PARTS == 1:
        gradient_part(
            dots, winner, logit_scale, codes, factors, rows, base, strip, winners, strip_strides, of_scale, sizes, t,
            first_row, first_column, PAIRS, SMOOTH, CAREFUL, BLOCK_Q, BLOCK_K,
        )  # fmt: skip
    else:
        left, right = halves(dots, BLOCK_Q, BLOCK_K)
        left_winner, right_winner = halves(winner, BLOCK_Q, BLOCK_K)
        gradient_part(
            left, left_winner, logit_scale, codes, factors, rows, base, strip, winners, strip_strides, of_scale, sizes,
            2 * t, first_row, first_column, PAIRS, SMOOTH, CAREFUL, BLOCK_Q, BLOCK_K // 2,
        )  # fmt: skip
        gradient_part(
            right, right_winner, logit_scale, codes, factors, rows, base, strip, winners, strip_strides, of_scale,
            sizes, 2 * t + 1, first_row, first_column + BLOCK_K // 2, PAIRS, SMOOTH, CAREFUL, BLOCK_Q, BLOCK_K // 2,
        )  # fmt: skip


@triton.jit
def info_nce_gradient_kernel(
    image, text, logit_scale, codes, factors, ranges, rows, strip, winners, strip_strides, of_scale, strides, sizes,
    tiles,
    PAIRS: tl.constexpr, SMOOTH: tl.constexpr, PARTS: tl.constexpr, QUERIES: tl.constexpr, PRECISION: tl.constexpr,
    UNIT: tl.constexpr, DIM: tl.constexpr, TMA: tl.constexpr, FLAT: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradients of a strip's logits, and the scale's share of each tile or half of one. Grid: (programs,).

    factors, ranges: of `softmax_factors`, of `rows` rows and of all columns (hard texts: None for these).
    strip: [rows, columns] or None; winners: the same, which query each product is of, or None; of_scale: [parts].
    """
    for t in tl.range(tl.program_id(0), tiles[0] * tiles[1], tl.num_programs(0), flatten=FLAT):
        first_row, first_column, _, column_tile = tile_of(t, sizes, BLOCK_Q, BLOCK_K)
        dots, winner = best_products(
            image, text, first_row, first_column, strides, sizes,
            QUERIES, PRECISION, UNIT, DIM, TMA, BLOCK_Q, BLOCK_K, BLOCK_D,
        )  # fmt: skip
        low, high = ranges_of(ranges, first_row // BLOCK_Q, column_tile, PAIRS)
        base = tl.floor(0.5 * (low + high))  # near all references: exponents of a few bits lose none
        gradient_parts(
            dots, winner, logit_scale, codes, factors, rows, base, strip, winners, strip_strides, of_scale, sizes, t,
            first_row, first_column, PAIRS, SMOOTH, False, PARTS, BLOCK_Q, BLOCK_K,
        )  # fmt: skip


@triton.jit
def careful_info_nce_gradient_kernel(
    image, text, logit_scale, codes, factors, ranges, rows, strip, winners, strip_strides, of_scale, strides, sizes,
    tiles,
    PAIRS: tl.constexpr, SMOOTH: tl.constexpr, PARTS: tl.constexpr, QUERIES: tl.constexpr, PRECISION: tl.constexpr,
    UNIT: tl.constexpr, DIM: tl.constexpr, TMA: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compute some of `info_nce_gradient_kernel`'s tiles again. Grid: (programs,).

    Those of which not all takes part, those with positives by place, and those whose references lie too far from each
    other, or from 0, for one exponential a pair.
    """
    for t in tl.range(tl.program_id(0), tiles[0] * tiles[1], tl.num_programs(0)):
        first_row, first_column, _, column_tile = tile_of(t, sizes, BLOCK_Q, BLOCK_K)
        low, high = ranges_of(ranges, first_row // BLOCK_Q, column_tile, PAIRS)
        i, j = first_row + tl.arange(0, BLOCK_Q), first_column + tl.arange(0, BLOCK_K)
        again = ((high - low <= _WIDEST) & (tl.maximum(high, -low) < LARGE)) == 0
        again = again | hangs_over(first_row, first_column, sizes, BLOCK_Q, BLOCK_K)
        if PAIRS == "hidden":
            again = again | hides(codes, i, j, sizes)
        if PAIRS == "place" or PAIRS == "hidden":
            again = again | near_place(first_row, first_column, sizes, BLOCK_Q, BLOCK_K)
        if again:
            dots, winner = best_products(
                image, text, first_row, first_column, strides, sizes,
                QUERIES, PRECISION, UNIT, DIM, TMA, BLOCK_Q, BLOCK_K, BLOCK_D,
            )  # fmt: skip
            gradient_parts(
                dots, winner, logit_scale, codes, factors, rows, 0.0, strip, winners, strip_strides, of_scale, sizes, t,
                first_row, first_column, PAIRS, SMOOTH, True, PARTS, BLOCK_Q, BLOCK_K,
            )  # fmt: skip


def backward(args: Any) -> tuple[Tensor, ...]:
    """Returns the gradients of image, text, logit_scale and hard_texts."""
    image, text, logit_scale, hard_texts = args.image, args.text, args.logit_scale, args.hard_texts
    image_ids, text_ids, ignore, label_smoothing = args.image_ids, args.text_ids, args.ignore, args.label_smoothing
    states, grads = (args.image_state, args.text_state), (args.grad_image_loss, args.grad_text_loss)
    boost = boost_of(image.dtype)
    largest = image.new_full((), _LEAST_GRADIENT, dtype=torch.float32)
    for grad in grads:
        if grad is not None:
            largest = torch.maximum(largest, grad.abs().amax())
    block = Block(OP, "contrastive_grad", image, text, pairing(image_ids, text_ids, ignore))
    plan, blocks = block.config, [(block, args.need_text)]
    factors, ranges = zip(
        *(
            softmax_factors(state.contiguous(), grad, largest, boost, label_smoothing, size)
            for state, grad, size in zip(states, grads, (plan.block_q, plan.block_k), strict=True)
        ),
        strict=True,
    )
    if hard_texts is not None and len(hard_texts):
        blocks.append((Block(OP, "contrastive_grad", image, hard_texts, None), args.need_hard_texts))

    def fill(block: Block, at: slice, strip: Tensor | None, winners: Tensor | None) -> Tensor:
        tiles = block.tiles(at)
        of_scale = largest.new_empty(block.parts * tiles[0] * tiles[1])
        sides = slice(1 if block.pairs == "none" else 2)
        arguments = (
            *block.operands, logit_scale, block.pairing.codes, factors[sides], ranges[sides], block.rows, strip,
            winners, (0 if strip is None else strip.stride(0),), of_scale, block.strides, block.sizes(at), tiles,
        )  # fmt: skip
        constants = {"PAIRS": block.pairs, "SMOOTH": label_smoothing > 0, "PARTS": block.parts, **block.constants}
        launch(info_nce_gradient_kernel, block.grid(at), block.config, *arguments, FLAT=block.flat, **constants)
        launch(careful_info_nce_gradient_kernel, block.grid(at), block.config, *arguments, **constants)
        return of_scale

    unit = largest / boost
    factor = logit_scale.reshape(()).to(torch.float32) * unit
    strips = Strips(blocks, args.need_image, fill)
    of_scale = strips.run(factor)
    of_text, *of_more = (None if x is None else scaled(x, factor, image.dtype) for x in strips.of_texts)
    of_hard = of_more[0] if of_more else None
    if args.need_hard_texts and hard_texts is not None and not of_more:
        of_hard = torch.zeros_like(hard_texts)  # of which there are none
    found = (
        None if strips.of_image is None else strips.of_image.reshape(image.shape),
        of_text,
        (of_scale * unit).to(logit_scale.dtype).reshape(logit_scale.shape) if args.need_logit_scale else None,
        of_hard,
    )
    return tuple(image.new_empty(0) if x is None else x for x in found)
