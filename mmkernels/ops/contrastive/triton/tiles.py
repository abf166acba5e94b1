"""What the Triton contrastive kernels share: a tile of dot products, its logits, and where its results are stored.

A launch multiplies some images by all texts of a block. Its kernels are persistent: program p of P handles tiles p,
p + P, p + 2P, ... Each tile is one matrix product of some rows of both, and an epilogue that belongs to the op.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mmkernels.ops.common.triton.constants import INFINITY, LOG2E
from mmkernels.ops.contrastive.triton.arguments import Corner, Lines, Position

LARGE = tl.constexpr(2.0**20)  # references from which on the product is rounded before the reference is subtracted


# Positions.


@triton.jit
def tile_corner(t, sizes, TILE: tl.constexpr):
    """Returns the `Corner` of the t-th tile.

    Consecutive tiles share their texts, so that the texts in use stay in the cache while the images pass.
    """
    row_tiles = tl.cdiv(sizes.end_row - sizes.first_row, TILE.BLOCK_Q)
    row_tile, column_tile = t % row_tiles, t // row_tiles
    corner = Corner(row_tile, column_tile, sizes.first_row + row_tile * TILE.BLOCK_Q, column_tile * TILE.BLOCK_K)
    return corner


@triton.jit
def position(corner, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FIRST: tl.constexpr = 0):
    """Returns the `Position` of a tile's COLUMNS columns from its column FIRST on.

    Called after the product: values that are computed before it occupy registers in the loop over channels.
    """
    first_column = corner.first_column + FIRST
    i, j = corner.first_row + tl.arange(0, ROWS), first_column + tl.arange(0, COLUMNS)
    at = Position(corner.row_tile, corner.column_tile, corner.first_row, first_column, i, j)
    return at


# Dot products.


@triton.jit
def dots_of_rows(x_rows, y_rows, TILE: tl.constexpr):
    """Returns the dot products [BLOCK_Q, BLOCK_K] of rows given by pointers [BLOCK_Q] and [BLOCK_K]."""
    BLOCK_Q: tl.constexpr = TILE.BLOCK_Q
    BLOCK_K: tl.constexpr = TILE.BLOCK_K
    dots = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    for first in range(0, TILE.DIM, TILE.BLOCK_D):
        d = first + tl.arange(0, TILE.BLOCK_D)
        if TILE.DIM % TILE.BLOCK_D == 0:
            x = tl.load(x_rows[:, None] + d[None, :])
            y = tl.load(y_rows[:, None] + d[None, :])
        else:
            x = tl.load(x_rows[:, None] + d[None, :], mask=(d < TILE.DIM)[None, :], other=0.0)
            y = tl.load(y_rows[:, None] + d[None, :], mask=(d < TILE.DIM)[None, :], other=0.0)
        dots = tl.dot(x, tl.trans(y), dots, input_precision=TILE.PRECISION)
    return dots


@triton.jit
def query_dots(image, text, query, corner, strides, sizes, TILE: tl.constexpr):
    """Returns the dot products [BLOCK_Q, BLOCK_K] of the images' query number `query`; undefined past the end."""
    BLOCK_Q: tl.constexpr = TILE.BLOCK_Q
    BLOCK_K: tl.constexpr = TILE.BLOCK_K
    BLOCK_D: tl.constexpr = TILE.BLOCK_D
    if TILE.TMA:
        dots = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
        for d in range(0, TILE.DIM, BLOCK_D):
            if TILE.QUERIES == 1:
                x = image.load([corner.first_row, d])
            else:
                x = image.load([corner.first_row, query, d]).reshape(BLOCK_Q, BLOCK_D)
            y = text.load([corner.first_column, d])
            dots = tl.dot(x, tl.trans(y), dots, input_precision=TILE.PRECISION)
    else:
        # Rows past the end repeat the last row, so that the loop needs no mask for rows.
        i = tl.minimum(corner.first_row + tl.arange(0, BLOCK_Q), sizes.end_row - 1).to(tl.int64)
        j = tl.minimum(corner.first_column + tl.arange(0, BLOCK_K), sizes.columns - 1).to(tl.int64)
        rows = image + (i * strides.image_row + query.to(tl.int64) * strides.image_query) * TILE.STRIDE_UNIT
        columns = text + j * strides.text_row * TILE.STRIDE_UNIT
        dots = dots_of_rows(rows, columns, TILE)
    return dots


