"""Cosines of rows in Triton: lengths and products of rows, whatever the size of their values."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.ops.common.triton.constants import INFINITY
from mmkernels.ops.common.triton.launch import ceil_div
from mmkernels.ops.tokens.triton.rows import row_offsets, strides_of
from mmkernels.plan import Config
from mmkernels.runtime.triton import launch

__all__ = ["inverse_norms", "near_one", "norms_of", "row_products", "steps_of"]

_STEPS = {4: 16, 2: 64}  # channels of one step of a product, by bytes of an element: float32 takes no tensor cores


def steps_of(x: Tensor) -> int:
    """Returns the channels of one step of `row_products`."""
    return _STEPS[x.element_size()]


@triton.jit
def power_of_two(n):
    """Returns 2^n for n up to 127, 0 from -127 on."""
    return (tl.maximum(n + 127, 0) << 23).to(tl.float32, bitcast=True)


@triton.jit
def near_one(tile, exponent):
    """Returns a tile of rows times the powers of two that bring all of the rows that was seen near 1; squares of rows
    far from 1 would be 0 or infinite.

    Args:
        tile: float32 [rows, channels].
        exponent: int32 [rows], biased, of the largest value before this tile: 1 at first.

    Returns:
        The tile; the exponents; and the powers of two that sums over what came before are to be multiplied by.
    """
    largest = tl.max(tl.abs(tile), 1).to(tl.int32, bitcast=True) >> 23
    now = tl.maximum(exponent, tl.minimum(largest, 253))
    return tile * power_of_two(127 - now)[:, None], now, power_of_two(exponent - now)


@triton.jit
def inverse_norms(rows, live, column, channels, BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr):
    """Returns 1 over the norms of rows, [BLOCK_Q]: 0 of a row of zeros, NaN of one that is not finite.

    Args:
        rows: pointers to them.
        column: the stride of a channel.
    """
    exponent = tl.full([BLOCK_Q], 1, tl.int32)
    squares = tl.zeros([BLOCK_Q], tl.float32)
    for first in range(0, channels, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        mask = live[:, None] & (c < channels)[None, :]
        tile = tl.load(rows[:, None] + c.to(tl.int64)[None, :] * column, mask=mask, other=0.0).to(tl.float32)
        tile, exponent, shift = near_one(tile, exponent)
        squares = squares * shift * shift + tl.sum(tile * tile, 1)
    inverse = power_of_two(127 - exponent) / tl.sqrt(tl.where(squares == 0.0, 1.0, squares))
    inverse = tl.where(squares == 0.0, 0.0, inverse)
    return tl.where(squares < INFINITY, inverse, float("nan"))


@triton.jit
def row_products(
    a, b, a_live, b_live, a_column, b_column, channels, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Returns the products of rows with rows, float32 [BLOCK_Q, BLOCK_K].

    Args:
        a, b: pointers to the rows, [BLOCK_Q] and [BLOCK_K].
        a_column, b_column: the strides of a channel.
    """
    dots = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    for first in range(0, channels, STEP):
        c = first + tl.arange(0, STEP)
        inside = c < channels
        at = c.to(tl.int64)[None, :] * a_column
        x = tl.load(a[:, None] + at, mask=a_live[:, None] & inside[None, :], other=0.0)
        at = c.to(tl.int64)[:, None] * b_column
        y = tl.load(b[None, :] + at, mask=b_live[None, :] & inside[:, None], other=0.0)
        dots = tl.dot(x, y, dots, input_precision=PRECISION)
    return dots


@triton.jit
def norm_kernel(x, index, out, strides, rows, channels, BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr):
    """Store 1 over the norms of some rows: see `inverse_norms`. Grid: (tiles of rows,)."""
    number = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    row = number
    if index is not None:
        row = tl.load(index + number, mask=number < rows, other=0)
    inverse = inverse_norms(x + row_offsets(row, strides), number < rows, strides.column, channels, BLOCK_Q, BLOCK_C)
    tl.store(out + number, inverse, mask=number < rows)


def norms_of(x: Tensor, index: Tensor | None, plan: Config) -> Tensor:
    """Returns 1 over the norms of rows, float32 [rows]: see `inverse_norms`.

    Args:
        x: [tokens, C] or [images, tokens, C], of any strides.
        index: integers [rows]; None: all rows.
    """
    rows = x.shape[:-1].numel() if index is None else len(index)
    out = x.new_empty(rows, dtype=torch.float32)
    launch(
        norm_kernel, (ceil_div(rows, plan.block_q),), plan,
        x, index, out, strides_of(x), rows, x.shape[-1], BLOCK_Q=plan.block_q, BLOCK_C=plan.block_k,
    )  # fmt: skip
    return out
