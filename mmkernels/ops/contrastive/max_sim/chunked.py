"""The late-interaction score in plain PyTorch: bands of query tokens against the tokens of a few documents."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmkernels.ops.common.dtypes import wide_dtype
from mmkernels.ops.common.results import or_empty
from mmkernels.ops.contrastive.max_sim.formula import NO_TOKEN, taking_part, valid
from mmkernels.ops.contrastive.max_sim.spec import Arguments
from mmkernels.ops.contrastive.strips import STRIP_BYTES


class _Band(NamedTuple):
    """Some query tokens, `rows` of all queries' one after the other, and some documents."""

    rows: slice
    documents: slice


def forward(args: Arguments) -> tuple[Tensor, Tensor]:
    """Returns `Results`."""
    if args.paired:
        best, index = _best_of_pairs(args)
    else:
        best, index = _best_of_all(args)
    part = taking_part(args)
    scores = torch.where(part, best, 0.0).sum(-1)
    if not args.keep_index:
        return scores, or_empty(None, args.query, torch.int32)
    return scores, torch.where(part, index, NO_TOKEN)


def backward(args: Any) -> tuple[Tensor, Tensor]:
    """Returns the gradients of query and document, in their dtypes."""
    run = _pair_gradients if args.paired else _gradients
    of_query, of_document = run(args)
    return (
        or_empty(None if of_query is None else of_query.to(args.query.dtype), args.query),
        or_empty(None if of_document is None else of_document.to(args.document.dtype), args.query),
    )


# Every query with every document.


