"""The pairwise sigmoid loss in Triton: loss and gradients of the logits from one product of features."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.ops.common.triton.constants import LN2, LOG2E
from mmkernels.ops.contrastive.formula import scaled
from mmkernels.ops.contrastive.sigmoid_contrastive.spec import Arguments, kept, kept_dtype
from mmkernels.ops.contrastive.triton.call import Block, Strips, boost_of, pairing
from mmkernels.ops.contrastive.triton.tiles import (
    best_products,
    halves,
    hangs_over,
    near_place,
    near_positive,
    positives,
    store_gradients,
    taking_part,
    tile_of,
    turned,
)
from mmkernels.runtime.triton import launch

OP = "sigmoid_contrastive"


@triton.jit
def minus_log_one_minus(p):
    """-log(1 - p) for 0 <= p <= 0.5, relative to its size exact to 2e-7, where ``1 - p`` would lose a small p.

    A polynomial of least relative error: beside a pair's exponential and division multiplications are free.
    """
    x = tl.fma(p, 1.44110715, -1.69581056)
    x = tl.fma(p, x, 1.25766861)
    x = tl.fma(p, x, -0.203538463)
    x = tl.fma(p, x, 0.26961264)
    x = tl.fma(p, x, 0.242805094)
    x = tl.fma(p, x, 0.333700627)
    x = tl.fma(p, x, 0.499992847)
    return p * tl.fma(p, x, 1.0)


@triton.jit
def sigmoid_part(
    dots, winner, logit_scale, logit_bias, codes, strip, winners, strip_strides, sums, sizes, n, parts,
    first_row, first_column, PAIRS: tl.constexpr, CAREFUL: tl.constexpr, GRADS: tl.constexpr, BOOST: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Store the gradients of the n-th part's logits, its loss, and sums: of gradients times products, of gradients."""
    dots, scale = turned(dots, logit_scale)
    bias = tl.load(logit_bias).to(tl.float32) * LOG2E
    i, j = first_row + tl.arange(0, BLOCK_Q), first_column + tl.arange(0, BLOCK_K)
    logits = tl.fma(dots, scale, bias)
    # By place, tiles with positives are for the careful kernel.
    if CAREFUL or PAIRS == "code":
        near = near_positive(codes, i, j, first_row, first_column, sizes, PAIRS, BLOCK_Q, BLOCK_K)
        if near:
            logits = tl.where(positives(codes, i, j, sizes, PAIRS), -logits, logits)
    # Of what should be small, x: sigmoid(x) is the gradient, and softplus(x) the loss: the larger of x and 0, and what
    # follows from the sigmoid or its complement, whichever is less. Nothing else has to stay in registers.
    above = tl.maximum(logits, 0.0)
    found = 1 / (1 + tl.exp2(-logits))
    losses = tl.fma(above, LN2, minus_log_one_minus(tl.minimum(found, 1 - found)))
    if CAREFUL:
        losses = tl.where(taking_part(codes, i, j, sizes, PAIRS), losses, 0.0)
    loss = tl.sum(losses, 1)
    if GRADS:
        if CAREFUL or PAIRS == "code":
            if near:
                found = tl.where(positives(codes, i, j, sizes, PAIRS), -found, found)
        if CAREFUL:
            found = tl.where(taking_part(codes, i, j, sizes, PAIRS), found, 0.0)
        total, every = tl.sum(found * dots, 1), tl.sum(found, 1)
        total = tl.sum(total, 0)
        tl.store(sums + parts + n, tl.where(tl.load(logit_scale).to(tl.float32) < 0, -total, total))
        tl.store(sums + 2 * parts + n, tl.sum(every, 0))
        if strip is not None:
            if BOOST != 1:
                found *= BOOST
            store_gradients(strip, winners, strip_strides, found, winner, i, j, sizes)
    tl.store(sums + n, tl.sum(loss, 0))


