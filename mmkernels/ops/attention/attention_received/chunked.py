"""Received attention in two walks over the tiles: log-sum-exp of the rows, then sums of the columns."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.ops.attention.attention_received.spec import Arguments
from mmkernels.ops.attention.tiles import Tiles, finite_or_zero, log_sum_exp


def forward(args: Arguments) -> Tensor:
    """[B, Hq, Lk]."""
    query, key = args.query, args.key
    tiles = Tiles(args)
    received = query.new_zeros(*query.shape[:2], key.shape[2], dtype=tiles.dtype)
    counts = None
    if args.query_weights is not None:
        counts = args.query_weights[..., None].expand(*query.shape[:3], 1)
    for block in tiles.blocks():
        for queries in tiles.query_tiles():
            rows = tiles.scaled_rows(block, queries)
            lse = finite_or_zero(log_sum_exp(tiles, block, queries, rows))
            count = None if counts is None else tiles.fold_rows(counts, block, queries)
            for tile in tiles.key_tiles(block, queries):
                scores = tiles.scores(rows, block, tile)
                seen = tiles.seen(scores, block, tile)
                weights = scores.sub_(lse).exp_()
                weights = weights if count is None else weights.mul_(count)
                if seen is not None:  # a hidden key gets nothing from a query whose own scores or count are NaN
                    weights = torch.where(seen > 0, weights, 0.0)
                received[block.batch, block.heads, tile.keys] += tiles.unfold_pairs(weights, block).sum(2)
    return received
