"""Gradients of hidden, weight and bias from those of logits: matrix products bounded by the rows that take part.

A library's product would multiply rows that take no part too: how many do, only the device knows.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mmkernels.ops.common.triton.launch import ceil_div
from mmkernels.ops.linear.triton.arguments import Buffer
from mmkernels.ops.linear.triton.call import Head, descriptor, has_copy_engine
from mmkernels.ops.linear.triton.tiles import hidden_tile, live_rows, place_of, weight_tile
from mmkernels.plan import Config
from mmkernels.runtime.triton import launch

SPLIT_BYTES = 2**27  # of hidden's sums, where several programs share a tile
_MOST_SPLITS = 8
_BUSY = 0.9  # the share of programs that should have a tile to work on
_LEAST_STEPS = 16  # of a split
_STORE = Config(16, 256, 4, 1)
_SUM = Config(32, 128, 4, 1)


@triton.jit
def gradients_of_rows(gradient, row, column, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr):
    """Returns [ROWS, COLUMNS] of a `Buffer`."""
    if TMA:
        x = gradient.load([row, column])
    else:
        i, j = (row + tl.arange(0, ROWS)).to(tl.int64), column + tl.arange(0, COLUMNS)
        x = tl.load(gradient + i[:, None] * stride + j[None, :])
    return x


@triton.jit
def hidden_gradient_kernel(
    gradient, stride, weight, sums, strides, extent, splits, split_tokens, dim,
    FIRST: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Add to ``sums`` the gradients of an extent's logits times the weight; FIRST: write it. Grid: (programs,).

    gradient, stride: a `Buffer`. sums: float32 [splits, rows, dim]; each takes `split_tokens` of the extent's tokens.
    """
    BLOCK_Q: tl.constexpr = TILE.BLOCK_Q
    BLOCK_K: tl.constexpr = TILE.BLOCK_K
    STEP: tl.constexpr = TILE.STEP
    row_tiles = tl.cdiv(live_rows(extent), BLOCK_Q)
    column_tiles = tl.cdiv(dim, BLOCK_K)
    tiles = row_tiles * column_tiles
    for t in tl.range(tl.program_id(0), splits * tiles, tl.num_programs(0)):
        split = t // tiles
        place = place_of(t % tiles, row_tiles, column_tiles, 0, 0, TILE)
        begin = split * split_tokens
        end = tl.minimum(begin + split_tokens, extent.end_token - extent.first_token)
        x = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
        for token in range(begin, end, STEP):
            g = gradients_of_rows(gradient, place.row, token, stride, BLOCK_Q, STEP, TILE.TMA)
            first = extent.first_token + token
            w = weight_tile(weight, first, place.column, strides, extent.end_token, STEP, BLOCK_K, TILE)
            x = tl.dot(g, w, x, input_precision=TILE.PRECISION)
        i, c = place.row + tl.arange(0, BLOCK_Q), place.column + tl.arange(0, BLOCK_K)
        inside = (i < extent.rows)[:, None] & (c < dim)[None, :]
        at = sums + (tl.cast(split, tl.int64) * extent.rows + i)[:, None] * dim + c[None, :]
        if not FIRST:
            x += tl.load(at, mask=inside, other=0.0)
        tl.store(at, x, mask=inside)


