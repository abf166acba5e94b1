"""The late-interaction score as its definition has it, and its gradients written out.

Each function takes the op's record, or another with the same fields.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmkernels.ops.common.dtypes import wide_dtype
from mmkernels.ops.common.results import or_empty

NO_TOKEN = -1
"""The index of a query token that takes no part, and of every token's best in a document without tokens."""


def formula(args: Any) -> Tensor:
    """Returns the scores by the naive formula, which PyTorch can differentiate; see `max_sim`."""
    query, document, mask = _without_padding(args)
    best = _products(query, document, mask, args.paired).max(-1).values
    return _summed(best, args)


def reference(args: Any) -> tuple[Tensor, Tensor]:
    """Returns `Results` by the naive formula."""
    query, document, mask = _without_padding(args)
    best, index = _products(query, document, mask, args.paired).max(-1)
    if not args.keep_index:
        return _summed(best, args), or_empty(None, query, torch.int32)
    return _summed(best, args), torch.where(taking_part(args), index, NO_TOKEN).to(torch.int32)


def reference_backward(args: Any) -> tuple[Tensor, Tensor]:
    """Returns the gradients of query and document, written out: autograd does not record inside of an op boundary."""
    query, document, mask = _without_padding(args)
    products = _products(query, document, mask, args.paired)
    index = products.max(-1, keepdim=True).indices
    flow = torch.where(taking_part(args), args.grad_scores[..., None], 0.0).to(query.dtype)
    products_grad = torch.zeros_like(products).scatter_(-1, index, flow[..., None])
    to_query, to_document = ("nij,njd->nid", "nij,nid->njd") if args.paired else ("nmij,mjd->nid", "nmij,nid->mjd")
    of_query = torch.einsum(to_query, products_grad, document).contiguous() if args.need_query else None
    of_document = torch.einsum(to_document, products_grad, query).contiguous() if args.need_document else None
    return or_empty(of_query, args.query), or_empty(of_document, args.query)


def valid(lengths: Tensor | None, tokens: Tensor) -> Tensor | None:
    """Returns which tokens are not padding, bool [N, L]; None: all.

    Args:
        lengths: int64 [N] or None.
        tokens: [N, L, d].
    """
    if lengths is None:
        return None
    return torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]


def taking_part(args: Any) -> Tensor:
    """Returns which query tokens have a best token of a document, bool, broadcastable to [Nq, Nd, Lq] or [N, Lq]."""
    query, lengths, paired = args.query, args.document_lengths, args.paired
    of_query = valid(args.query_lengths, query)
    if of_query is None:
        of_query = torch.ones(1, query.shape[1], dtype=torch.bool, device=query.device)
    part = of_query if paired else of_query[:, None]  # [Nq, 1, Lq]
    return part if lengths is None else part & (lengths > 0)[:, None]


def _without_padding(args: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns query and document with zeros for padding, and which of the documents' tokens are not padding."""
    masks = valid(args.query_lengths, args.query), valid(args.document_lengths, args.document)
    query, document = (
        x if mask is None else x.masked_fill(~mask[..., None], 0.0)
        for x, mask in zip((args.query, args.document), masks, strict=True)
    )
    return query, document, masks[1]


def _products(query: Tensor, document: Tensor, mask: Tensor | None, paired: bool) -> Tensor:
    """Returns the products of all tokens, [Nq, Nd, Lq, Ld] or [N, Lq, Ld], -inf for padding of documents."""
    products = torch.einsum("nid,njd->nij" if paired else "nid,mjd->nmij", query, document)
    return products if mask is None else products.masked_fill(~mask[:, None], -torch.inf)


def _summed(best: Tensor, args: Any) -> Tensor:
    """Returns the scores from each query token's best product."""
    return torch.where(taking_part(args), best, 0.0).sum(-1, dtype=wide_dtype(best))
