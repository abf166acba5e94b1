"""The arguments of the Triton contrastive kernels as named tuples, which launchers fill and kernels read by field.

`Any` is a number or a tensor on the host, and Triton's tensor in a kernel.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Strides(NamedTuple):
    """Strides of the features in units of STRIDE_UNIT elements; channels are contiguous."""

    image_row: Any
    image_query: Any
    text_row: Any


NO_DIAGONAL = -(2**31 - 16)  # text j + NO_DIAGONAL is below 0 for every j


class Sizes(NamedTuple):
    """The part of the logits that a launch covers.

    Args:
        first_row, end_row: the images first_row <= i < end_row.
        columns: the number of texts.
        diagonal: text j is the positive of image j + diagonal; `NO_DIAGONAL`: of none.
        row_tiles, column_tiles: the number of tiles down and across.
    """

    first_row: Any
    end_row: Any
    columns: Any
    diagonal: Any
    row_tiles: Any
    column_tiles: Any


class Codes(NamedTuple):
    """int32 codes of the images and of the texts, equal where their ids are.

    The code of an image whose id no text has is -1.
    """

    image: Any
    text: Any


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


# What kernels compute, passed between their functions.


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