@triton.jit
def sigmoid_parts(
    dots, winner, logit_scale, logit_bias, codes, strip, winners, strip_strides, sums, sizes, t, tiles, first_row,
    first_column, PAIRS: tl.constexpr, CAREFUL: tl.constexpr, GRADS: tl.constexpr, BOOST: tl.constexpr,
    PARTS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`sigmoid_part` of a whole tile, or of its halves."""
    if PARTS == 1:
        sigmoid_part(
            dots, winner, logit_scale, logit_bias, codes, strip, winners, strip_strides, sums, sizes, t,
            tiles[0] * tiles[1], first_row, first_column, PAIRS, CAREFUL, GRADS, BOOST, BLOCK_Q, BLOCK_K,
        )  # fmt: skip
    else:
        left, right = halves(dots, BLOCK_Q, BLOCK_K)
        left_winner, right_winner = halves(winner, BLOCK_Q, BLOCK_K)
        sigmoid_part(
            left, left_winner, logit_scale, logit_bias, codes, strip, winners, strip_strides, sums, sizes, 2 * t,
            2 * tiles[0] * tiles[1], first_row, first_column, PAIRS, CAREFUL, GRADS, BOOST, BLOCK_Q, BLOCK_K // 2,
        )  # fmt: skip
        sigmoid_part(
            right, right_winner, logit_scale, logit_bias, codes, strip, winners, strip_strides, sums, sizes, 2 * t + 1,
            2 * tiles[0] * tiles[1], first_row, first_column + BLOCK_K // 2, PAIRS, CAREFUL, GRADS, BOOST, BLOCK_Q,
            BLOCK_K // 2,
        )  # fmt: skip


@triton.jit
def sigmoid_kernel(
    image, text, logit_scale, logit_bias, codes, strip, winners, strip_strides, sums, strides, sizes, tiles,
    PAIRS: tl.constexpr, GRADS: tl.constexpr, BOOST: tl.constexpr, PARTS: tl.constexpr, QUERIES: tl.constexpr,
    PRECISION: tl.constexpr, UNIT: tl.constexpr, DIM: tl.constexpr, TMA: tl.constexpr, FLAT: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A strip's gradients of logits, and sums of each tile or half of one. Grid: (programs,).

    strip: [rows, columns] or None; winners: the same, which query each product is of, or None.
    sums: float32 [3, parts], of losses, of gradients times products, of gradients; without GRADS [1, parts].
    """
    for t in tl.range(tl.program_id(0), tiles[0] * tiles[1], tl.num_programs(0), flatten=FLAT):
        first_row, first_column, _, _ = tile_of(t, sizes, BLOCK_Q, BLOCK_K)
        dots, winner = best_products(
            image, text, first_row, first_column, strides, sizes,
            QUERIES, PRECISION, UNIT, DIM, TMA, BLOCK_Q, BLOCK_K, BLOCK_D,
        )  # fmt: skip
        sigmoid_parts(
            dots, winner, logit_scale, logit_bias, codes, strip, winners, strip_strides, sums, sizes, t, tiles,
            first_row, first_column, PAIRS, False, GRADS, BOOST, PARTS, BLOCK_Q, BLOCK_K,
        )  # fmt: skip


@triton.jit
def careful_sigmoid_kernel(
    image, text, logit_scale, logit_bias, codes, strip, winners, strip_strides, sums, strides, sizes, tiles,
    PAIRS: tl.constexpr, GRADS: tl.constexpr, BOOST: tl.constexpr, PARTS: tl.constexpr, QUERIES: tl.constexpr,
    PRECISION: tl.constexpr, UNIT: tl.constexpr, DIM: tl.constexpr, TMA: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compute the tiles again of which not all takes part, and those with positives by place. Grid: (programs,)."""
    for t in tl.range(tl.program_id(0), tiles[0] * tiles[1], tl.num_programs(0)):
        first_row, first_column, _, _ = tile_of(t, sizes, BLOCK_Q, BLOCK_K)
        again = hangs_over(first_row, first_column, sizes, BLOCK_Q, BLOCK_K)
        if PAIRS == "place":
            again = again | near_place(first_row, first_column, sizes, BLOCK_Q, BLOCK_K)
        if again:
            dots, winner = best_products(
                image, text, first_row, first_column, strides, sizes,
                QUERIES, PRECISION, UNIT, DIM, TMA, BLOCK_Q, BLOCK_K, BLOCK_D,
            )  # fmt: skip
            sigmoid_parts(
                dots, winner, logit_scale, logit_bias, codes, strip, winners, strip_strides, sums, sizes, t, tiles,
                first_row, first_column, PAIRS, True, GRADS, BOOST, PARTS, BLOCK_Q, BLOCK_K,
            )  # fmt: skip


def forward(args: Arguments) -> tuple[Tensor, ...]:
    """Returns the loss, and its gradients in `kept_dtype`."""
    image, text, logit_scale, logit_bias = args.image, args.text, args.logit_scale, args.logit_bias
    block = Block(OP, "sigmoid", image, text, pairing(args.image_ids, args.text_ids, False))
    boost = boost_of(image.dtype)

    def fill(block: Block, at: slice, strip: Tensor | None, winners: Tensor | None) -> Tensor:
        tiles = block.tiles(at)
        sums = image.new_empty(3 if args.keep_any else 1, block.parts * tiles[0] * tiles[1], dtype=torch.float32)
        arguments = (
            *block.operands, logit_scale, logit_bias, block.pairing.codes, strip, winners,
            (0 if strip is None else strip.stride(0),), sums, block.strides, block.sizes(at), tiles,
        )  # fmt: skip
        constants = {
            "PAIRS": block.pairs,
            "GRADS": args.keep_any,
            "BOOST": boost,
            "PARTS": block.parts,
            **block.constants,
        }
        launch(sigmoid_kernel, block.grid(at), block.config, *arguments, FLAT=block.flat, **constants)
        launch(careful_sigmoid_kernel, block.grid(at), block.config, *arguments, **constants)
        return sums

    unit = 1.0 / block.rows
    factor = logit_scale.reshape(()).to(torch.float32) * (unit / boost)
    dtype = kept_dtype(image)
    strips = Strips([(block, args.keep_text)], args.keep_image, fill, dtype)
    loss, *sums = strips.run(factor).unbind()
    (of_text,) = strips.of_texts
    none = (None, None) if not sums else (sums[0] * unit, sums[1] * unit)
    grads = (strips.of_image, None if of_text is None else scaled(of_text, factor, dtype), *none)
    return (loss / block.rows, *kept(grads, args))
