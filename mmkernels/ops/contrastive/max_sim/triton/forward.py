"""The late-interaction score in Triton: each query token's best product with a document, and their sums."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.ops.common.triton.constants import INFINITY
from mmkernels.ops.contrastive.max_sim.spec import Arguments
from mmkernels.ops.contrastive.max_sim.triton.call import Call, length_of, load_rows, query_rows, token_pointers
from mmkernels.runtime.triton import launch

_NO_INDEX = tl.constexpr(2**31 - 1)
_NO_TOKEN = tl.constexpr(-1)


@triton.jit
def products(x, x_rows, y_rows, live, exists, TILE: tl.constexpr):
    """Returns the inner products [BLOCK_Q, BLOCK_K] of rows given by pointers; x: the first ones, if they are held."""
    BLOCK_Q: tl.constexpr = TILE.BLOCK_Q  # in a list of Triton 3.6 no field of a constant may stand
    BLOCK_K: tl.constexpr = TILE.BLOCK_K
    dots = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    if TILE.DIM <= TILE.BLOCK_D:
        y = load_rows(y_rows, exists, tl.arange(0, TILE.BLOCK_D), TILE)
        dots = tl.dot(x, tl.trans(y), dots, input_precision=TILE.PRECISION)
    else:
        for first in range(0, TILE.DIM, TILE.BLOCK_D):
            d = first + tl.arange(0, TILE.BLOCK_D)
            x = load_rows(x_rows, live, d, TILE)
            y = load_rows(y_rows, exists, d, TILE)
            dots = tl.dot(x, tl.trans(y), dots, input_precision=TILE.PRECISION)
    return dots


@triton.jit
def max_sim_kernel(
    query, document, query_lengths, document_lengths, partials, index, strides, sizes, query_tiles, tiles,
    TILE: tl.constexpr,
):  # fmt: skip
    """Store the sum of the best products of a tile's query tokens with one document. Grid: (tiles * documents,).

    Consecutive programs share a document, which stays in the cache.

    partials: float32 [query_tiles, queries, documents], paired [query_tiles, queries].
    index: int32 [queries, documents, query_tokens], paired [queries, query_tokens]; None: not stored.
    tiles: of all queries.
    """
    BLOCK_Q: tl.constexpr = TILE.BLOCK_Q
    QUERY_ROWS: tl.constexpr = TILE.QUERY_ROWS
    GROUP: tl.constexpr = BLOCK_Q // QUERY_ROWS
    if TILE.PAIRED:
        t = tl.program_id(0)
        m = t // query_tiles
        documents = 1
        column = 0
    else:
        t = tl.program_id(0) % tiles
        m = tl.program_id(0) // tiles
        documents = sizes.documents
        column = m
    rows = query_rows(t, query_lengths, sizes, TILE)
    any_live = tl.max(rows.live.to(tl.int32), 0)
    length = length_of(document_lengths, m, sizes.document_tokens) * any_live
    x_rows = token_pointers(query, rows.n, rows.i, strides.query, strides.query_token, TILE)
    x = load_rows(x_rows, rows.live, tl.arange(0, TILE.BLOCK_D), TILE)
    best = tl.full([BLOCK_Q], -INFINITY, tl.float32)
    who = tl.zeros([BLOCK_Q], tl.int32)
    nan: tl.constexpr = float("nan")
    for start in range(0, length, TILE.BLOCK_K):
        j = start + tl.arange(0, TILE.BLOCK_K)
        exists = j < length
        y_rows = token_pointers(document, m, j, strides.document, strides.document_token, TILE)
        dots = products(x, x_rows, y_rows, rows.live, exists, TILE)
        if start + TILE.BLOCK_K > length:
            dots = tl.where(exists[None, :], dots, -INFINITY)
        top = tl.max(dots, 1)
        more = (top > best) | ((start == 0) & (top == best))
        if index is not None:
            first = tl.min(tl.where(dots == top[:, None], j[None, :], _NO_INDEX), 1)
            who = tl.where(more, first, who)
        best = tl.where(more, top, best)
        # A maximum may pass over NaN. A sum does not; that of inf and -inf is looked at too.
        total = tl.sum(dots, 1)
        if tl.max((total != total).to(tl.int32), 0) > 0:
            first = tl.min(tl.where(dots != dots, j[None, :], _NO_INDEX), 1)
            turns = (first != _NO_INDEX) & (best == best)
            who = tl.where(turns, first, who)
            best = tl.where(turns, nan, best)
    part = rows.live & (length > 0)
    line = rows.n.to(tl.int64) * documents + column  # [BLOCK_Q], the pair of each query token
    if index is not None:
        inside = (rows.n < sizes.queries) & (rows.i < sizes.query_tokens)
        tl.store(index + line * sizes.query_tokens + rows.i, tl.where(part, who, _NO_TOKEN), mask=inside)
    sums = tl.sum(tl.reshape(tl.where(part, best, 0.0), [GROUP, QUERY_ROWS]), 1)
    n = t // query_tiles * GROUP + tl.arange(0, GROUP)
    line = (tl.cast(t % query_tiles, tl.int64) * sizes.queries + n) * documents + column
    tl.store(partials + line, sums, mask=n < sizes.queries)


def forward(args: Arguments) -> tuple[Tensor, Tensor]:
    """Returns `Results`."""
    query = args.query
    queries, documents = query.shape[0], args.document.shape[0]
    pairs = (queries,) if args.paired else (queries, documents)
    shape = (*pairs, query.shape[1]) if args.keep_index else (0,)
    index = query.new_empty(shape, dtype=torch.int32)
    if not queries or not documents:
        return query.new_empty(pairs, dtype=torch.float32), index
    call = Call(args, "scores")
    partials = query.new_empty(call.query_tiles, *pairs, dtype=torch.float32)
    launch(
        max_sim_kernel, (call.tiles * (1 if args.paired else documents),), call.config,
        *call.tokens, call.query_lengths, call.document_lengths, partials, index if args.keep_index else None,
        call.strides, call.sizes, call.query_tiles, call.tiles, TILE=call.tile,
    )  # fmt: skip
    return partials[0] if call.query_tiles == 1 else partials.sum(0), index
