"""What the Triton contrastive kernels share: a tile of dot products, and which of its pairs belong together.

A launch multiplies some images by all texts of a block. Its kernels are persistent: program p of P handles tiles p,
p + P, p + 2P, ... Each tile is one matrix product of some rows of both, and an epilogue that belongs to the op.

The constant PAIRS says which pairs are positive:

    "none": no pair (hard texts)
    "diagonal": text j and image j + `Sizes.diagonal`
    "code": a pair with equal `Codes`
    "hidden": as "diagonal", and other pairs with equal codes are hidden
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from mmkernels.ops.common.triton.constants import INFINITY, LOG2E

LARGE = tl.constexpr(2.0**20)  # references from which on the product is rounded before the reference is subtracted
_MOST = tl.constexpr(2**31 - 1)


# Arguments of the kernels. `Any` is a number or a tensor on the host, and Triton's tensor in a kernel.


class Strides(NamedTuple):
    """Strides of the features in units of STRIDE_UNIT elements; channels are contiguous."""

    image_row: Any
    image_query: Any
    text_row: Any


class Sizes(NamedTuple):
    """The part of the logits that a launch covers.

    Args:
        first_row, end_row: the images first_row <= i < end_row.
        columns: the number of texts.
        diagonal: text j is the positive of image j + diagonal.
        row_tiles, column_tiles: the number of tiles down and across.
    """

    first_row: Any
    end_row: Any
    columns: Any
    diagonal: Any
    row_tiles: Any
    column_tiles: Any


class Codes(NamedTuple):
    """int32 codes of the images and of the texts, equal where their ids are; None without ids.

    The code of an image whose id no text has is -1.
    """

    image: Any = None
    text: Any = None


class Strip(NamedTuple):
    """Where a launch stores the gradients of its logits.

    Args:
        gradient: [rows, columns]; None: only sums are wanted.
        winner: integers, strided as `gradient`, the winner of each pair; None: images have one query.
        stride: between two rows of both.
    """

    gradient: Any
    winner: Any
    stride: Any


class Tile(NamedTuple):
    """What is known when a kernel is compiled: a constexpr.

    Args:
        QUERIES: of an image.
        PRECISION: of the products of float32 features.
        STRIDE_UNIT: elements in one unit of `Strides`, 8 where all strides allow it: Triton recognises an aligned
            stride only if 16 divides it, so without the unit a stride of 72 prevents loads of 16 bytes.
        DIM: channels.
        TMA: the features come as tensor descriptors.
        BLOCK_Q, BLOCK_K, BLOCK_D: images, texts and channels of one step.
    """

    QUERIES: int
    PRECISION: str
    STRIDE_UNIT: int
    DIM: int
    TMA: bool
    BLOCK_Q: int
    BLOCK_K: int
    BLOCK_D: int


# Positions.


class Corner(NamedTuple):
    """A tile's number down and across, and its first image and text."""

    row_tile: Any
    column_tile: Any
    first_row: Any
    first_column: Any


class Position(NamedTuple):
    """Where a tile or a part of its columns lies.

    Args:
        row_tile, column_tile: the tile's number down and across.
        first_row, first_column: the first image and text.
        i, j: [rows] and [columns], the images and texts, also past the end.
    """

    row_tile: Any
    column_tile: Any
    first_row: Any
    first_column: Any
    i: Any
    j: Any


@triton.jit
def tile_corner(t, sizes, TILE: tl.constexpr):
    """The corner of the t-th tile.

    Consecutive tiles share their texts, so that the texts in use stay in the cache while the images pass.
    """
    row_tiles = tl.cdiv(sizes.end_row - sizes.first_row, TILE.BLOCK_Q)
    row_tile, column_tile = t % row_tiles, t // row_tiles
    corner = Corner(row_tile, column_tile, sizes.first_row + row_tile * TILE.BLOCK_Q, column_tile * TILE.BLOCK_K)
    return corner


@triton.jit
def position(corner, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FIRST: tl.constexpr = 0):
    """The position of a tile's COLUMNS columns from its column FIRST on.

    Called after the product: values that are computed before it occupy registers in the loop over channels.
    """
    first_column = corner.first_column + FIRST
    i, j = corner.first_row + tl.arange(0, ROWS), first_column + tl.arange(0, COLUMNS)
    at = Position(corner.row_tile, corner.column_tile, corner.first_row, first_column, i, j)
    return at


