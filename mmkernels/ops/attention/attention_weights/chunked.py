"""Attention probabilities in plain PyTorch: the log-sum-exp of each row, then the probabilities, both by tiles."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.ops.attention.attention_weights.spec import Arguments
from mmkernels.ops.attention.tiles import Tiles, finite_or_zero, log_sum_exp


def forward(args: Arguments) -> Tensor:
    """Returns the probabilities [B, Hq, Lq, Lk]."""
    query, key = args.query, args.key
    tiles = Tiles(args)
    result = query.new_zeros(*query.shape[:3], key.shape[2], dtype=tiles.dtype)
    for block in tiles.blocks():
        for queries in tiles.query_tiles():
            rows = tiles.scaled_rows(block, queries)
            lse = finite_or_zero(log_sum_exp(tiles, block, queries, rows))
            for tile in tiles.key_tiles(block, queries):
                scores = tiles.scores(rows, block, tile)
                visible = tiles.visible(scores, block, tile)
                weights = scores.sub_(lse).exp_()
                if visible is not None:  # a hidden key has weight 0 also where the query's scores are NaN
                    weights = torch.where(visible > 0, weights, 0.0)
                result[block.batch, block.heads, queries, tile.keys] = tiles.unfold_pairs(weights, block)
    return result
