"""What the Triton linear kernels share: the order of tiles, tiles of logits, what softcap and temperature make of them.

Kernels are persistent: program p of P handles tiles p, p + P, p + 2P, ... How many tiles there are follows from the
number of rows that take part, which only the device knows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mmkernels.ops.common.triton.constants import INFINITY, LOG2E
from mmkernels.ops.linear.triton.arguments import Place


@triton.jit
def live_rows(extent):
    """Returns how many of an extent's rows take part."""
    rows = tl.minimum(tl.load(extent.count) - extent.first_row, extent.rows)
    return tl.maximum(rows, 0).to(tl.int32)


@triton.jit
def place_of(t, row_tiles, column_tiles, row, column, TILE: tl.constexpr):
    """Returns the `Place` of the t-th tile of a matrix that begins at `row` and `column`.

    Tiles come in groups of GROUP tiles down, and within a group column by column: tiles that are computed at one time
    share their rows and their columns, so that both operands stay in the cache.
    """
    of_group = TILE.GROUP * column_tiles
    first = t // of_group * TILE.GROUP
    down = tl.minimum(row_tiles - first, TILE.GROUP)
    inside = t % of_group
    row_tile, column_tile = first + inside % down, inside // down
    place = Place(row_tile, column_tile, row + row_tile * TILE.BLOCK_Q, column + column_tile * TILE.BLOCK_K)
    return place


@triton.jit
def hidden_tile(hidden, row, channel, strides, ROWS: tl.constexpr, CHANNELS: tl.constexpr, TILE: tl.constexpr):
    """Returns [ROWS, CHANNELS] of the packed hidden, whose rows are padded to whole steps."""
    if TILE.TMA:
        x = hidden.load([row, channel])
    else:
        i = (row + tl.arange(0, ROWS)).to(tl.int64)
        c = channel + tl.arange(0, CHANNELS)
        # A tile may hang over the channels of the padded rows.
        x = tl.load(hidden + i[:, None] * strides.hidden + c[None, :], mask=(c < strides.hidden)[None, :], other=0.0)
    return x


@triton.jit
def weight_tile(
    weight, token, channel, strides, end_token, TOKENS: tl.constexpr, CHANNELS: tl.constexpr, TILE: tl.constexpr
):
    """Returns [TOKENS, CHANNELS] of the weight: 0 past the last channel, any token's rows from `end_token` on."""
    if TILE.TMA:
        if TILE.TRANSPOSED:
            x = tl.trans(weight.load([channel, token]))
        else:
            x = weight.load([token, channel])
    else:
        j = tl.minimum(token + tl.arange(0, TOKENS), end_token - 1).to(tl.int64)
        c = channel + tl.arange(0, CHANNELS)
        pointers = weight + j[:, None] * strides.token + c.to(tl.int64)[None, :] * strides.channel
        if TILE.DIM % CHANNELS == 0:
            x = tl.load(pointers)
        else:
            x = tl.load(pointers, mask=(c < TILE.DIM)[None, :], other=0.0)
    return x


@triton.jit
def logits_tile(hidden, weight, place, strides, extent, TILE: tl.constexpr):
    """Returns the products [BLOCK_Q, BLOCK_K] of hidden and weight; undefined from the last token on."""
    BLOCK_Q: tl.constexpr = TILE.BLOCK_Q
    BLOCK_K: tl.constexpr = TILE.BLOCK_K
    STEP: tl.constexpr = TILE.STEP
    z = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    for channel in range(0, TILE.DIM, STEP):
        x = hidden_tile(hidden, place.row, channel, strides, BLOCK_Q, STEP, TILE)
        w = weight_tile(weight, place.column, channel, strides, extent.end_token, BLOCK_K, STEP, TILE)
        z = tl.dot(x, tl.trans(w), z, input_precision=TILE.PRECISION)
    return z


@triton.jit
def tanh(x):
    """Returns tanh(x) with a relative error of 2e-7: a polynomial of least relative error below 0.65."""
    square = x * x
    near = tl.fma(square, -0.00583539424, 0.0207886593)
    near = tl.fma(square, near, -0.0537965547)
    near = tl.fma(square, near, 0.133322596)
    near = tl.fma(square, near, -0.333333166)
    near = tl.fma(x * square, near, x)
    size = tl.abs(x)
    far = 1 - 2 / (1 + tl.exp2(size * (2 * LOG2E)))
    return tl.where(size < 0.65, near, tl.where(x < 0, -far, far))


@triton.jit
def with_bias(z, bias, j, extent):
    """Returns z [rows, columns] with the bias of tokens j added."""
    if bias is not None:
        z += tl.load(bias + j, mask=j < extent.end_token, other=0.0).to(tl.float32)[None, :]
    return z


@triton.jit
def capped(z, numbers, SOFTCAP: tl.constexpr):
    """Returns the logits y of products z."""
    if SOFTCAP:
        z = tanh(z * numbers.inner)
    return z * numbers.outer


@triton.jit
def exponential(x):
    return tl.exp2(x * LOG2E)


@triton.jit
def hide_past_the_end(y, j, extent):
    """Returns y [rows, columns] with -inf in place of tokens past the end."""
    if tl.max(j, 0) >= extent.end_token:
        y = tl.where((j < extent.end_token)[None, :], y, -INFINITY)
    return y


@triton.jit
def has_target(target, column, COLUMNS: tl.constexpr):
    """Returns whether a target lies among COLUMNS tokens from `column` on."""
    here = (target >= column) & (target < column + COLUMNS)
    return tl.max(here.to(tl.int32), 0) > 0


@triton.jit
def buffer_offsets(place, extent, first_column, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Returns the offsets [ROWS, COLUMNS] of a tile's elements, from column `first_column` on, in a `Buffer`."""
    i = place.row - extent.first_row + tl.arange(0, ROWS)
    j = first_column - extent.first_token + tl.arange(0, COLUMNS)
    return i.to(tl.int64)[:, None] * stride + j[None, :]