@triton.jit
def best_dots(image, text, corner, strides, sizes, TILE: tl.constexpr):
    """Returns the largest dot product over an image's queries, NaN if one of them is, and the first that has it."""
    BLOCK_Q: tl.constexpr = TILE.BLOCK_Q
    BLOCK_K: tl.constexpr = TILE.BLOCK_K
    zero = tl.program_id(0) * 0
    best = query_dots(image, text, zero, corner, strides, sizes, TILE)
    winner = tl.zeros([BLOCK_Q, BLOCK_K], tl.int32)
    if TILE.QUERIES > 1:
        for query in range(1, TILE.QUERIES):
            dots = query_dots(image, text, zero + query, corner, strides, sizes, TILE)
            more = (dots > best) | ((dots != dots) & (best == best))
            best = tl.where(more, dots, best)
            winner = tl.where(more, query, winner)
    return best, winner


# Logits to the base 2.


@triton.jit
def fold_sign(dots, logit_scale):
    """Returns ``sign(scale) * dots, abs(scale) * log2(e)``: the largest of these dots has the largest logit."""
    scale = tl.load(logit_scale).to(tl.float32) * LOG2E
    if scale < 0:
        dots = -dots
    return dots, tl.abs(scale)


@triton.jit
def exponents(dots, scale, reference):
    """Returns ``dots * scale - reference``: exactly 0 where both are equal, however large they are.

    One fused operation keeps the digits that the product has below the last one of the reference. From 2^20 on these
    digits are no longer small, so there the product is rounded first. The comparison with -3e38 stops a compiler from
    fusing that path too.
    """
    product = dots * scale
    product = tl.where(product < -3.0e38, -3.0e38, product)
    return tl.where(tl.abs(reference) < LARGE, tl.fma(dots, scale, -reference), product - reference)


@triton.jit
def above_zero(scale):
    """Returns the scale, at least the smallest normal number: 0 would turn the -inf of hidden pairs into NaN."""
    return tl.where(scale < 1.2e-38, 1.2e-38, scale)


@triton.jit
def softmax_partial(dots, scale, AXIS: tl.constexpr):
    """Returns a reference for each line along AXIS, and the line's sum of exponentials relative to it."""
    top = tl.ceil(tl.max(dots, AXIS) * scale)
    top = tl.where(top > -INFINITY, top, 0.0)
    return top, tl.sum(tl.exp2(exponents(dots, scale, tl.expand_dims(top, AXIS))), AXIS)


# Results of a tile.


@triton.jit
def row_lines(at, sizes):
    live = at.i < sizes.end_row
    n, lines = at.i - sizes.first_row, sizes.end_row - sizes.first_row
    rows = Lines(at.column_tile, sizes.column_tiles, n, lines, live)
    return rows


@triton.jit
def column_lines(at, sizes):
    columns = Lines(at.row_tile, sizes.row_tiles, at.j, sizes.columns, at.j < sizes.columns)
    return columns


@triton.jit
def store_partial(target, field, lines, x):
    """Store one field of a tile's lines."""
    target += (tl.cast(field, tl.int64) * lines.tiles + lines.tile) * lines.lines
    tl.store(target + lines.n, x.to(target.dtype.element_ty), mask=lines.live)


@triton.jit
def load_partial(source, field, lines, other):
    """Returns one field of a tile's lines."""
    source += (tl.cast(field, tl.int64) * lines.tiles + lines.tile) * lines.lines
    return tl.load(source + lines.n, mask=lines.live, other=other)


@triton.jit
def store_gradients(strip, x, winner, at, sizes):
    """Store a tile of gradients of logits, and its winners where `strip` has room for them."""
    offset = ((at.i - sizes.first_row).to(tl.int64) * strip.stride)[:, None] + at.j[None, :]
    inside = (at.i < sizes.end_row)[:, None] & (at.j < sizes.columns)[None, :]
    tl.store(strip.gradient + offset, x.to(strip.gradient.dtype.element_ty), mask=inside)
    if strip.winner is not None:
        tl.store(strip.winner + offset, winner.to(strip.winner.dtype.element_ty), mask=inside)
