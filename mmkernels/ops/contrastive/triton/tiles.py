"""What the Triton contrastive kernels share: a tile of inner products, and which of its pairs belong together.

A launch covers a block: some images against some texts. Its programs walk over the block's tiles, each the whole
matrix product of some rows of both; an epilogue makes of it what the op is about. Arguments come in tuples:

    sizes: first image, past-the-last image, texts, and the number of the image whose text (by place) is the first
    strides: image's row and query, text's row, in UNITs: 8 elements where all divide by that, which Triton does not
        find out about a stride of 72 by itself, so that rows are fetched 16 bytes at a time; channels lie side by side
    codes: int32 of images and of texts, equal where their ids are (-1: an image whose id no text has); None, None
        without ids

PAIRS says what belongs together: "none" of the block (hard texts), what has one "place", what has one "code", or
"hidden": what has one place, and other pairs of one code take no part.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mmkernels.ops.common.triton.constants import INFINITY, LOG2E

LARGE = tl.constexpr(2.0**20)  # references from which on exponents are computed with care
_MOST = tl.constexpr(2**31 - 1)


@triton.jit
def tile_of(t, sizes, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """First image and first text of a block's t-th tile, and the tile's number in both directions.

    Tiles that are worked on at one time have few texts, so that they lie in the cache for all images.
    """
    row_tiles = tl.cdiv(sizes[1] - sizes[0], BLOCK_Q)
    row_tile, column_tile = t % row_tiles, t // row_tiles
    return sizes[0] + row_tile * BLOCK_Q, column_tile * BLOCK_K, row_tile, column_tile


# Inner products.


@triton.jit
def product_of_rows(
    x_rows, y_rows, PRECISION: tl.constexpr, DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``[BLOCK_Q, BLOCK_K]`` of the rows that the pointers are of."""
    dots = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    for first in range(0, DIM, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        if DIM % BLOCK_D == 0:
            x = tl.load(x_rows[:, None] + d[None, :])
            y = tl.load(y_rows[:, None] + d[None, :])
        else:
            x = tl.load(x_rows[:, None] + d[None, :], mask=(d < DIM)[None, :], other=0.0)
            y = tl.load(y_rows[:, None] + d[None, :], mask=(d < DIM)[None, :], other=0.0)
        dots = tl.dot(x, tl.trans(y), dots, input_precision=PRECISION)
    return dots


@triton.jit
def products(
    image, text, query, first_row, first_column, strides, sizes,
    QUERIES: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr, DIM: tl.constexpr, TMA: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``[BLOCK_Q, BLOCK_K]`` of one of an image's queries; past the end it holds whatever."""
    if TMA:
        dots = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
        for d in range(0, DIM, BLOCK_D):
            if QUERIES == 1:
                x = image.load([first_row, d])
            else:
                x = image.load([first_row, query, d]).reshape(BLOCK_Q, BLOCK_D)
            y = text.load([first_column, d])
            dots = tl.dot(x, tl.trans(y), dots, input_precision=PRECISION)
    else:
        # Rows past the end are the last one again: no masks in the loop.
        i = tl.minimum(first_row + tl.arange(0, BLOCK_Q), sizes[1] - 1).to(tl.int64)
        j = tl.minimum(first_column + tl.arange(0, BLOCK_K), sizes[2] - 1).to(tl.int64)
        rows = image + (i * strides[0] + query.to(tl.int64) * strides[1]) * UNIT
        columns = text + j * strides[2] * UNIT
        dots = product_of_rows(rows, columns, PRECISION, DIM, BLOCK_Q, BLOCK_K, BLOCK_D)
    return dots


@triton.jit
def best_products(
    image, text, first_row, first_column, strides, sizes,
    QUERIES: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr, DIM: tl.constexpr, TMA: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The largest over an image's queries, NaN if one is, and which (of equal ones the first)."""
    zero = tl.program_id(0) * 0
    best = products(
        image, text, zero, first_row, first_column, strides, sizes,
        QUERIES, PRECISION, UNIT, DIM, TMA, BLOCK_Q, BLOCK_K, BLOCK_D,
    )  # fmt: skip
    winner = tl.zeros([BLOCK_Q, BLOCK_K], tl.int32)
    if QUERIES > 1:
        for query in range(1, QUERIES):
            dots = products(
                image, text, zero + query, first_row, first_column, strides, sizes,
                QUERIES, PRECISION, UNIT, DIM, TMA, BLOCK_Q, BLOCK_K, BLOCK_D,
            )  # fmt: skip
            more = (dots > best) | ((dots != dots) & (best == best))
            best = tl.where(more, dots, best)
            winner = tl.where(more, query, winner)
    return best, winner


@triton.jit
def halves(x, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """The left and the right half of a tile's columns: an epilogue that holds much beside it fits into registers."""
    return tl.split(tl.permute(tl.reshape(x, [BLOCK_Q, 2, BLOCK_K // 2]), (0, 2, 1)))


@triton.jit
def turned(dots, logit_scale):
    """Products and the scale of base-2 logits without its sign, which the products take over."""
    scale = tl.load(logit_scale).to(tl.float32) * LOG2E
    if scale < 0:
        dots = -dots
    return dots, tl.abs(scale)


@triton.jit
def exponents(dots, scale, reference):
    """Base-2 logits less their reference: 0 where both are the same, however large they are.

    In one operation, which keeps the digits that the product has below the reference's last one. Of logits beyond 2^20
    these are no longer small: there the product is rounded first. (The comparison keeps a compiler from one operation.)
    """
    product = dots * scale
    product = tl.where(product < -3.0e38, -3.0e38, product)
    return tl.where(tl.abs(reference) < LARGE, tl.fma(dots, scale, -reference), product - reference)


@triton.jit
def above_zero(scale):
    """A scale of 0 as the least number, with which -inf for what is masked stays -inf."""
    return tl.where(scale < 1.2e-38, 1.2e-38, scale)


# Which pairs belong together, and which take part.


@triton.jit
def load_codes(codes, i, j, sizes):
    """Of a tile's images and texts; past the end codes that equal none."""
    image = tl.load(codes[0] + i, mask=i < sizes[1], other=-1)
    text = tl.load(codes[1] + j, mask=j < sizes[2], other=-2)
    return image, text


@triton.jit
def near_place(first_row, first_column, sizes, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """Whether a tile has a pair of one place."""
    first = first_column + sizes[3]
    return (first_row < first + BLOCK_K) & (first < first_row + BLOCK_Q)


@triton.jit
def near_code(codes, i, j, sizes):
    """Whether a tile may have a pair of one code: the ranges of its codes overlap."""
    image, text = load_codes(codes, i, j, sizes)
    low = tl.min(tl.where(image < 0, _MOST, image), 0)
    text_low = tl.min(tl.where(text < 0, _MOST, text), 0)
    return (low <= tl.max(text, 0)) & (text_low <= tl.max(image, 0))


@triton.jit
def near_positive(codes, i, j, first_row, first_column, sizes, PAIRS: tl.constexpr, BLOCK_Q: tl.constexpr,
                  BLOCK_K: tl.constexpr):  # fmt: skip
    """Whether a tile may have a positive."""
    near = first_row < 0
    if PAIRS == "code":
        near = near_code(codes, i, j, sizes)
    elif PAIRS != "none":
        near = near_place(first_row, first_column, sizes, BLOCK_Q, BLOCK_K)
    return near


@triton.jit
def positives(codes, i, j, sizes, PAIRS: tl.constexpr):
    """Bool ``[rows, columns]``."""
    if PAIRS == "code":
        image, text = load_codes(codes, i, j, sizes)
        found = image[:, None] == text[None, :]
    else:
        found = i[:, None] == (j + sizes[3])[None, :]
    return found


@triton.jit
def hangs_over(first_row, first_column, sizes, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """Whether some rows or columns of a tile are past the end."""
    return (first_row + BLOCK_Q > sizes[1]) | (first_column + BLOCK_K > sizes[2])


@triton.jit
def hides(codes, i, j, sizes):
    """Whether ids hide some pair of a tile."""
    found = near_code(codes, i, j, sizes)
    if found:
        image, text = load_codes(codes, i, j, sizes)
        hidden = (image[:, None] == text[None, :]) & (i[:, None] != (j + sizes[3])[None, :])
        found = tl.max(tl.max(hidden.to(tl.int32), 1), 0) > 0
    return found


@triton.jit
def taking_part(codes, i, j, sizes, PAIRS: tl.constexpr):
    """Bool ``[rows, columns]``."""
    keep = (i < sizes[1])[:, None] & (j < sizes[2])[None, :]
    if PAIRS == "hidden":
        image, text = load_codes(codes, i, j, sizes)
        keep = keep & ((image[:, None] != text[None, :]) | (i[:, None] == (j + sizes[3])[None, :]))
    return keep


# Results of a tile.


@triton.jit
def store_part(target, field, tile, tiles, n, count, live, x):
    """One field of one tile's part of a direction, in float32 [fields, tiles, count]."""
    place = (tl.cast(field, tl.int64) * tiles + tile) * count + n
    tl.store(target + place, x.to(tl.float32), mask=live)


@triton.jit
def load_part(source, field, tile, tiles, n, count, live, other):
    """The counterpart of `store_part`."""
    place = (tl.cast(field, tl.int64) * tiles + tile) * count + n
    return tl.load(source + place, mask=live, other=other)


@triton.jit
def store_gradients(strip, winners, strip_strides, x, winner, i, j, sizes):
    """A tile of gradients of logits, and which query each is of where `winners` is there."""
    place = ((i - sizes[0]).to(tl.int64) * strip_strides[0])[:, None] + j[None, :]
    there = (i < sizes[1])[:, None] & (j < sizes[2])[None, :]
    tl.store(strip + place, x.to(strip.dtype.element_ty), mask=there)
    if winners is not None:
        tl.store(winners + place, winner.to(winners.dtype.element_ty), mask=there)


@triton.jit
def masked_dots(dots, codes, i, j, first_row, first_column, sizes, fill: tl.constexpr, PAIRS: tl.constexpr,
                BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """`fill` in place of what takes no part."""
    masked = hangs_over(first_row, first_column, sizes, BLOCK_Q, BLOCK_K)
    if PAIRS == "hidden":
        masked = masked | near_code(codes, i, j, sizes)
    if masked:
        dots = tl.where(taking_part(codes, i, j, sizes, PAIRS), dots, fill)
    return dots


@triton.jit
def softmax_part(dots, scale, AXIS: tl.constexpr):
    """A reference for each line, and its sum of exponentials relative to that."""
    top = tl.ceil(tl.max(dots, AXIS) * scale)
    top = tl.where(top > -INFINITY, top, 0.0)
    return top, tl.sum(tl.exp2(exponents(dots, scale, tl.expand_dims(top, AXIS))), AXIS)
