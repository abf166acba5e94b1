"""Gradients in Triton by computing the logits again, in strips of tokens: a weight's row is finished in one launch."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.ops.common.triton.launch import loss_scale_of
from mmkernels.ops.common.triton.tiles import split_columns
from mmkernels.ops.linear import formula
from mmkernels.ops.linear.triton.arguments import Buffer
from mmkernels.ops.linear.triton.call import Head
from mmkernels.ops.linear.triton.products import HiddenSums, Unit, add_bias_gradient, add_weight_gradient
from mmkernels.ops.linear.triton.tiles import (
    buffer_offsets,
    exponential,
    has_target,
    live_rows,
    logits_tile,
    place_of,
    tanh,
    with_bias,
)
from mmkernels.runtime.triton import launch

STRIP_BYTES = 2**28  # of the gradients of a strip's logits
_SMALLEST = 1e-30  # smaller gradients of rows are not scaled up to the loss scale

REFERENCE, LOG_SUM = tl.constexpr(formula.REFERENCE), tl.constexpr(formula.LOG_SUM)
OF_PROBABILITY, OF_ENTROPY = tl.constexpr(formula.OF_PROBABILITY), tl.constexpr(formula.OF_ENTROPY)
OF_TARGET, OF_TOKENS = tl.constexpr(formula.OF_TARGET), tl.constexpr(formula.OF_TOKENS)


@triton.jit
def gradient_of_tile(
    z, vectors, softmax, softmax_stride, factors, gradient, bias_partials, numbers, extent, live_count, place,
    SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    FIRST: tl.constexpr,
):  # fmt: skip
    """Store the gradients of a tile's COLUMNS columns from its column FIRST on; see `gradients_kernel`."""
    column = place.column + FIRST
    j = column + tl.arange(0, COLUMNS)
    n = place.row - extent.first_row + tl.arange(0, ROWS)
    live = n < live_count
    z = with_bias(z, vectors.bias, j, extent)
    if SOFTCAP:
        z = tanh(z * numbers.inner)
    at = factors.data + extent.first_row + n
    factor = tl.load(at + OF_PROBABILITY * factors.stride, mask=live, other=0.0)[:, None]
    of_row = softmax + extent.first_row + n
    reference = tl.load(of_row + REFERENCE * softmax_stride, mask=live, other=0.0)[:, None]
    x = z * numbers.outer - reference - tl.load(of_row + LOG_SUM * softmax_stride, mask=live, other=0.0)[:, None]
    p = exponential(x)
    if ENTROPY:
        of_entropy = tl.load(at + OF_ENTROPY * factors.stride, mask=live, other=0.0)[:, None]
        factor = tl.where(p == 0, 0.0, tl.fma(x, of_entropy, factor))
    flow = p * factor
    if TOKENS:
        of_token = tl.load(vectors.token_weight + j, mask=j < extent.end_token, other=0.0)[None, :]
        flow += tl.load(at + OF_TOKENS * factors.stride, mask=live, other=0.0)[:, None] * of_token
    target = tl.load(vectors.targets + extent.first_row + n)
    if has_target(target, column, COLUMNS):
        of_target = tl.load(at + OF_TARGET * factors.stride, mask=live, other=0.0)
        flow = tl.where(j[None, :] == target[:, None], flow + of_target[:, None], flow)
    if SOFTCAP:
        flow *= 1 - z * z
    if (place.row - extent.first_row + ROWS > live_count) | (column + COLUMNS > extent.end_token):
        flow = tl.where(live[:, None] & (j < extent.end_token)[None, :], flow, 0.0)
    if bias_partials.data is not None:
        partials = bias_partials.data + tl.cast(place.row_tile, tl.int64) * bias_partials.stride
        tl.store(partials + j - extent.first_token, tl.sum(flow, 0))
    if gradient.data is not None:
        offsets = buffer_offsets(place, extent, column, gradient.stride, ROWS, COLUMNS)
        tl.store(gradient.data + offsets, flow.to(gradient.data.dtype.element_ty))


