"""The arguments of the Triton attention kernels as named tuples, which launchers fill and kernels read by field.

What a call does not have is None: a pointer, a whole `Lists`, `Gate` or `Dropout`. Each tuple takes 0.4 us of a launch
on the host.

Strides count elements, or units of elements where a kernel takes ``UNIT`` (see `stride_unit`). They are 0 along a
dimension that is broadcast, and for a tensor that the call does not have: Triton 3.6 loses a constant of a nested tuple
that follows None.

Kernels take a `Layout` and a `HeadDim` as constants. Under Triton 3.6 the field of such a constant is a plain number,
which may be an argument of a function but not an element of a list: write ``zero_tile(BLOCK, DIM.first)``, not
``tl.zeros([BLOCK, DIM.first], ...)``.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Sizes(NamedTuple):
    """The sizes of a call."""

    batch: int
    heads: int  # of the query
    key_heads: int
    q_len: int
    k_len: int


class Strides(NamedTuple):
    """The strides of a tensor [batch, head, row, column]: columns are channels, or keys of a mask or bias."""

    batch: int
    head: int
    row: int
    column: int


NO_STRIDES = Strides(0, 0, 0, 0)


class SplitStrides(NamedTuple):
    """The strides of a gradient in parts, [split, batch, head, row, column]."""

    split: int
    batch: int
    head: int
    row: int
    column: int


class RowStrides(NamedTuple):
    """The strides of a tensor [batch, head, row]."""

    batch: int
    head: int
    row: int


class Masks(NamedTuple):
    """What hides keys: spans, valid keys, a dense mask, and the bias, of which -inf hides.

    Their strides follow, 0 for what the call does not have.
    """

    start: Any
    end: Any
    key_valid: Any
    dense: Any
    bias: Any
    start_batch: int
    start_row: int
    end_batch: int
    end_row: int
    key_valid_batch: int
    key_valid_key: int
    dense_batch: int
    dense_head: int
    dense_row: int
    dense_column: int
    bias_batch: int
    bias_head: int
    bias_row: int
    bias_column: int


class Lists(NamedTuple):
    """The lists of `list_tiles`, and the strides of a problem's batch entry and head in them, counted in lines."""

    tiles: Any
    counts: Any
    batch: int
    head: int


class Gate(NamedTuple):
    """The gate of each query head; a stride of 0 where all heads share it."""

    data: Any
    stride: int


class Dropout(NamedTuple):
    """Probabilities whose random word is below `threshold` are dropped, the others are multiplied by `scale`."""

    seed: Any
    threshold: int
    scale: float


class Layout(NamedTuple):
    """Which queries are the rows of one problem, see tiles.py.

    Args:
        group: query heads for each key head.
        packed: a problem holds all of these, else one.
        shared: a problem holds the queries of all batch entries, which share one key.
    """

    group: int
    packed: bool
    shared: bool


class HeadDim(NamedTuple):
    """A head dim, and the widths of the two tiles that cover it; the second is 0 where one tile does."""

    size: int
    first: int
    second: int


# What kernels compute, passed between their functions.


class Problem(NamedTuple):
    """A problem: its number, its batch entry, its head (of the key if packed, else of the query), its key head."""

    number: Any
    batch: Any
    head: Any
    key_head: Any


class Rows(NamedTuple):
    """The rows of a tile: batch entry, query head and query of each; `live` is false past the last row."""

    batch: Any
    head: Any
    query: Any
    live: Any


class Spans(NamedTuple):
    """The keys start <= j < end that each row of a tile may see."""

    start: Any
    end: Any


class Halves(NamedTuple):
    """A tile [rows, channels] in two tiles of channels; where `HeadDim.second` is 0 the second is not used."""

    first: Any
    second: Any


class State(NamedTuple):
    """The online softmax of each row: its largest score, and its sum of exponentials relative to that."""

    top: Any
    total: Any


class Walk(NamedTuple):
    """The tiles that a program walks over.

    Args:
        partial, full: how many tiles are visible in part and in full.
        first: the first visible tile.
        full_first, full_end: the full tiles, all others up to the last visible one are partial.
        listed: instead of these three a pointer to a line of `Lists`.
        length: of that line.
    """

    partial: Any
    full: Any
    first: Any
    full_first: Any
    full_end: Any
    listed: Any
    length: Any
