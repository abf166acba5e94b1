"""Retrieval ranks by late interaction: a query and an item are several tokens each, compared by `max_sim`."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmkernels.ops.contrastive.max_sim import checked, max_sim
from mmkernels.ops.contrastive.max_sim.ring import scores_over_ranks
from mmkernels.ops.contrastive.max_sim.spec import Arguments
from mmkernels.ops.contrastive.retrieval_ranks.spec import ranks_of
from mmkernels.runtime.checks import check_floating, check_range, check_tensor, without_autocast
from mmkernels.runtime.dispatch import resolve
from mmkernels.runtime.group import Group, check_group, told_to_group

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_SCORE_BYTES = 2**24  # of the scores of some queries with the whole gallery
_CALL = "retrieval_ranks"


def token_ranks(
    query: Tensor,
    gallery: Tensor,
    target: Tensor,
    query_lengths: Tensor | None,
    gallery_lengths: Tensor | None,
    group: ProcessGroup | None,
    backend: str | None,
) -> Tensor:
    """Returns what `retrieval_ranks` returns, of tokens [N, Lq, d] and [M, Ld, d]."""
    check = partial(_checked, query, gallery, target, query_lengths, gallery_lengths)
    if group is not None:
        return _over_ranks(check, target, group, backend)
    args = check()
    items = args.document.shape[0]
    if not items:
        raise ValueError("gallery must have an item at least, got none")
    check_range("target", target, 0, items - 1)
    backend = resolve(backend)
    found = [target.new_empty(0)]
    with torch.autocast(args.query.device.type, enabled=False):
        for at, part in _strips(args, _rows(items)):
            found.append(ranks_of(max_sim(**part, document=args.document, backend=backend), target[at]))
    return torch.cat(found)


def _over_ranks(check: Any, target: Tensor, group: ProcessGroup, backend: str | None) -> Tensor:
    """The gallery travels round the ring once for each strip of queries, of which every rank has as many."""
    name = check_group(group)
    try:
        args: Arguments = check()
    except Exception as error:  # of any kind: the other ranks wait
        told_to_group(error, name, _CALL, target)
        raise
    seen = target.is_cpu and target.shape[0] > 0  # on an accelerator targets are not looked at
    low, high = (int(x) for x in target.aminmax()) if seen else (0, 0)
    own = {"queries": args.query.shape[0], "items": args.document.shape[0], "low": low, "high": high}
    said = Group(name, _CALL, args.query.device).agree({}, own)
    items = sum(x["items"] for x in said)
    if not items:
        raise ValueError("gallery must have an item at least on one rank of the group, got none")
    for rank, x in enumerate(said):
        if x["low"] < 0 or x["high"] >= items:
            raise ValueError(
                f"target must be from 0 to {items - 1}, a row of all ranks' galleries, got {x['low']} to {x['high']} "
                f"on rank {rank}"
            )
    step, found = _rows(items), [target.new_empty(0)]
    with torch.autocast(args.query.device.type, enabled=False):
        for at, part in _strips(args, step, max(x["queries"] for x in said)):
            call = scores_over_ranks(**part, document=args.document, group=group, backend=backend)
            found.append(ranks_of(call.scores, target[at]))
    return torch.cat(found)


def _checked(
    query: Tensor, gallery: Tensor, target: Tensor, query_lengths: Tensor | None, gallery_lengths: Tensor | None
) -> Arguments:
    """Returns the record of `max_sim`, without a gradient."""
    query, gallery = without_autocast(query, gallery)
    check_floating("query", query)
    check_tensor("gallery", gallery)
    if gallery.dim() == 2:
        raise ValueError(f"query must be [N, d] where gallery is [M, d], got shape {tuple(query.shape)}")
    if gallery.dim() != 3:
        raise ValueError(f"gallery must be [M, Ld, d] where query is [N, Lq, d], got shape {tuple(gallery.shape)}")
    with torch.autocast(query.device.type, enabled=False):
        args = checked(query.detach(), gallery.detach(), query_lengths, gallery_lengths, paired=False, name="gallery")
    check_tensor("target", target)
    if target.dtype != torch.int64:
        raise TypeError(f"target must be int64, got {target.dtype}")
    if tuple(target.shape) != (query.shape[0],):
        raise ValueError(f"target must be [{query.shape[0]}], one for each query, got shape {tuple(target.shape)}")
    if not (target.is_cpu and query.is_cpu) and target.device != query.device:
        raise ValueError(f"target must be on query's device {query.device}, got {target.device}")
    return args


def _rows(items: int) -> int:
    """Returns the queries of a strip."""
    return max(1, _SCORE_BYTES // (4 * max(items, 1)))


def _strips(args: Arguments, step: int, queries: int | None = None) -> Any:
    """Yields some queries' numbers, and the arguments that belong to them and to the gallery.

    Args:
        queries: as if there were so many; None: those that there are.
    """
    for first in range(0, args.query.shape[0] if queries is None else queries, step):
        at = slice(first, first + step)
        lengths = None if args.query_lengths is None else args.query_lengths[at]
        yield at, {"query": args.query[at], "query_lengths": lengths, "document_lengths": args.document_lengths}
