"""The pairwise sigmoid loss in Triton: loss and gradients of the logits from one matrix product of the features."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.ops.common.dtypes import wide_dtype
from mmkernels.ops.common.kept import kept_dtype, scaled
from mmkernels.ops.common.triton.constants import LN2, LOG2E
from mmkernels.ops.common.triton.launch import loss_scale_of
from mmkernels.ops.common.triton.tiles import split_columns
from mmkernels.ops.contrastive.sigmoid_contrastive.spec import Arguments, kept
from mmkernels.ops.contrastive.triton.arguments import Strip
from mmkernels.ops.contrastive.triton.call import Block, GradientStrips, Pairing, Partners, pairing
from mmkernels.ops.contrastive.triton.pairs import (
    crosses_diagonal,
    is_ragged,
    may_have_positives,
    positive_pairs,
    visible_pairs,
)
from mmkernels.ops.contrastive.triton.tiles import (
    best_dots,
    fold_sign,
    position,
    store_gradients,
    tile_corner,
)
from mmkernels.runtime.triton import launch

OP = "sigmoid_contrastive"


@triton.jit
def minus_log_one_minus(p):
    """Returns -log(1 - p) for 0 <= p <= 0.5, with a relative error of 2e-7; ``1 - p`` would lose a small p.

    A polynomial of least relative error. Its multiplications cost nothing beside a pair's exponential and division.
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
def sigmoid_tile(
    dots, winner, logit_scale, logit_bias, codes, strip, partials, n, count, corner, sizes,
    PAIRS: tl.constexpr, EXACT: tl.constexpr, GRADS: tl.constexpr, LOSS_SCALE: tl.constexpr, TILE: tl.constexpr,
    COLUMNS: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """Store the gradients of a tile's logits, and the n-th of `count` partial sums; see `sigmoid_kernel`.

    Takes the COLUMNS columns of the tile from its column FIRST on.
    """
    dots, scale = fold_sign(dots, logit_scale)
    bias = tl.load(logit_bias).to(tl.float32) * LOG2E
    at = position(corner, TILE.BLOCK_Q, COLUMNS, FIRST)
    logits = tl.fma(dots, scale, bias)
    # Without EXACT a tile on the diagonal is recomputed, so its positives are left out here.
    if EXACT or PAIRS == "code":
        near = may_have_positives(codes, at, sizes, PAIRS)
        if near:
            logits = tl.where(positive_pairs(codes, at, sizes, PAIRS), -logits, logits)
    # Now every logit x should be small: sigmoid(x) is the size of the gradient, softplus(x) the loss. softplus(x) is
    # max(x, 0) plus a function of the sigmoid or its complement, whichever is smaller, so that registers hold no more.
    above = tl.maximum(logits, 0.0)
    gradient = 1 / (1 + tl.exp2(-logits))
    losses = tl.fma(above, LN2, minus_log_one_minus(tl.minimum(gradient, 1 - gradient)))
    if EXACT:
        losses = tl.where(visible_pairs(codes, at, sizes, PAIRS), losses, 0.0)
    loss = tl.sum(losses, 1)
    if GRADS:
        if EXACT or PAIRS == "code":
            if near:
                gradient = tl.where(positive_pairs(codes, at, sizes, PAIRS), -gradient, gradient)
        if EXACT:
            gradient = tl.where(visible_pairs(codes, at, sizes, PAIRS), gradient, 0.0)
        of_scale, of_bias = tl.sum(gradient * dots, 1), tl.sum(gradient, 1)
        of_scale = tl.sum(of_scale, 0)
        tl.store(partials + count + n, tl.where(tl.load(logit_scale).to(tl.float32) < 0, -of_scale, of_scale))
        tl.store(partials + 2 * count + n, tl.sum(of_bias, 0))
        if strip.gradient is not None:
            if LOSS_SCALE != 1:
                gradient *= LOSS_SCALE
            store_gradients(strip, gradient, winner, at, sizes)
    tl.store(partials + n, tl.sum(loss, 0))


@triton.jit
def sigmoid_epilogue(
    dots, winner, logit_scale, logit_bias, codes, strip, partials, t, corner, sizes,
    PAIRS: tl.constexpr, EXACT: tl.constexpr, GRADS: tl.constexpr, LOSS_SCALE: tl.constexpr, HALVED: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Run `sigmoid_tile` for the t-th tile, or for its two halves."""
    tiles = sizes.row_tiles * sizes.column_tiles
    if HALVED:
        HALF: tl.constexpr = TILE.BLOCK_K // 2
        left, right = split_columns(dots, TILE.BLOCK_Q, TILE.BLOCK_K)
        left_winner, right_winner = split_columns(winner, TILE.BLOCK_Q, TILE.BLOCK_K)
        sigmoid_tile(
            left, left_winner, logit_scale, logit_bias, codes, strip, partials, 2 * t, 2 * tiles, corner, sizes,
            PAIRS=PAIRS, EXACT=EXACT, GRADS=GRADS, LOSS_SCALE=LOSS_SCALE, TILE=TILE, COLUMNS=HALF, FIRST=0,
        )  # fmt: skip
        sigmoid_tile(
            right, right_winner, logit_scale, logit_bias, codes, strip, partials, 2 * t + 1, 2 * tiles, corner, sizes,
            PAIRS=PAIRS, EXACT=EXACT, GRADS=GRADS, LOSS_SCALE=LOSS_SCALE, TILE=TILE, COLUMNS=HALF, FIRST=HALF,
        )  # fmt: skip
    else:
        sigmoid_tile(
            dots, winner, logit_scale, logit_bias, codes, strip, partials, t, tiles, corner, sizes,
            PAIRS=PAIRS, EXACT=EXACT, GRADS=GRADS, LOSS_SCALE=LOSS_SCALE, TILE=TILE, COLUMNS=TILE.BLOCK_K, FIRST=0,
        )  # fmt: skip


@triton.jit
def sigmoid_kernel(
    image, text, logit_scale, logit_bias, codes, strip, partials, strides, sizes,
    PAIRS: tl.constexpr, GRADS: tl.constexpr, LOSS_SCALE: tl.constexpr, HALVED: tl.constexpr,
    FLATTEN_LOOP: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Store the gradients of a strip's logits times LOSS_SCALE, and partial sums. Grid: (programs,).

    partials: float32 [3, tiles or halves of tiles], of losses, of gradients times dots, of gradients; without GRADS
    only of losses.
    """
    for t in tl.range(tl.program_id(0), sizes.row_tiles * sizes.column_tiles, tl.num_programs(0), flatten=FLATTEN_LOOP):
        corner = tile_corner(t, sizes, TILE)
        dots, winner = best_dots(image, text, corner, strides, sizes, TILE)
        sigmoid_epilogue(
            dots, winner, logit_scale, logit_bias, codes, strip, partials, t, corner, sizes,
            PAIRS=PAIRS, EXACT=False, GRADS=GRADS, LOSS_SCALE=LOSS_SCALE, HALVED=HALVED, TILE=TILE,
        )  # fmt: skip


@triton.jit
def exact_sigmoid_kernel(
    image, text, logit_scale, logit_bias, codes, strip, partials, strides, sizes,
    PAIRS: tl.constexpr, GRADS: tl.constexpr, LOSS_SCALE: tl.constexpr, HALVED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Recompute the tiles of `sigmoid_kernel` with pairs past the end or on the diagonal. Grid: (programs,)."""
    for t in tl.range(tl.program_id(0), sizes.row_tiles * sizes.column_tiles, tl.num_programs(0)):
        corner = tile_corner(t, sizes, TILE)
        at = position(corner, TILE.BLOCK_Q, TILE.BLOCK_K)
        recompute = is_ragged(at, sizes)
        if PAIRS == "diagonal":
            recompute = recompute | crosses_diagonal(at, sizes)
        if recompute:
            dots, winner = best_dots(image, text, corner, strides, sizes, TILE)
            sigmoid_epilogue(
                dots, winner, logit_scale, logit_bias, codes, strip, partials, t, corner, sizes,
                PAIRS=PAIRS, EXACT=True, GRADS=GRADS, LOSS_SCALE=LOSS_SCALE, HALVED=HALVED, TILE=TILE,
            )  # fmt: skip


def forward(args: Arguments) -> tuple[Tensor, ...]:
    """Returns the loss, and its gradients in `kept_dtype`."""
    pairs, dtype = pairing(args.image_ids, args.text_ids, False), kept_dtype(args.image)
    loss, *grads = _summed(args, pairs, args.image.shape[0], dtype)
    return (loss, *kept(grads, args))


def block(args: Any) -> tuple[Any, ...]:
    """Returns `block.Block`, None for what is not kept."""
    partners = Partners.of(args.first_text, len(args.image), len(args.text))
    pairs = pairing(args.image_ids, args.text_ids, False, partners)
    return _summed(args, pairs, args.divisor, wide_dtype(args.image))


def _summed(args: Any, pairs: Pairing, count: float, dtype: torch.dtype) -> tuple[Any, ...]:
    """Returns the loss of all pairs and its gradients, None where none is kept, all divided by `count`.

    Args:
        args: the record of the op, or of a block.
        dtype: of the features' gradients; the others are float32.
    """
    image, text, logit_scale, logit_bias = args.image, args.text, args.logit_scale, args.logit_bias
    block = Block(OP, "sigmoid", image, text, pairs)
    loss_scale = loss_scale_of(image.dtype)

    def fill(block: Block, at: slice, strip: Strip) -> Tensor:
        down, across = block.tiles(at)
        partials = image.new_empty(
            3 if args.keep_any else 1, (1 + block.halved) * down * across, dtype=torch.float32
        )  # fmt: skip
        arguments = (
            *block.operands, logit_scale, logit_bias, block.pairing.codes, strip, partials,
            block.strides, block.sizes(at),
        )  # fmt: skip
        constants = {
            "PAIRS": block.pairs, "GRADS": args.keep_any, "LOSS_SCALE": loss_scale, "HALVED": block.halved,
            "TILE": block.tile,
        }  # fmt: skip
        flatten = {"FLATTEN_LOOP": block.flatten_loop}
        launch(sigmoid_kernel, block.grid(at), block.config, *arguments, **flatten, **constants)
        launch(exact_sigmoid_kernel, block.grid(at), block.config, *arguments, **constants)
        return partials

    unit = 1.0 / count
    factor = logit_scale.reshape(()).to(torch.float32) * (unit / loss_scale)
    strips = GradientStrips([block], [args.keep_text], args.keep_image, fill, dtype)
    loss, *sums = strips.run(factor).unbind()
    (text_grad,) = strips.text_grads
    return (
        loss / count,
        None if strips.image_grad is None else strips.image_grad.reshape(image.shape),
        None if text_grad is None else scaled(text_grad, factor, dtype),
        *((x * unit for x in sums) if sums else (None, None)),
    )