def _bands(args: Any, row_numbers: int) -> Iterator[_Band]:
    """Yields bands of which each takes the memory of one strip.

    Args:
        row_numbers: that a query token takes for one document.
    """
    query, document = args.query, args.document
    rows, numbers = query.shape[0] * query.shape[1], max(1, STRIP_BYTES // wide_dtype(query).itemsize)
    down = max(1, min(rows, numbers // row_numbers))
    across = max(1, numbers // (row_numbers * down))
    for m in range(0, document.shape[0], across):
        for first in range(0, rows, down):
            yield _Band(slice(first, min(first + down, rows)), slice(m, min(m + across, document.shape[0])))


def _best_of_all(args: Arguments) -> tuple[Tensor, Tensor]:
    """Returns each query token's best product with each document, wide [Nq, Nd, Lq], and its int32 index."""
    query, document, wide = args.query, args.document, wide_dtype(args.query)
    (queries, query_tokens, _), (documents, document_tokens, _) = query.shape, document.shape
    rows, mask = query.flatten(0, 1), valid(args.document_lengths, document)
    best = torch.empty(queries * query_tokens, documents, dtype=wide, device=query.device)
    index = torch.empty_like(best, dtype=torch.int32) if args.keep_index else None
    for band in _bands(args, document_tokens):
        x, y = rows[band.rows].to(wide), document[band.documents].to(wide)
        products = (x @ y.flatten(0, 1).mT).unflatten(1, (-1, document_tokens))  # [rows, documents, Ld]
        if mask is not None:
            products.masked_fill_(~mask[band.documents], -torch.inf)
        at = band.rows, band.documents
        if index is None:
            best[at] = products.amax(-1)
        else:
            best[at], index[at] = products.max(-1)

    def by_document(x: Tensor) -> Tensor:
        return x.reshape(queries, query_tokens, documents).mT.contiguous()

    return by_document(best), best if index is None else by_document(index)


def _gradients(args: Any) -> tuple[Tensor | None, Tensor | None]:
    """Returns the wide gradients of query and document."""
    query, document, wide = args.query, args.document, wide_dtype(args.query)
    (_, query_tokens, dim), (documents, document_tokens, _) = query.shape, document.shape
    rows, mask = query.flatten(0, 1), valid(args.query_lengths, query)
    index = args.index.mT.reshape(rows.shape[0], documents)  # [rows, Nd]
    flow = args.grad_scores.to(wide)[:, None].expand(-1, query_tokens, -1).reshape(rows.shape[0], documents)
    of_query = torch.zeros(rows.shape[0], dim, dtype=wide, device=query.device) if args.need_query else None
    of_document = torch.zeros(documents, document_tokens, dim, dtype=wide, device=query.device)
    for band in _bands(args, max(dim, document_tokens)):
        at = band.rows, band.documents
        winner, weight = index[at].long(), flow[at]
        taken = winner != NO_TOKEN
        weight = torch.where(taken, weight, 0.0)
        if of_query is not None:
            y = document[band.documents].to(wide)
            m = torch.arange(y.shape[0], device=y.device)
            found = torch.where(taken[..., None], y[m, winner.clamp(min=0)], 0.0)  # [rows, documents, d]
            of_query[band.rows] += (found * weight[..., None]).sum(1)
        if args.need_document:
            x = rows[band.rows].to(wide)
            if mask is not None:
                x = torch.where(mask.flatten()[band.rows, None], x, 0.0)
            for number, into in enumerate(of_document[band.documents]):
                _add_rows(into, winner[:, number], weight[:, number], x)
    return (
        None if of_query is None else of_query.reshape(query.shape),
        of_document if args.need_document else None,
    )


def _add_rows(into: Tensor, index: Tensor, weight: Tensor, rows: Tensor) -> None:
    """Add ``weight * rows`` to the rows `index` of a matrix, always in the same order.

    Args:
        into: [Ld, d].
        index, weight: [rows], NO_TOKEN with a weight of 0.
        rows: [rows, d], finite where the weight is 0.
    """
    index = index.clamp(min=0)
    if into.is_cpu:
        into.index_add_(0, index, rows * weight[:, None])
        return
    _add_by_product(into, index, weight, rows)  # elsewhere rows of an index may be added in any order


def _add_by_product(into: Tensor, index: Tensor, weight: Tensor, rows: Tensor) -> None:
    """As `_add_rows`, by a product of matrices; index: none is below 0."""
    chosen = torch.zeros(rows.shape[0], into.shape[0], dtype=rows.dtype, device=rows.device)
    into += chosen.scatter_(1, index[:, None], weight[:, None]).mT @ rows


# Pairs: query n with document n.


def _best_of_pairs(args: Arguments) -> tuple[Tensor, Tensor]:
    """Returns each query token's best product with its document, wide [N, Lq], and its int32 index."""
    query, document, wide = args.query, args.document, wide_dtype(args.query)
    best = torch.empty(query.shape[:2], dtype=wide, device=query.device)
    index = torch.empty_like(best, dtype=torch.int32)
    mask = valid(args.document_lengths, document)
    for at, tokens in _pair_bands(args):
        products = query[at, tokens].to(wide) @ document[at].to(wide).mT  # [pairs, tokens, Ld]
        if mask is not None:
            products.masked_fill_(~mask[at, None], -torch.inf)
        best[at, tokens], index[at, tokens] = products.max(-1)
    return best, index


def _pair_gradients(args: Any) -> tuple[Tensor | None, Tensor | None]:
    """Returns the wide gradients of query and document."""
    query, document, wide = args.query, args.document, wide_dtype(args.query)
    taken = args.index != NO_TOKEN
    weight = torch.where(taken, args.grad_scores.to(wide)[:, None], 0.0)  # [N, Lq]
    winner = args.index.long().clamp(min=0)
    of_query = torch.zeros(query.shape, dtype=wide, device=query.device) if args.need_query else None
    of_document = torch.zeros(document.shape, dtype=wide, device=query.device) if args.need_document else None
    for n in range(query.shape[0]):
        if of_query is not None:
            found = torch.where(taken[n, :, None], document[n].to(wide)[winner[n]], 0.0)
            of_query[n] = found * weight[n, :, None]
        if of_document is not None:
            _add_rows(of_document[n], winner[n], weight[n], torch.where(taken[n, :, None], query[n].to(wide), 0.0))
    return of_query, of_document


def _pair_bands(args: Any) -> Iterator[tuple[slice, slice]]:
    """Yields some pairs, and some of their queries' tokens."""
    (pairs, query_tokens, _), document_tokens = args.query.shape, args.document.shape[1]
    numbers = max(1, STRIP_BYTES // wide_dtype(args.query).itemsize)
    down = min(query_tokens, max(1, numbers // document_tokens))
    at_once = max(1, numbers // (down * document_tokens))
    for n in range(0, pairs, at_once):
        for first in range(0, query_tokens, down):
            yield slice(n, n + at_once), slice(first, first + down)
