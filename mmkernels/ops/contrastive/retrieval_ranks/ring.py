"""`retrieval_ranks` over the ranks of a group: each rank holds its own queries and a part of the gallery.

The gallery travels round the ring twice: first each rank copies its queries' right answers, then it counts what stands
before them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmkernels.ops.contrastive.retrieval_ranks import block, spec
from mmkernels.ops.contrastive.retrieval_ranks.spec import Results
from mmkernels.ops.contrastive.ring import Ring, backends_of, call_over_ranks, record_over_ranks
from mmkernels.runtime.dispatch import define
from mmkernels.runtime.group import Piece, circulate

CALL = "retrieval_ranks"

Arguments = record_over_ranks(spec.Arguments)


def forward(args: Any, kernels: str) -> Tensor:
    """Returns int64 [n], the ranks of this rank's queries among all ranks' items."""
    query, gallery, target = args.query, args.gallery, args.target
    seen = query.is_cpu and len(target) > 0  # on an accelerator targets are not looked at
    low, high = (int(x) for x in target.aminmax()) if seen else (0, 0)
    ring = Ring(CALL, args.group, query, gallery, {}, {"low": low, "high": high})
    items = ring.all_texts
    if sum(ring.images) and not items:
        raise ValueError("gallery must have an item on one rank at least, got none")
    for rank, said in enumerate(ring.said):
        if said["low"] < 0 or said["high"] >= max(items, 1):
            raise ValueError(
                f"target must be from 0 to {items - 1}, a row of all ranks' galleries, got {said['low']} to "
                f"{said['high']} on rank {rank}"
            )
    inside = target.clamp(0, max(items - 1, 0))
    right = query.new_empty(query.shape)
    before, is_nan = torch.zeros_like(target), torch.zeros_like(target, dtype=torch.bool)

    def fetch(piece: Piece, tensors: list[Tensor]) -> None:
        index = inside - ring.number(piece)
        here = (index >= 0) & (index < piece.rows)
        right.copy_(torch.where(here[:, None], tensors[0][index.clamp(0, piece.rows - 1)], right))

    def count(piece: Piece, tensors: list[Tensor]) -> None:
        if len(query):
            index = inside - ring.number(piece)
            found = block.BLOCK(block.BlockArguments(query, tensors[0], right, index), kernels)
            before.add_(found)
            is_nan.logical_or_(found < 0)

    for visit in (fetch, count):
        circulate(ring.group, ring.texts, ring.rows, [gallery], visit)
    found = torch.where(is_nan, items - 1, before)
    return torch.where(inside == target, found, items)


def _fake(args: Any) -> Tensor:
    return args.query.new_empty(args.query.shape[0], dtype=torch.int64)


OP = define(
    "retrieval_ranks_ring",
    Arguments,
    Results,
    fake=_fake,
    backends=backends_of(block.BLOCK, forward),
)


def ranks(checked: Callable[[], Any], group: Any, backend: str | None, query: object) -> Tensor:
    """Returns what `retrieval_ranks` returns, over a group; see `call_over_ranks`."""
    found: Tensor
    _, found = call_over_ranks(OP, Arguments, group, backend, CALL, query, checked)
    return found
