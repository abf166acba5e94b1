"""The formula of the late-interaction loss, and what each rank does in its tests; see `ranks.run`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from harness import generator
from torch import Tensor

from mmkernels import retrieval_ranks
from mmkernels.nn import LateInteractionLoss
from mmkernels.ops.contrastive.max_sim.cases import tokens
from mmkernels.ops.contrastive.retrieval_ranks import tokens as tokens_of_ranks


def naive_scores(query: Tensor, document: Tensor, query_mask: Tensor, document_mask: Tensor) -> Tensor:
    """Returns [N, M] from all products of tokens."""
    products = torch.einsum("nid,mjd->nmij", query, document)
    best = products.masked_fill(~document_mask[:, None], -torch.inf).amax(-1)
    return (best * query_mask[:, None]).sum(-1)


def naive_loss(
    query: Tensor,
    document: Tensor,
    query_mask: Tensor,
    document_mask: Tensor,
    scale: float = 1.0,
    mean_over_tokens: bool = False,
    query_weight: float = 1.0,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Returns the loss of one process with the whole batch."""
    groups = document.shape[1] if document.dim() == 4 else 1
    if document.dim() == 4:
        document, document_mask = document.flatten(0, 1), document_mask.flatten(0, 1)
    logits = scale * naive_scores(query, document, query_mask, document_mask)
    if mean_over_tokens:
        logits = logits / query_mask.sum(1, keepdim=True)
    answer = torch.arange(len(query))
    options: dict[str, Any] = {"label_smoothing": label_smoothing, "reduction": reduction}
    loss = F.cross_entropy(logits, answer * groups, **options)
    if query_weight == 1.0:
        return loss
    return query_weight * loss + (1 - query_weight) * F.cross_entropy(logits[:, ::groups].T, answer, **options)


def as_one_process(rank: int, sizes: list[int]) -> None:
    """Each rank's own part of a batch, with and without hard negatives, in each direction."""
    own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    count = sum(sizes)
    for groups, options in ((1, {}), (2, {"query_weight": 0.5, "scale": 3.0}), (1, {"reduction": "sum"})):
        g = generator(9)
        query, document = tokens(g, count, 4, 8), tokens(g, count, groups, 7, 8)
        lengths = torch.randint(1, 8, (count, groups), generator=g)
        mask = torch.arange(7) < lengths[..., None]
        query_mask = torch.rand(count, 4, generator=g) < 0.8
        query_mask[:, 1] = True
        whole = [x.clone().requires_grad_() for x in (query, document)]
        want = naive_loss(whole[0], whole[1], query_mask, mask, **options)
        want_grads = torch.autograd.grad(want, whole)
        # A rank has no more padding than its own longest document.
        longest = int(lengths[own].max()) if sizes[rank] else 1
        mine = [x.clone().requires_grad_() for x in (query[own], document[own][:, :, :longest])]
        loss = LateInteractionLoss(**options, group=dist.group.WORLD)(
            *mine, query_mask=query_mask[own], document_mask=mask[own][..., :longest]
        )
        torch.testing.assert_close(loss.detach(), want.detach())
        loss.backward()
        for x, y in zip(mine, want_grads, strict=True):
            assert x.grad is not None
            expected = y[own] if y.dim() == 3 else y[own][:, :, :longest]
            torch.testing.assert_close(x.grad / len(sizes), expected)


def ranks_as_one_process(rank: int, sizes: list[tuple[int, int]]) -> None:
    """Each rank holds so many queries and items; two queries a strip."""
    tokens_of_ranks._SCORE_BYTES = 4 * 2 * sum(m for _, m in sizes)
    g = generator(10)
    queries, items = (sum(counts) for counts in zip(*sizes, strict=True))
    query, gallery = tokens(g, queries, 4, 8), tokens(g, items, 6, 8)
    target, lengths = torch.randint(items, (queries,), generator=g), torch.randint(1, 7, (items,), generator=g)
    want = retrieval_ranks(query, gallery, target, gallery_lengths=lengths)
    first, last = (
        slice(sum(x[side] for x in sizes[:rank]), sum(x[side] for x in sizes[: rank + 1])) for side in (0, 1)
    )
    own: dict[str, Any] = {"gallery_lengths": lengths[last], "group": dist.group.WORLD}
    assert torch.equal(retrieval_ranks(query[first], gallery[last], target[first], **own), want[first])
    far = target[first] + (99 if rank == 0 else 0)
    with pytest.raises(ValueError, match=r"target must be from 0 to .* on rank 0"):
        retrieval_ranks(query[first], gallery[last], far, **own)


def one_is_bad(rank: int) -> str:
    """Returns the error of a call whose first rank has a document too many."""
    query, document = torch.ones(2, 3, 8), torch.ones(2 + (rank == 0), 4, 8)
    return _error(lambda: LateInteractionLoss(group=dist.group.WORLD)(query, document))


def options_differ(rank: int) -> list[str]:
    """Returns the errors of calls in which the ranks differ; in the last one the first rank is empty."""
    query, document = torch.ones(2, 3, 8), torch.ones(2, 4, 8)
    weighted = LateInteractionLoss(query_weight=1.0 - rank / 2, group=dist.group.WORLD)
    scaled, plain = (LateInteractionLoss(scale, group=dist.group.WORLD) for scale in (1.0 + rank, 1.0))
    some = (query, torch.ones(2, 2, 4, 8)) if rank else (query[:0], document[:0])
    calls = (lambda: weighted(query, document), lambda: scaled(query, document), lambda: plain(*some))
    return [_error(call) for call in calls]


def no_gallery(rank: int) -> str:
    """Returns the error of queries on one rank, and items on none."""
    query, target = torch.ones(1 - rank, 3, 8), torch.zeros(1 - rank, dtype=torch.int64)
    return _error(lambda: retrieval_ranks(query, torch.ones(0, 5, 8), target, group=dist.group.WORLD))


def _error(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"