@triton.jit
def gradients_kernel(
    hidden, weight, vectors, softmax, softmax_stride, factors, gradient, bias_partials, numbers, strides, extent,
    SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, TOKENS: tl.constexpr, HALVED: tl.constexpr, FLATTEN: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Store the gradients of an extent's products, 0 past the end; but for the temperature. Grid: (programs,).

    softmax: float32 [2, packed rows], `formula.REFERENCE` and `LOG_SUM`.
    factors: a `Buffer`, float32 [4, packed rows], see `formula.OF_PROBABILITY`.
    gradient: `Buffer` of whole tiles; None: not wanted.
    bias_partials: float32 [tiles down, columns], a `Buffer` of the sums of each tile's columns; None: not wanted.
    """
    live_count = live_rows(extent)
    row_tiles = tl.cdiv(live_count, TILE.BLOCK_Q)
    column_tiles = tl.cdiv(extent.end_token - extent.first_token, TILE.BLOCK_K)
    for t in tl.range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0), flatten=FLATTEN):
        place = place_of(t, row_tiles, column_tiles, extent.first_row, extent.first_token, TILE)
        z = logits_tile(hidden, weight, place, strides, extent, TILE)
        if HALVED:
            HALF: tl.constexpr = TILE.BLOCK_K // 2
            left, right = split_columns(z, TILE.BLOCK_Q, TILE.BLOCK_K)
            gradient_of_tile(
                left, vectors, softmax, softmax_stride, factors, gradient, bias_partials, numbers, extent, live_count,
                place, SOFTCAP=SOFTCAP, ENTROPY=ENTROPY, TOKENS=TOKENS, ROWS=TILE.BLOCK_Q, COLUMNS=HALF, FIRST=0,
            )  # fmt: skip
            gradient_of_tile(
                right, vectors, softmax, softmax_stride, factors, gradient, bias_partials, numbers, extent, live_count,
                place, SOFTCAP=SOFTCAP, ENTROPY=ENTROPY, TOKENS=TOKENS, ROWS=TILE.BLOCK_Q, COLUMNS=HALF, FIRST=HALF,
            )  # fmt: skip
        else:
            gradient_of_tile(
                z, vectors, softmax, softmax_stride, factors, gradient, bias_partials, numbers, extent, live_count,
                place, SOFTCAP=SOFTCAP, ENTROPY=ENTROPY, TOKENS=TOKENS, ROWS=TILE.BLOCK_Q, COLUMNS=TILE.BLOCK_K,
                FIRST=0,
            )  # fmt: skip


class Wanted(NamedTuple):
    """The gradients of hidden, weight and bias, or their dtypes; None: not wanted."""

    hidden: Any
    weight: Any
    bias: Any


def unit_of(factors: Tensor, token_weight: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Returns what gradients of logits are divided by before they are stored, so that float16 holds them: 0-D.

    None: nothing. Rows that are not finite have no part in it.

    Args:
        factors: float32 [4, rows], 0 in rows that take no part.
    """
    scale = loss_scale_of(dtype)
    if scale == 1.0:
        return None
    if token_weight is not None:
        largest_token = token_weight.abs().amax()
        factors = torch.cat([factors[: formula.OF_TOKENS], factors[formula.OF_TOKENS :] * largest_token])
    sizes = factors.abs()
    return sizes.where(sizes.isfinite(), 0.0).amax().clamp_(min=_SMALLEST) / scale


def strip_gradients(
    head: Head, token_weight: Tensor | None, softmax: Tensor, factors: Tensor, wanted: Wanted, *, entropy: bool,
    temperature: float,
) -> Wanted:  # fmt: skip
    """Returns the gradients of hidden [T, d], weight [V, d] and bias [V].

    Args:
        softmax, factors: float32 [2, T] and [4, T], see `gradients_kernel`; factors are 0 in rows that take no part.
    """
    weight, rows, dim = head.weight, head.all_rows, head.dim
    tensor = unit_of(factors, token_weight, head.dtype)
    if tensor is not None:
        factors = factors / tensor
    unit = Unit(1.0 / temperature, tensor)
    of_hidden = weight.new_empty(head.rows.total, dim, dtype=wanted.hidden) if wanted.hidden else None
    of_weight = weight.new_empty(head.tokens, dim, dtype=wanted.weight) if wanted.weight else None
    of_bias = factors.new_empty(head.tokens) if wanted.bias else None
    height = head.height(rows.stop)
    strips = head.split_tokens(height * weight.element_size(), STRIP_BYTES)
    width = head.width(strips[0].stop)
    products = of_hidden is not None or of_weight is not None
    buffer = weight.new_empty(height, width) if products else None
    partials = factors.new_empty(height // head.logits.block_q, width) if wanted.bias else None
    sums = HiddenSums(head, rows, strips[0].stop) if wanted.hidden else None
    for number, tokens in enumerate(strips):
        launch(
            gradients_kernel, head.grid(head.logits, rows.stop, tokens.stop - tokens.start), head.logits,
            *head.logits_operands, head.vectors(token_weight), softmax, softmax.stride(0),
            Buffer(factors, factors.stride(0)), Buffer(buffer, width), Buffer(partials, width),
            head.numbers, head.strides, head.extent(rows, tokens),
            SOFTCAP=head.softcap, ENTROPY=entropy, TOKENS=token_weight is not None, HALVED=head.halved,
            FLATTEN=head.flatten, TILE=head.logits_tile,
        )  # fmt: skip
        if sums is not None:
            sums.add(Buffer(buffer, width), tokens, first=number == 0)
        if of_weight is not None:
            add_weight_gradient(head, Buffer(buffer, width), rows, tokens, of_weight, None, unit, first=True)
        if of_bias is not None:
            assert partials is not None
            add_bias_gradient(head, partials, rows, tokens, of_bias, unit, first=True)
    if sums is not None and of_hidden is not None:
        sums.store(of_hidden, unit)
    return Wanted(of_hidden, of_weight, None if of_bias is None else of_bias.to(wanted.bias))


def live_factors(head: Head, target: Tensor, rows: Tensor) -> Tensor:
    """Returns [..., T] in packed order, 0 in rows that take no part."""
    return head.rows.packed(rows.masked_fill(target == formula.IGNORED, 0.0))
