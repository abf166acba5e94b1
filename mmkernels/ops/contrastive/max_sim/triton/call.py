"""What the launchers and kernels of the late-interaction score share: strides, sizes, tiles of query tokens."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from mmkernels.ops.common.triton.launch import ceil_div, precision, stride_unit
from mmkernels.ops.contrastive.triton.call import dense_rows
from mmkernels.plan import Config
from mmkernels.runtime.tuning import config

OP = "max_sim"
_CHANNEL_BYTES = 512  # of a row that is held at once
_STEP_BYTES = 128  # of a row in one step of a product, where rows are longer
_LEAST = 16  # rows, columns and channels of a product


class Strides(NamedTuple):
    """Strides of the tokens in units of STRIDE_UNIT elements; channels are contiguous."""

    query: Any
    query_token: Any
    document: Any
    document_token: Any


class Sizes(NamedTuple):
    """Numbers of queries and documents, and of the tokens of each."""

    queries: Any
    documents: Any
    query_tokens: Any
    document_tokens: Any


class Tile(NamedTuple):
    """What is known when a kernel is compiled: a constexpr.

    Args:
        PAIRED: query n meets document n only.
        QUERY_ROWS: of a query in one tile; a tile holds the tokens of BLOCK_Q / QUERY_ROWS queries.
        PRECISION: of the products of float32 tokens.
        STRIDE_UNIT: see `stride_unit`.
        DIM: channels.
        BLOCK_Q, BLOCK_K, BLOCK_D: query tokens, document tokens and channels of one step.
    """

    PAIRED: bool
    QUERY_ROWS: int
    PRECISION: str
    STRIDE_UNIT: int
    DIM: int
    BLOCK_Q: int
    BLOCK_K: int
    BLOCK_D: int


class Rows(NamedTuple):
    """A tile's query tokens: token `i` of query `n` each, which is `live` if it is no padding. All [BLOCK_Q]."""

    n: Any
    i: Any
    live: Any


@triton.jit
def length_of(lengths, n, most):
    """Returns how many tokens n has, 0 to `most`; n: a number, or numbers that are all inside."""
    length = n * 0 + most
    if lengths is not None:
        length = tl.minimum(tl.maximum(tl.load(lengths + n), 0), most).to(tl.int32)
    return length


@triton.jit
def query_rows(t, query_lengths, sizes, TILE: tl.constexpr):
    """Returns the `Rows` of the t-th tile of query tokens."""
    tiles = tl.cdiv(sizes.query_tokens, TILE.QUERY_ROWS)  # of a query
    r = tl.arange(0, TILE.BLOCK_Q)
    n = t // tiles * (TILE.BLOCK_Q // TILE.QUERY_ROWS) + r // TILE.QUERY_ROWS
    i = t % tiles * TILE.QUERY_ROWS + r % TILE.QUERY_ROWS
    length = length_of(query_lengths, tl.minimum(n, sizes.queries - 1), sizes.query_tokens)
    rows = Rows(n, i, (n < sizes.queries) & (i < length))
    return rows


@triton.jit
def load_rows(pointers, live, d, TILE: tl.constexpr):
    """Returns some channels of rows, zeros where one is not live, which is not read; pointers, live: [rows]."""
    if TILE.DIM % TILE.BLOCK_D == 0:
        x = tl.load(pointers[:, None] + d[None, :], mask=live[:, None], other=0.0)
    else:
        x = tl.load(pointers[:, None] + d[None, :], mask=live[:, None] & (d < TILE.DIM)[None, :], other=0.0)
    return x


@triton.jit
def token_pointers(tokens, n, i, stride, token_stride, TILE: tl.constexpr):
    """Returns pointers to the first channels of tokens i of queries or documents n."""
    return tokens + (n.to(tl.int64) * stride + i.to(tl.int64) * token_stride) * TILE.STRIDE_UNIT


class Call:
    """The tensors of a call, as the kernels take them.

    Args:
        args: the op's record.
        kernel: names the configuration.
        whole: a tile holds the tokens of one query, as it does of pairs.
    """

    def __init__(self, args: Any, kernel: str, *, whole: bool = False) -> None:
        query, document = dense_rows(args.query), dense_rows(args.document)
        queries, query_tokens, dim = query.shape
        self.query, self.document = query, document
        self.query_lengths, self.document_lengths = (
            None if x is None else x.contiguous() for x in (args.query_lengths, args.document_lengths)
        )
        self.sizes = Sizes(queries, document.shape[0], query_tokens, document.shape[1])
        self.config: Config = config(OP, kernel, query.device, query.dtype, dim)
        size = query.element_size()
        channels = max(_LEAST, triton.next_power_of_2(dim))
        strides = (*query.stride()[:2], *document.stride()[:2])
        unit = stride_unit(strides)
        self.strides = Strides(*(n // unit for n in strides))
        whole = whole or args.paired
        rows = min(self.config.block_q, max(_LEAST if whole else 1, triton.next_power_of_2(query_tokens)))
        self.tile = Tile(
            PAIRED=args.paired,
            QUERY_ROWS=rows,
            PRECISION=precision(query.dtype),
            STRIDE_UNIT=unit,
            DIM=dim,
            BLOCK_Q=rows if whole else self.config.block_q,
            BLOCK_K=self.config.block_k,
            BLOCK_D=channels if channels * size <= _CHANNEL_BYTES else _STEP_BYTES // size,
        )

    @property
    def query_tiles(self) -> int:
        """The tiles of one query, or 1 where a tile holds several queries."""
        return ceil_div(self.sizes.query_tokens, self.tile.QUERY_ROWS)

    @property
    def tiles(self) -> int:
        """All tiles of query tokens."""
        return ceil_div(self.sizes.queries, self.tile.BLOCK_Q // self.tile.QUERY_ROWS) * self.query_tiles

    @property
    def tokens(self) -> tuple[Tensor, Tensor]:
        return self.query, self.document
