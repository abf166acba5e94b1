"""Cross-attention in plain PyTorch, tile by tile: the fallback for any device and dtype."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mmkernels.ops.attention.cross_attention.spec import Arguments
from mmkernels.ops.attention.tiles import Block, RowSums, Tiles, finite_or_zero, without_non_finite


def forward(args: Arguments) -> tuple[Tensor, Tensor]:
    """Returns the output and the log-sum-exp, by online softmax (Milakov and Gimelshein, 2018)."""
    query, value, gate = args.query, args.value, args.gate
    tiles = Tiles(args, (value,), args.seed, args.dropout_p)
    batch, heads, q_len, _ = query.shape
    out = query.new_empty(batch, q_len, heads, value.shape[3]).transpose(1, 2)
    lse = query.new_empty(batch, heads, q_len, 1, dtype=tiles.dtype)
    factor = None if gate is None else gate.to(tiles.dtype).tanh().expand(heads)[:, None, None]
    for block in tiles.blocks():
        for queries in tiles.query_tiles():
            part, total = _attend(tiles, block, queries, value)
            part = tiles.unfold_rows(part, block)
            place = (block.batch, block.heads, queries)
            out[place] = part if factor is None else part * factor[block.heads]
            lse[place] = tiles.unfold_rows(total, block)
    return out, lse.squeeze(-1)


def _attend(tiles: Tiles, block: Block, queries: slice, value: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the output [P, rows, Dv] and the log-sum-exp [P, rows, 1] of one tile of queries."""
    rows = tiles.scaled_rows(block, queries)
    sums = RowSums(tiles, rows)
    out: Tensor | None = None
    for tile in tiles.key_tiles(block, queries):
        scores = tiles.scores(rows, block, tile)
        visible = tiles.visible(scores, block, tile)
        weights, shrink = sums.add(scores, visible)
        tiles.drop(weights, block, tile)
        values = tiles.fold_keys(value, block, tile.keys)
        if out is None:
            out = tiles.multiply(weights, values, visible)
        elif visible is None:
            out.mul_(shrink).baddbmm_(weights, values)
        else:
            out = out.mul_(shrink).add_(tiles.multiply(weights, values, visible))
    if out is None:
        out = rows.new_zeros(*rows.shape[:2], value.shape[3])
    lse = sums.log_sum_exp()
    out.div_(sums.total.masked_fill(sums.total == 0, 1.0))
    return (torch.where(lse.isnan(), math.nan, out) if tiles.non_finite else out), lse


def backward(args: Any) -> tuple[Tensor, ...]:
    """Returns the gradients of query, key, value, bias, gate; an empty tensor where none is wanted."""
    query, value, gate = args.query, args.value, args.gate
    tiles = Tiles(args, (value, args.grad_out), args.seed, args.dropout_p)
    inputs = (query, args.key, value, args.bias, gate)
    needs = (args.need_query, args.need_key, args.need_value, args.need_bias, args.need_gate)
    # Sums over many tiles, so in the wide dtype; in the layout of the input.
    grads = [
        torch.zeros_like(x, dtype=tiles.dtype) if need and x is not None else None
        for x, need in zip(inputs, needs, strict=True)
    ]
    factor = None if gate is None else gate.to(tiles.dtype).tanh().expand(query.shape[1])
    gate_rows = None if grads[4] is None else args.lse.new_zeros(query.shape[1])
    for block in tiles.blocks():
        for queries in tiles.query_tiles():
            rows = _Rows(tiles, block, queries, args, factor)
            _backward_rows(tiles, block, queries, rows, value, grads, gate_rows)
    if gate is not None and grads[4] is not None and factor is not None and gate_rows is not None:
        grads[4] = ((1 - factor**2) * gate_rows).sum_to_size(gate.shape or (1,)).view(gate.shape)
    return tuple(
        query.new_empty(0) if grad is None or x is None else grad.to(x.dtype)
        for x, grad in zip(inputs, grads, strict=True)
    )


class _Rows:
    """What the backward pass needs of one tile of queries, each [P, rows, ...]."""

    def __init__(
        self,
        tiles: Tiles,
        block: Block,
        queries: slice,
        args: Any,
        factor: Tensor | None,
    ) -> None:
        self.query = tiles.scaled_rows(block, queries)
        self.grad = tiles.fold_rows(args.grad_out, block, queries)
        self.lse = finite_or_zero(tiles.fold_rows(args.lse[..., None], block, queries))
        # sum_j P_ij dP_ij = grad_i . out_i, and d lse_i / d score_ij = P_ij
        self.delta = (self.grad * tiles.fold_rows(args.out, block, queries)).sum(-1, keepdim=True)
        if args.grad_lse is not None:
            self.delta -= tiles.fold_rows(args.grad_lse[..., None], block, queries)
        self.factor = None
        if factor is not None:
            per_head = factor[None, :, None, None].expand(*args.grad_out.shape[:3], 1)
            self.factor = tiles.fold_rows(per_head, block, queries)


def _backward_rows(
    tiles: Tiles,
    block: Block,
    queries: slice,
    rows: _Rows,
    value: Tensor,
    grads: list[Tensor | None],
    gate_rows: Tensor | None,
) -> None:
    """Add to each gradient what one tile of queries contributes."""
    grad_query, grad_key, grad_value, grad_bias, _ = grads
    clean = without_non_finite if tiles.non_finite else (lambda x: x)
    gated = rows.grad if rows.factor is None else rows.grad * rows.factor
    needs_scores = any(g is not None for g in (grad_query, grad_key, grad_bias, gate_rows))
    sum_query = torch.zeros_like(rows.query) if grad_query is not None else None
    for tile in tiles.key_tiles(block, queries):
        place = (block.key_batch, block.key_heads, tile.keys)
        scores = tiles.scores(rows.query, block, tile)
        visible = tiles.visible(scores, block, tile)
        weights = scores.sub_(rows.lse).exp_()
        if visible is not None:  # a query whose scores are NaN gives nothing to a key that is hidden from it
            weights.masked_fill_(visible == 0, 0.0)
        kept = weights
        if tiles.seed is not None:
            kept = weights.clone()
            tiles.drop(kept, block, tile)
        if grad_value is not None:
            visible_rows = None if visible is None else visible.transpose(1, 2)
            part = tiles.multiply(kept.transpose(1, 2), gated, visible_rows)
            grad_value[place] += part.view(grad_value[place].shape)
        if not needs_scores:
            continue
        grad = torch.bmm(rows.grad, tiles.fold_keys(value, block, tile.keys).transpose(1, 2))
        if gate_rows is not None:
            product = kept * grad
            if visible is not None:
                product.masked_fill_(visible == 0, 0.0)
            gate_rows[block.heads] += tiles.unfold_pairs(product, block).sum((0, 2, 3))
        if rows.factor is not None:
            grad.mul_(rows.factor)
        tiles.drop(grad, block, tile)
        grad.sub_(rows.delta).mul_(weights)
        if visible is not None:
            grad.masked_fill_(visible == 0, 0.0)
        if grad_bias is not None:
            tiles.add_bias(grad, grad_bias, block, tile)
        if sum_query is not None:
            sum_query.baddbmm_(grad, clean(tiles.fold_keys(tiles.key, block, tile.keys)))
        if grad_key is not None:
            part = torch.bmm(grad.transpose(1, 2), clean(rows.query))
            grad_key[place] += part.view(grad_key[place].shape)
    if grad_query is not None and sum_query is not None:
        grad_query[block.batch, block.heads, queries] = tiles.unfold_rows(sum_query.mul_(tiles.scale), block)