@triton.jit
def store_hidden_gradient_kernel(
    sums, unit, factor, order, of_hidden, extent, splits, dim, ROWS: tl.constexpr, CHANNELS: tl.constexpr
):
    """Store the sums of all splits times ``factor * unit`` where each row belongs, else 0. Grid: (rows, channels)."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = (n < extent.rows)[:, None] & (c < dim)[None, :]
    live = inside & (n < live_rows(extent))[:, None]
    x = tl.zeros([ROWS, CHANNELS], tl.float32)
    for split in range(0, splits):
        at = (tl.cast(split, tl.int64) * extent.rows + n)[:, None] * dim + c[None, :]
        x += tl.load(sums + at, mask=live, other=0.0)
    if unit is not None:
        x *= tl.load(unit)
    i = tl.load(order + extent.first_row + n, mask=n < extent.rows, other=0)
    x = tl.where(live, x * factor, 0.0)
    tl.store(of_hidden + i[:, None] * dim + c[None, :], x.to(of_hidden.dtype.element_ty), mask=inside)


@triton.jit
def weight_gradient_kernel(
    gradient, stride, hidden, sums, unit, factor, of_weight, strides, extent, dim,
    FIRST: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Store the gradient of the weight of an extent's tokens times ``factor * unit``. Grid: (programs,).

    gradient, stride: a `Buffer`.
    of_weight: [V, dim], receives the sum over all rows, which the launch with the last of them has.
    sums: float32 [V, dim], between launches; None: this launch has all rows. FIRST: the launch with the first rows,
        which writes; others add.
    """
    BLOCK_Q: tl.constexpr = TILE.BLOCK_Q
    BLOCK_K: tl.constexpr = TILE.BLOCK_K
    STEP: tl.constexpr = TILE.STEP
    live_count = live_rows(extent)
    last = tl.load(extent.count) <= extent.first_row + extent.rows
    tokens = extent.end_token - extent.first_token
    row_tiles, column_tiles = tl.cdiv(tokens, BLOCK_Q), tl.cdiv(dim, BLOCK_K)
    tiles = row_tiles * column_tiles
    if not FIRST:
        tiles = tl.where(live_count > 0, tiles, 0)
    for t in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        place = place_of(t, row_tiles, column_tiles, 0, 0, TILE)
        x = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
        for row in range(0, live_count, STEP):
            g = gradients_of_rows(gradient, row, place.row, stride, STEP, BLOCK_Q, TILE.TMA)
            h = hidden_tile(
                hidden, extent.first_row + row, place.column, strides, STEP, BLOCK_K, TILE
            )  # fmt: skip
            x = tl.dot(tl.trans(g), h, x, input_precision=TILE.PRECISION)
        x *= factor
        if unit is not None:
            x *= tl.load(unit)
        j, c = place.row + tl.arange(0, BLOCK_Q), place.column + tl.arange(0, BLOCK_K)
        inside = (j < tokens)[:, None] & (c < dim)[None, :]
        at = (extent.first_token + j).to(tl.int64)[:, None] * dim + c[None, :]
        if not FIRST:
            x += tl.load(sums + at, mask=inside, other=0.0)
        if sums is None:
            tl.store(of_weight + at, x.to(of_weight.dtype.element_ty), mask=inside)
        else:
            if last:
                tl.store(of_weight + at, x.to(of_weight.dtype.element_ty), mask=inside)
            else:
                tl.store(sums + at, x, mask=inside)


