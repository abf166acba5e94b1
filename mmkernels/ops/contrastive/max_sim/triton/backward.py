"""The gradients of the late-interaction score in Triton, from each query token's best document token.

A query token's gradient is a sum of rows of documents, which are fetched. A document token's is a sum over the query
tokens whose best it is, in the order of queries: a product with a matrix of zeros and ones, so that no two programs add
to one row.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.ops.common.results import or_empty
from mmkernels.ops.common.triton.constants import INFINITY
from mmkernels.ops.common.triton.launch import ceil_div
from mmkernels.ops.contrastive.max_sim.triton.call import Call, load_rows, query_rows, token_pointers
from mmkernels.runtime.triton import launch


@triton.jit
def query_gradient_kernel(
    document, index, flow, gradient, query_lengths, strides, sizes, flow_strides, TILE: tl.constexpr
):
    """Store some channels of the gradients of a tile's query tokens. Grid: (tiles, steps of channels).

    index: see `max_sim_kernel`; flow: [queries, documents], paired [queries]; gradient: [queries, query_tokens, DIM].
    """
    rows = query_rows(tl.program_id(0), query_lengths, sizes, TILE)
    d = tl.program_id(1) * TILE.BLOCK_D + tl.arange(0, TILE.BLOCK_D)
    BLOCK_Q: tl.constexpr = TILE.BLOCK_Q  # in a list of Triton 3.6 no field of a constant may stand
    BLOCK_D: tl.constexpr = TILE.BLOCK_D
    total = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    documents = 1 if TILE.PAIRED else sizes.documents
    for column in range(0, documents):
        m = rows.n if TILE.PAIRED else column + rows.n * 0
        pair = rows.n.to(tl.int64) * documents + column
        who = tl.load(index + pair * sizes.query_tokens + rows.i, mask=rows.live, other=-1)
        taken = who >= 0
        weight = tl.load(flow + rows.n.to(tl.int64) * flow_strides[0] + column * flow_strides[1], mask=taken, other=0.0)
        y_rows = token_pointers(document, m, tl.maximum(who, 0), strides.document, strides.document_token, TILE)
        y = load_rows(y_rows, taken, d, TILE).to(tl.float32)
        total += y * weight.to(tl.float32)[:, None]
    inside = (rows.n < sizes.queries) & (rows.i < sizes.query_tokens)
    row = rows.n.to(tl.int64) * sizes.query_tokens + rows.i
    to = gradient + row[:, None] * TILE.DIM + d[None, :]
    tl.store(to, total.to(gradient.dtype.element_ty), mask=inside[:, None] & (d < TILE.DIM)[None, :])


@triton.jit
def document_gradient_kernel(
    query, index, flow, finite, gradient, query_lengths, strides, sizes, flow_strides, token_tiles, query_tiles,
    TILE: tl.constexpr,
):  # fmt: skip
    """Store some channels of the gradients of a tile of a document's tokens. Grid: (documents * tiles, steps).

    finite: int8 [queries, query_tokens], 1 where a token is. Zeros times NaN would reach all of a document's tokens, so
    tokens that are not finite, and flows, take no part in the product; the rows of their best are set to NaN.
    gradient: [documents, document_tokens, DIM].
    """
    m = tl.program_id(0) // token_tiles
    j = tl.program_id(0) % token_tiles * TILE.BLOCK_K + tl.arange(0, TILE.BLOCK_K)
    d = tl.program_id(1) * TILE.BLOCK_D + tl.arange(0, TILE.BLOCK_D)
    BLOCK_K: tl.constexpr = TILE.BLOCK_K
    BLOCK_D: tl.constexpr = TILE.BLOCK_D
    total = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    nan: tl.constexpr = float("nan")
    first_tile = m * query_tiles if TILE.PAIRED else 0
    tiles = query_tiles if TILE.PAIRED else sizes.queries * query_tiles
    documents = 1 if TILE.PAIRED else sizes.documents
    column = 0 if TILE.PAIRED else m
    for t in range(first_tile, first_tile + tiles):
        rows = query_rows(t, query_lengths, sizes, TILE)
        n = t // query_tiles
        pair = tl.cast(n, tl.int64) * documents + column
        who = tl.load(index + pair * sizes.query_tokens + rows.i, mask=rows.live, other=-1)
        weight = tl.load(flow + tl.cast(n, tl.int64) * flow_strides[0] + column * flow_strides[1]).to(tl.float32)
        unsound = tl.where((weight == weight) & (tl.abs(weight) < INFINITY), 0, 1)
        clean = tl.load(finite + tl.cast(n, tl.int64) * sizes.query_tokens + rows.i, mask=rows.live, other=1)
        x_rows = token_pointers(query, rows.n, rows.i, strides.query, strides.query_token, TILE)
        x = load_rows(x_rows, rows.live & (clean > 0), d, TILE)
        chosen = who[None, :] == j[:, None]  # [BLOCK_K, BLOCK_Q]
        weight = tl.where(unsound > 0, 0.0, weight)
        total += weight * tl.dot(chosen.to(x.dtype), x, input_precision=TILE.PRECISION)
        bad = (who >= 0) & (clean.to(tl.int32) <= unsound)
        if tl.max(bad.to(tl.int32), 0) > 0:
            hit = tl.max((chosen & bad[None, :]).to(tl.int32), 1) > 0
            total = tl.where(hit[:, None], nan, total)
    row = tl.cast(m, tl.int64) * sizes.document_tokens + j
    to = gradient + row[:, None] * TILE.DIM + d[None, :]
    inside = (j < sizes.document_tokens)[:, None] & (d < TILE.DIM)[None, :]
    tl.store(to, total.to(gradient.dtype.element_ty), mask=inside)


def backward(args: Any) -> tuple[Tensor, Tensor]:
    """Returns the gradients of query and document."""
    of_query = _query_gradient(args) if args.need_query else None
    of_document = _document_gradient(args) if args.need_document else None
    return or_empty(of_query, args.query), or_empty(of_document, args.query)


def _query_gradient(args: Any) -> Tensor:
    gradient = torch.empty_like(args.query, memory_format=torch.contiguous_format)
    if not args.document.shape[0]:
        return gradient.zero_()
    if not gradient.numel():
        return gradient
    call = Call(args, "query_gradient")
    launch(
        query_gradient_kernel, (call.tiles, ceil_div(call.tile.DIM, call.tile.BLOCK_D)), call.config,
        call.document, args.index.contiguous(), args.grad_scores, gradient, call.query_lengths, call.strides,
        call.sizes, _flow_strides(args), TILE=call.tile,
    )  # fmt: skip
    return gradient


def _document_gradient(args: Any) -> Tensor:
    gradient = torch.empty_like(args.document, memory_format=torch.contiguous_format)
    if not args.query.shape[0]:
        return gradient.zero_()
    if not gradient.numel():
        return gradient
    call = Call(args, "document_gradient", whole=True)
    token_tiles = ceil_div(call.sizes.document_tokens, call.tile.BLOCK_K)
    launch(
        document_gradient_kernel,
        (call.sizes.documents * token_tiles, ceil_div(call.tile.DIM, call.tile.BLOCK_D)), call.config,
        call.query, args.index.contiguous(), args.grad_scores, args.query.isfinite().all(-1).to(torch.int8), gradient,
        call.query_lengths, call.strides, call.sizes, _flow_strides(args), token_tiles, call.query_tiles,
        TILE=call.tile,
    )  # fmt: skip
    return gradient


def _flow_strides(args: Any) -> tuple[int, int]:
    """Returns the strides of what flows back to the scores, by query and by document."""
    first, *second = args.grad_scores.stride()
    return (first, *(second or (0,)))