@triton.jit
def split_columns(x, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """The left and the right half of a tile: an epilogue of half a tile needs half of the registers."""
    return tl.split(tl.permute(tl.reshape(x, [BLOCK_Q, 2, BLOCK_K // 2]), (0, 2, 1)))


# Dot products.


@triton.jit
def dots_of_rows(x_rows, y_rows, TILE: tl.constexpr):
    """[BLOCK_Q, BLOCK_K]: dot products of rows given by pointers [BLOCK_Q] and [BLOCK_K]."""
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
    """[BLOCK_Q, BLOCK_K]: dot products of the images' query number `query`; undefined past the end."""
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
    """The largest dot product over an image's queries, NaN if one of them is, and the winner (the first of equals)."""
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
    """``(sign(scale) * dots, abs(scale) * log2(e))``: the largest of these dots has the largest logit."""
    scale = tl.load(logit_scale).to(tl.float32) * LOG2E
    if scale < 0:
        dots = -dots
    return dots, tl.abs(scale)


@triton.jit
def exponents(dots, scale, reference):
    """``dots * scale - reference``: exactly 0 where both are equal, however large they are.

    One fused operation keeps the digits that the product has below the last one of the reference. From 2^20 on these
    digits are no longer small, so there the product is rounded first. The comparison with -3e38 stops a compiler from
    fusing that path too.
    """
    product = dots * scale
    product = tl.where(product < -3.0e38, -3.0e38, product)
    return tl.where(tl.abs(reference) < LARGE, tl.fma(dots, scale, -reference), product - reference)


@triton.jit
def above_zero(scale):
    """The scale, at least the smallest normal number: 0 would turn the -inf of hidden pairs into NaN."""
    return tl.where(scale < 1.2e-38, 1.2e-38, scale)


@triton.jit
def softmax_partial(dots, scale, AXIS: tl.constexpr):
    """A reference for each line along AXIS, and the line's sum of exponentials relative to it."""
    top = tl.ceil(tl.max(dots, AXIS) * scale)
    top = tl.where(top > -INFINITY, top, 0.0)
    return top, tl.sum(tl.exp2(exponents(dots, scale, tl.expand_dims(top, AXIS))), AXIS)


# Which pairs are positive, and which are visible.


@triton.jit
def load_codes(codes, at, sizes):
    """The codes of a tile's images and texts; past the end codes that equal no other."""
    image = tl.load(codes.image + at.i, mask=at.i < sizes.end_row, other=-1)
    text = tl.load(codes.text + at.j, mask=at.j < sizes.columns, other=-2)
    return image, text


@triton.jit
def on_diagonal(at, sizes):
    """Bool [rows, columns]: the pairs that belong together by position."""
    return at.i[:, None] == (at.j + sizes.diagonal)[None, :]


@triton.jit
def crosses_diagonal(at, sizes):
    """Whether a tile has a pair on the diagonal."""
    first = at.first_column + sizes.diagonal
    return (at.first_row < first + at.j.shape[0]) & (first < at.first_row + at.i.shape[0])


@triton.jit
def codes_overlap(codes, at, sizes):
    """Whether a tile may have a pair with equal codes: the ranges of its codes overlap."""
    image, text = load_codes(codes, at, sizes)
    low = tl.min(tl.where(image < 0, _MOST, image), 0)
    text_low = tl.min(tl.where(text < 0, _MOST, text), 0)
    return (low <= tl.max(text, 0)) & (text_low <= tl.max(image, 0))


@triton.jit
def may_have_positives(codes, at, sizes, PAIRS: tl.constexpr):
    """Whether a tile may have a positive pair."""
    near = at.first_row < 0
    if PAIRS == "code":
        near = codes_overlap(codes, at, sizes)
    elif PAIRS != "none":
        near = crosses_diagonal(at, sizes)
    return near


@triton.jit
def positive_pairs(codes, at, sizes, PAIRS: tl.constexpr):
    """Bool [rows, columns]."""
    if PAIRS == "code":
        image, text = load_codes(codes, at, sizes)
        positive = image[:, None] == text[None, :]
    else:
        positive = on_diagonal(at, sizes)
    return positive


@triton.jit
def has_hidden_pairs(codes, at, sizes):
    """Whether ids hide a pair of a tile."""
    hides = codes_overlap(codes, at, sizes)
    if hides:
        image, text = load_codes(codes, at, sizes)
        hidden = (image[:, None] == text[None, :]) & (at.i[:, None] != (at.j + sizes.diagonal)[None, :])
        hides = tl.max(tl.max(hidden.to(tl.int32), 1), 0) > 0
    return hides


@triton.jit
def is_ragged(at, sizes):
    """Whether some rows or columns of a tile lie past the end."""
    return (at.first_row + at.i.shape[0] > sizes.end_row) | (at.first_column + at.j.shape[0] > sizes.columns)


@triton.jit
def visible_pairs(codes, at, sizes, PAIRS: tl.constexpr):
    """Bool [rows, columns]: the pairs that are neither past the end nor hidden."""
    visible = (at.i < sizes.end_row)[:, None] & (at.j < sizes.columns)[None, :]
    if PAIRS == "hidden":
        image, text = load_codes(codes, at, sizes)
        visible = visible & ((image[:, None] != text[None, :]) | on_diagonal(at, sizes))
    return visible


@triton.jit
def fill_invisible(x, codes, at, sizes, fill: tl.constexpr, PAIRS: tl.constexpr):
    """x [rows, columns] with `fill` in place of the pairs that are not visible."""
    masked = is_ragged(at, sizes)
    if PAIRS == "hidden":
        masked = masked | codes_overlap(codes, at, sizes)
    if masked:
        x = tl.where(visible_pairs(codes, at, sizes, PAIRS), x, fill)
    return x


# Results of a tile.


class Lines(NamedTuple):
    """A tile's rows, or its columns, in the partial results [fields, tiles, lines] of one direction.

    Args:
        tile, tiles: the tile's number among those that share these lines, and how many there are.
        n, lines: [BLOCK], each line's number, and how many there are.
        live: bool [BLOCK], the lines that are not past the end.
    """

    tile: Any
    tiles: Any
    n: Any
    lines: Any
    live: Any


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
    """Load one field of a tile's lines."""
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