@triton.jit
def sum_bias_gradient_kernel(
    partials, stride, unit, factor, of_bias, extent,
    FIRST: tl.constexpr, BLOCK_Q: tl.constexpr, TILES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Add the sums of tiles' columns times ``factor * unit`` to the bias' gradient; FIRST: write it. Grid: (columns,).

    partials: float32 [tiles down of BLOCK_Q rows, columns], with a stride. of_bias: float32 [V].
    """
    tokens = extent.end_token - extent.first_token
    j = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = j < tokens
    tiles = tl.cdiv(live_rows(extent), BLOCK_Q)
    x = tl.zeros([COLUMNS], tl.float32)
    for first in range(0, tiles, TILES):
        n = first + tl.arange(0, TILES)
        at = n.to(tl.int64)[:, None] * stride + j[None, :]
        x += tl.sum(tl.load(partials + at, mask=(n < tiles)[:, None] & inside[None, :], other=0.0), 0)
    x *= factor
    if unit is not None:
        x *= tl.load(unit)
    at = of_bias + extent.first_token + j
    if not FIRST:
        x += tl.load(at, mask=inside, other=0.0)
    tl.store(at, x, mask=inside)


class Unit:
    """What the gradients of logits in a buffer are multiplied by.

    Args:
        factor: a number.
        tensor: float32, 0-D, multiplies too; None: 1.
    """

    def __init__(self, factor: float, tensor: Tensor | None = None) -> None:
        self.factor, self.tensor = factor, tensor


class HiddenSums:
    """The gradient of hidden of some packed rows, which grows by products with strips of tokens.

    Where there are fewer tiles than programs, several of them share the tokens of one tile.
    """

    def __init__(self, head: Head, rows: slice, tokens: int) -> None:
        self.head, self.at, self.count = head, rows, rows.stop - rows.start
        plan = head.products
        tiles = ceil_div(self.count, plan.block_q) * ceil_div(head.dim, plan.block_k)
        room = SPLIT_BYTES // (4 * max(1, self.count) * head.dim)
        most = max(1, min(_MOST_SPLITS, room, tokens // (_LEAST_STEPS * head.inner_step)))
        self.splits = splits_of(max(1, tiles), head.programs(plan), most)
        self.sums = head.rows.picked.new_empty(self.splits, self.count, head.dim)

    def add(self, gradient: Buffer, tokens: slice, *, first: bool) -> None:
        head, plan, step = self.head, self.head.products, self.head.inner_step
        width = tokens.stop - tokens.start
        data, tma = gradient.data, head.weight_layout != "none"
        if tma:
            data = descriptor(data, [plan.block_q, step])
        launch(
            hidden_gradient_kernel, head.grid(plan, self.count, head.dim, self.splits), plan,
            data, gradient.stride, head.weight_operand(step, plan.block_k), self.sums, head.strides,
            head.extent(self.at, tokens), self.splits, ceil_div(ceil_div(width, self.splits), step) * step, head.dim,
            FIRST=first, TILE=head.tile(plan, step, tma),
        )  # fmt: skip

    def store(self, of_hidden: Tensor, unit: Unit) -> None:
        """Store the gradient in its rows of a contiguous [T, d]; 0 in rows that take no part."""
        head = self.head
        launch(
            store_hidden_gradient_kernel,
            (ceil_div(self.count, _STORE.block_q), ceil_div(head.dim, _STORE.block_k)), _STORE,
            self.sums, unit.tensor, unit.factor, head.rows.order, of_hidden, head.extent(self.at, head.all_tokens),
            self.splits, head.dim, ROWS=_STORE.block_q, CHANNELS=_STORE.block_k,
        )  # fmt: skip


def splits_of(tiles: int, programs: int, most: int) -> int:
    """Returns the least number of splits that keeps the programs busy, or the one that comes nearest to it."""
    shares = [(tiles * n) / (ceil_div(tiles * n, programs) * programs) for n in range(1, most + 1)]
    return next((n for n, share in enumerate(shares, 1) if share >= _BUSY), shares.index(max(shares)) + 1)


def add_weight_gradient(
    head: Head, gradient: Buffer, rows: slice, tokens: slice, of_weight: Tensor, sums: Tensor | None, unit: Unit, *,
    first: bool,
) -> None:  # fmt: skip
    """Add the weight's gradient of some rows' logits; see `weight_gradient_kernel`."""
    plan, step = head.products, head.inner_step
    data, hidden, tma = gradient.data, head.rows.hidden, has_copy_engine(of_weight)
    if tma:
        data = descriptor(data, [step, plan.block_q])
        hidden = descriptor(hidden, [step, plan.block_k])
    launch(
        weight_gradient_kernel, head.grid(plan, tokens.stop - tokens.start, head.dim), plan,
        data, gradient.stride, hidden, sums, unit.tensor, unit.factor, of_weight, head.strides,
        head.extent(rows, tokens), head.dim, FIRST=first, TILE=head.tile(plan, step, tma),
    )  # fmt: skip


def add_bias_gradient(
    head: Head, partials: Tensor, rows: slice, tokens: slice, of_bias: Tensor, unit: Unit, *, first: bool
) -> None:
    """Add the bias' gradient; see `sum_bias_gradient_kernel`."""
    launch(
        sum_bias_gradient_kernel, (ceil_div(tokens.stop - tokens.start, _SUM.block_k),), _SUM,
        partials, partials.stride(0), unit.tensor, unit.factor, of_bias, head.extent(rows, tokens),
        FIRST=first, BLOCK_Q=head.logits.block_q, TILES=_SUM.block_q, COLUMNS=_SUM.block_k,
    )  # fmt: skip
