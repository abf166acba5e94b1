"""The arguments of the Triton linear kernels as named tuples, which launchers fill and kernels read by field.

`Any` is a number or a tensor on the host, and Triton's tensor in a kernel. Rows are packed: those that take part come
first, in their order, see `live.pack`.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Extent(NamedTuple):
    """The part of the logits that a launch covers.

    Args:
        count: int64, 0-D, on the device: how many rows take part.
        first_row, rows: the packed rows from `first_row` on, `rows` of them if so many take part.
        first_token, end_token: the tokens first_token <= c < end_token.
    """

    count: Any
    first_row: Any
    rows: Any
    first_token: Any
    end_token: Any


class Strides(NamedTuple):
    """In elements: between packed rows of hidden, between rows of weight, and between its channels."""

    hidden: Any
    token: Any
    channel: Any


class Vectors(NamedTuple):
    """What is added to products or picked among them.

    Args:
        bias: [V]; None: no bias.
        token_weight: float32 [V]; None: no weight.
        targets: int32 [packed rows], -1 where the token is elsewhere.
    """

    bias: Any
    token_weight: Any
    targets: Any


class Numbers(NamedTuple):
    """With a softcap, y is ``outer * tanh(inner * z)``; else ``outer * z``."""

    inner: Any
    outer: Any


class Buffer(NamedTuple):
    """Logits or their gradients in hidden's dtype, [rows, stride], from an extent's first row and token on.

    Args:
        data: a tensor; a kernel that takes a descriptor of it takes both apart, because Triton's launcher passes no
            descriptor in a tuple.
        stride: between two rows, a multiple of the tile's columns.
    """

    data: Any
    stride: Any


class Tile(NamedTuple):
    """What is known when a kernel is compiled: a constexpr.

    Args:
        PRECISION: of the products of float32 operands.
        DIM: channels.
        TMA: both operands come as tensor descriptors.
        TRANSPOSED: the weight's descriptor is of ``weight.mT``, whose rows are contiguous.
        BLOCK_Q, BLOCK_K, STEP: rows and columns of a product's tile, and what one step multiplies of what it sums over.
        GROUP: tiles down that share the tiles across while these are in the cache.
    """

    PRECISION: str
    DIM: int
    TMA: bool
    TRANSPOSED: bool
    BLOCK_Q: int
    BLOCK_K: int
    STEP: int
    GROUP: int


class Fields(NamedTuple):
    """The numbers of the partial results beside REFERENCE and SUM in [fields, tiles, rows], -1: not computed."""

    moment: int
    total: int
    best: int

    @classmethod
    def of(cls, *, moment: bool, total: bool, best: bool) -> Fields:
        wanted = (moment, total, best)
        return cls(*(2 + sum(wanted[:n]) if x else -1 for n, x in enumerate(wanted)))

    @property
    def size(self) -> int:
        """How many fields there are, REFERENCE and SUM included."""
        return 2 + sum(n >= 0 for n in self)


# What kernels compute, passed between their functions.


class Place(NamedTuple):
    """A tile's number down and across, its first packed row and its first column."""

    row_tile: Any
    column_tile: Any
    row: Any
    column: Any
