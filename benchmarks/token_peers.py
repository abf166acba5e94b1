"""The peers of the ops that merge tokens: the paper's formula in PyTorch, on images of one size."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmkernels.bench.peers import Call, CantRunError, Peer
from mmkernels.ops.tokens.keep import sides
from mmkernels.spec import Inputs


def matching(inputs: Inputs) -> Call:
    """Bipartite soft matching in one round, with all similarities in one matrix."""
    lengths, protect, metric = inputs["lengths"], inputs.get("protect", 0), inputs["metric"]
    images, length = len(lengths), lengths[0]
    merges = length - math.ceil(inputs["keep"] * length)
    if len(set(lengths)) > 1 or merges > sides(length, protect)[0]:
        raise CantRunError("only images of one size, in one round")
    even, odd = protect + protect % 2, protect + 1 - protect % 2
    places = torch.arange(length, device=metric.device)

    def call() -> Tensor:
        rows = metric.view(images, length, -1)
        rows = rows / rows.norm(dim=-1, keepdim=True)
        best, partner = (rows[:, even::2] @ rows[:, odd::2].mT).max(-1)
        gone = best.argsort(-1, descending=True)[:, :merges]
        root = places.repeat(images, 1).scatter(1, even + 2 * gone, odd + 2 * partner.gather(1, gone))
        rank = (root == places).flatten().cumsum(0).view(images, length) - 1
        return rank.gather(1, root).flatten()

    return call


def merging(inputs: Inputs) -> Call:
    """`matching`, then sums by `index_add` and a division."""
    match, x = matching(inputs), inputs["x"]
    count = sum(math.ceil(inputs["keep"] * n) for n in inputs["lengths"])

    def call() -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            group = match()
        total = torch.zeros(count, device=x.device).index_add(0, group, torch.ones(len(x), device=x.device))
        merged = torch.zeros(count, x.shape[1], dtype=x.dtype, device=x.device).index_add(0, group, x)
        return merged / total[:, None].to(x.dtype), total, group

    return call


def rows_by_index(inputs: Inputs) -> Call:
    """`index_select`, and its own gradient."""
    return lambda: inputs["x"].index_select(0, inputs["assignment"])


MATCH = (Peer("formula", matching),)
MERGE = (Peer("formula", merging),)
UNMERGE = (Peer("index_select", rows_by_index),)
