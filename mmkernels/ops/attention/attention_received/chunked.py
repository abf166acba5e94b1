"""Received attention in plain PyTorch: the log-sum-exp of each row, then sums of the columns, both by tiles."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.ops.attention.attention_received.spec import Arguments
from mmkernels.ops.attention.tiles import Tiles, finite_or_zero, log_sum_exp


def forward(args: Arguments) -> Tensor:
    """Returns the received attention [B, Hq, Lk]."""
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
                visible = tiles.visible(scores, block, tile)
                weights = scores.sub_(lse).exp_()
                weights = weights if count is None else weights.mul_(count)
                if visible is not None:  # a hidden key receives nothing from a query whose scores or count are NaN
                    weights = torch.where(visible > 0, weights, 0.0)
                received[block.batch, block.heads, tile.keys] += tiles.unfold_pairs(weights, block).sum(2)
    return received
