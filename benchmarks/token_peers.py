"""The peers of the ops that merge tokens: the paper's formula in PyTorch, on images of one size."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from mmkernels.bench.peers import Call, CantRunError, Peer
from mmkernels.ops.tokens.keep import sides
from mmkernels.spec import Inputs


def best_partners(inputs: Inputs) -> Callable[[], tuple[Tensor, Tensor]]:
    """The largest similarity of each token at an even place, and whose it is, from the matrix of all of them."""
    lengths, protect, metric = inputs["lengths"], inputs.get("protect", 0), inputs["metric"]
    images, length = len(lengths), lengths[0]
    if len(set(lengths)) > 1 or length - math.ceil(inputs["keep"] * length) > sides(length, protect)[0]:
        raise CantRunError("only images of one size, in one round")

    def call() -> tuple[Tensor, Tensor]:
        rows = metric.view(images, length, -1)
        rows = rows / rows.norm(dim=-1, keepdim=True)
        best, partner = (rows[:, protect + protect % 2 :: 2] @ rows[:, protect + 1 - protect % 2 :: 2].mT).max(-1)
        return best, partner

    return call


def matching(inputs: Inputs) -> Call:
    """Bipartite soft matching in one round; the tokens that are left in their order."""
    lengths, protect, device = inputs["lengths"], inputs.get("protect", 0), inputs["metric"].device
    images, length, best_matches = len(lengths), lengths[0], best_partners(inputs)
    merges = length - math.ceil(inputs["keep"] * length)
    even, odd = protect + protect % 2, protect + 1 - protect % 2
    places = torch.arange(length, device=device)

    def call() -> Tensor:
        best, partner = best_matches()
        gone = best.argsort(-1, descending=True)[:, :merges]
        root = places.repeat(images, 1).scatter(1, even + 2 * gone, odd + 2 * partner.gather(1, gone))
        rank = (root == places).flatten().cumsum(0).view(images, length) - 1
        return rank.gather(1, root).flatten()

    return call


def merging(inputs: Inputs) -> Call:
    """`matching`, then the paper's steps: the tokens that merge are gathered, added to their partners, concatenated.

    Its tokens that are left lie in another order than ours where some tokens at even places are.
    """
    lengths, x = inputs["lengths"], inputs["x"]
    images, length, protect = len(lengths), lengths[0], inputs.get("protect", 0)
    merges, best_matches = length - math.ceil(inputs["keep"] * length), best_partners(inputs)
    if protect or length % 2 or merges < length // 2:
        raise CantRunError("only where all tokens at even places merge: else its order is another")

    def call() -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            best, partner = best_matches()
            order = best.argsort(-1, descending=True)[..., None]
            gone, rest = order[:, :merges], order[:, merges:]
            into = partner[..., None].gather(1, gone)
        tokens = x.view(images, length, -1)
        a, b, channels = tokens[:, ::2], tokens[:, 1::2], x.shape[-1]
        moved, left = (a.gather(1, some.expand(-1, -1, channels)) for some in (gone, rest))
        total = torch.ones_like(b[..., :1]).scatter_add(1, into, torch.ones_like(moved[..., :1]))
        sums = b.scatter_add(1, into.expand(-1, -1, channels), moved)
        merged = torch.cat([left, sums / total], 1)
        starts = torch.arange(images, device=x.device)[:, None] * b.shape[1]
        odd = torch.arange(b.shape[1], device=x.device).expand_as(partner)
        both = torch.stack([partner, odd], 2)
        return merged.flatten(0, 1), total.flatten().float(), (both.flatten(1) + starts).flatten()

    return call


def summing(inputs: Inputs) -> Call:
    """`matching`, then sums by `index_add` and a division: fewer copies than the paper's steps."""
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
MERGE = (Peer("formula", merging), Peer("index_add", summing))
UNMERGE = (Peer("index_select", rows_by_index),)
