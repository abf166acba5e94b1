"""The late-interaction score in plain PyTorch: blocks of queries against the tokens of a few documents."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mmkernels.ops.common.dtypes import wide_dtype
from mmkernels.ops.common.results import or_empty
from mmkernels.ops.contrastive.max_sim.formula import NO_TOKEN, taking_part, valid
from mmkernels.ops.contrastive.max_sim.spec import Arguments
from mmkernels.ops.contrastive.strips import STRIP_BYTES


def forward(args: Arguments) -> tuple[Tensor, Tensor]:
    """Returns `Results`."""
    return (_best_of_pairs if args.paired else _best_of_all)(args)


def backward(args: Any) -> tuple[Tensor, Tensor]:
    """Returns the gradients of query and document, in their dtypes."""
    run = _pair_gradients if args.paired else _gradients
    of_query, of_document = run(args)
    return (
        or_empty(None if of_query is None else of_query.to(args.query.dtype), args.query),
        or_empty(None if of_document is None else of_document.to(args.document.dtype), args.query),
    )


# Every query with every document.


def _best_of_all(args: Arguments) -> tuple[Tensor, Tensor]:
    """Returns `Results` of every query with every document."""
    query, document, wide = args.query, args.document, wide_dtype(args.query)
    pairs, tokens = (query.shape[0], document.shape[0]), query.shape[1]
    mask, part = valid(args.document_lengths, document), taking_part(args).expand(*pairs, tokens)
    scores = torch.zeros(pairs, dtype=wide, device=query.device)
    index = query.new_empty((*pairs, tokens) if args.keep_index else (0,), dtype=torch.int32)
    for n, i, m in _blocks(args, document.shape[1]):
        x, y = query[n, i].to(wide), document[m].to(wide)
        products = (x.flatten(0, 1) @ y.flatten(0, 1).mT).unflatten(1, y.shape[:2]).unflatten(0, x.shape[:2])
        if mask is not None:
            products.masked_fill_(~mask[m], -torch.inf)  # [queries, tokens, documents, Ld]
        takes = part[n, m, i]
        if args.keep_index:
            best, who = products.max(-1)
            index[n, m, i] = torch.where(takes, who.mT, NO_TOKEN)
        else:
            best = products.amax(-1)
        scores[n, m] += torch.where(takes, best.mT, 0.0).sum(-1)
    return scores, index


def _blocks(args: Any, row_numbers: int) -> Iterator[tuple[slice, slice, slice]]:
    """Yields some queries, some of their tokens, and some documents, of which each block takes the memory of one strip.

    Args:
        row_numbers: that a query token takes for one document.
    """
    (queries, tokens, _), documents = args.query.shape, args.document.shape[0]
    numbers = max(1, STRIP_BYTES // wide_dtype(args.query).itemsize)
    rows = max(1, numbers // row_numbers)  # query tokens
    at_once, some = max(1, min(queries, rows // tokens)), min(tokens, rows)
    across = max(1, numbers // (row_numbers * at_once * some))
    for m in range(0, documents, across):
        for n in range(0, queries, at_once):
            for i in range(0, tokens, some):
                yield slice(n, n + at_once), slice(i, i + some), slice(m, m + across)


def _gradients(args: Any) -> tuple[Tensor | None, Tensor | None]:
    """Returns the wide gradients of query and document."""
    query, document, wide = args.query, args.document, wide_dtype(args.query)
    flow = args.grad_scores.to(wide)
    of_query = torch.zeros(query.shape, dtype=wide, device=query.device) if args.need_query else None
    of_document = torch.zeros(document.shape, dtype=wide, device=query.device) if args.need_document else None
    for n, i, m in _blocks(args, max(document.shape[1:])):
        winner = args.index[n, m, i].mT.long()  # [queries, tokens, documents]
        taken = winner != NO_TOKEN
        weight = torch.where(taken, flow[n, None, m], 0.0)
        if of_query is not None:
            y = document[m].to(wide)
            at = torch.arange(y.shape[0], device=y.device)
            found = torch.where(taken[..., None], y[at, winner.clamp(min=0)], 0.0)  # [queries, tokens, documents, d]
            of_query[n, i] += (found * weight[..., None]).sum(2)
        if of_document is not None:
            x = query[n, i].to(wide)
            for number, into in enumerate(of_document[m]):
                here = taken[..., number]
                shown = torch.where(here[..., None], x, 0.0)  # NaN of the others would reach token 0
                _add_rows(into, winner[..., number].flatten(), weight[..., number].flatten(), shown.flatten(0, 1))
    return of_query, of_document


def _add_rows(into: Tensor, index: Tensor, weight: Tensor, rows: Tensor) -> None:
    """Add ``weight * rows`` to the rows `index` of a matrix, always in the same order.

    Args:
        into: [Ld, d].
        index, weight: [rows], NO_TOKEN with a weight of 0.
        rows: [rows, d], finite where the weight is 0.
    """
    index = index.clamp(min=0)
    if into.is_cpu:  # one by one, wide: a token may be the best of thousands, and rounding errors grow with a chain
        total = torch.zeros(into.shape, dtype=torch.float64)
        into += total.index_add_(0, index, rows.double() * weight.double()[:, None])
        return
    _add_by_product(into, index, weight, rows)  # elsewhere rows of an index may be added in any order


def _add_by_product(into: Tensor, index: Tensor, weight: Tensor, rows: Tensor) -> None:
    """As `_add_rows`, by a product of matrices; index: none is below 0."""
    chosen = torch.zeros(rows.shape[0], into.shape[0], dtype=rows.dtype, device=rows.device)
    into += chosen.scatter_(1, index[:, None], weight[:, None]).mT @ rows


# Pairs: query n with document n.


def _best_of_pairs(args: Arguments) -> tuple[Tensor, Tensor]:
    """Returns `Results` of query n with document n."""
    query, document, wide = args.query, args.document, wide_dtype(args.query)
    scores = torch.zeros(query.shape[0], dtype=wide, device=query.device)
    index = query.new_empty(query.shape[:2] if args.keep_index else (0,), dtype=torch.int32)
    mask, part = valid(args.document_lengths, document), taking_part(args).expand(query.shape[:2])
    for at, tokens in _pair_bands(args):
        products = query[at, tokens].to(wide) @ document[at].to(wide).mT  # [pairs, tokens, Ld]
        if mask is not None:
            products.masked_fill_(~mask[at, None], -torch.inf)
        best, who = products.max(-1)
        if args.keep_index:
            index[at, tokens] = torch.where(part[at, tokens], who, NO_TOKEN).to(torch.int32)
        scores[at] += torch.where(part[at, tokens], best, 0.0).sum(-1)
    return scores, index


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
