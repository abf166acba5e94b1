"""Co-attention in plain PyTorch, tile by tile: each score is computed once for both directions."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmkernels.ops.attention.co_attention.record import Arguments, pairs_of
from mmkernels.ops.attention.tiles import Block, Tile, Tiles, finite_or_zero, without_non_finite
from mmkernels.ops.common.dtypes import wide_dtype


class _Direction(NamedTuple):
    """One direction of a tile; its rows are the side whose output it gives, P = batch x heads of the block.

    Args:
        rows, columns: of that side, and of the other one.
        scores: [P, rows, columns], -inf where hidden.
        visible: see `Tiles.visible`.
        keep: of the dropout, 0 or its factor.
    """

    rows: slice
    columns: slice
    scores: Tensor
    visible: Tensor | None
    keep: Tensor | None


class _Part(NamedTuple):
    """A tile of scores.

    Args:
        a: the scaled rows, [P, rows, D].
        raised: where a score is below the floor; None: nowhere.
    """

    tile: Tile
    a: Tensor
    raised: Tensor | None
    directions: tuple[_Direction, _Direction]


def forward(args: Arguments) -> tuple[Tensor, ...]:
    """Returns `Results`, by an online softmax of rows and one of columns (Milakov and Gimelshein, 2018)."""
    values = args.value_b, args.value_a
    tiles = _tiles(args, values)
    floor = _floor(tiles, args)
    outs = [_empty(x, value) for x, value in zip((args.a, args.b), values, strict=True)]
    lses = [x.new_empty(*x.shape[:3], 1, dtype=tiles.dtype) for x in (args.a, args.b)]
    for block in tiles.blocks():
        place = block.batch, block.heads
        sides = [_Sums(out[place].flatten(0, 1), tiles) for out in outs]
        for part in _parts(tiles, args, block, floor):
            for side, direction, value in zip(sides, part.directions, values, strict=True):
                side.add(direction, tiles.fold_keys(value, block, direction.columns))
        for side, out, lse in zip(sides, outs, lses, strict=True):
            attended, total = side.finish()
            out[place] = attended.view(out[place].shape)
            lse[place] = total.view(lse[place].shape)
    return (*outs, *(lse.squeeze(-1) for lse in lses), floor)


class _Sums:
    """The online softmax of one side of a block, and its sums of the other side's values."""

    def __init__(self, out: Tensor, tiles: Tiles) -> None:
        self.tiles = tiles
        self.out = torch.zeros_like(out, dtype=tiles.dtype, memory_format=torch.contiguous_format)
        self.top = self.out.new_full((*out.shape[:2], 1), -math.inf)
        self.total = torch.zeros_like(self.top)
        self.sees = torch.zeros_like(self.top)  # 1 for a row with a visible column; used with `visible` only

    def add(self, direction: _Direction, values: Tensor) -> None:
        """Add a tile, with the other side's values [P, columns, Dv]."""
        rows, scores, visible = direction.rows, direction.scores, direction.visible
        top = torch.maximum(self.top[:, rows], scores.amax(-1, keepdim=True))
        # A row that sees nothing has weights 0. Without a mask a row of -inf is NaN, as in a softmax.
        base = finite_or_zero(top) if self.tiles.hides else top
        weights, shrink = (scores - base).exp_(), (self.top[:, rows] - base).exp_()
        self.total[:, rows] = self.total[:, rows] * shrink + weights.sum(-1, keepdim=True)
        self.top[:, rows] = top
        if visible is not None:
            self.sees[:, rows] = torch.maximum(self.sees[:, rows], visible.amax(-1, keepdim=True))
        if direction.keep is not None:
            weights = weights * direction.keep
        self.out[:, rows] = self.out[:, rows] * shrink + self.tiles.multiply(weights, values, visible)

    def finish(self) -> tuple[Tensor, Tensor]:
        """Returns the outputs [P, rows, Dv] and the log-sum-exps [P, rows, 1]."""
        lse = finite_or_zero(self.top) + self.total.log()
        out = self.out.div_(self.total.masked_fill(self.total == 0, 1.0))
        if self.tiles.non_finite:
            lse = torch.where((self.total == 0) & (self.sees > 0), math.nan, lse)
            out = torch.where(lse.isnan(), math.nan, out)
        return out, lse


def backward(args: Any) -> tuple[Tensor, ...]:
    """Returns the gradients of a, b, value_a, value_b and bias; an empty tensor where none is wanted."""
    inputs = {"a": args.a, "b": args.b, "value_a": args.value_a, "value_b": args.value_b, "bias": args.bias}
    tiles = _tiles(args, (args.value_b, args.value_a, args.grad_out_a, args.grad_out_b))
    grads = {
        # Sums over many tiles, so in the wide dtype; in the layout of the input.
        name: torch.zeros_like(x, dtype=tiles.dtype)
        for name, x in inputs.items()
        if x is not None and getattr(args, f"need_{name}")
    }
    for block in tiles.blocks():
        sides = (
            _Flow(tiles, block, args.value_b, args.out_a, args.lse_a, args.grad_out_a, grads.get("value_b")),
            _Flow(tiles, block, args.value_a, args.out_b, args.lse_b, args.grad_out_b, grads.get("value_a")),
        )
        for part in _parts(tiles, args, block, args.floor):
            _add(part, sides, tiles, block, grads)
    if "a" in grads:
        grads["a"].mul_(args.scale)
    return tuple(
        args.a.new_empty(0) if name not in grads or x is None else grads[name].to(x.dtype) for name, x in inputs.items()
    )


def _add(part: _Part, sides: tuple[_Flow, _Flow], tiles: Tiles, block: Block, grads: dict[str, Tensor]) -> None:
    """Add to each gradient what one tile contributes."""
    weights = [side.weights(direction) for side, direction in zip(sides, part.directions, strict=True)]
    for side, direction, each in zip(sides, part.directions, weights, strict=True):
        side.add_value(direction, each)
    if not grads.keys() & {"a", "b", "bias"}:
        return
    of_a, of_b = (
        side.score_gradient(direction, each)
        for side, direction, each in zip(sides, part.directions, weights, strict=True)
    )
    grad = of_a.add_(of_b.transpose(1, 2))
    if part.raised is not None:
        grad.masked_fill_(part.raised, 0.0)
    clean = without_non_finite if tiles.non_finite else (lambda x: x)
    if "bias" in grads:
        tiles.add_bias(grad, grads["bias"], block, part.tile)
    if "a" in grads:
        b = clean(tiles.fold_keys(tiles.key, block, part.tile.keys))
        _add_at(grads["a"], block, part.tile.queries, torch.bmm(grad, b))
    if "b" in grads:
        _add_at(grads["b"], block, part.tile.keys, torch.bmm(grad.transpose(1, 2), clean(part.a)))


class _Flow:
    """What flows back through one direction of a block."""

    def __init__(
        self,
        tiles: Tiles,
        block: Block,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        grad_out: Tensor,
        grad_value: Tensor | None,
    ) -> None:
        self.tiles, self.block, self.value, self.grad_value = tiles, block, value, grad_value
        everywhere = slice(0, out.shape[2])
        self.grad = tiles.fold_keys(grad_out, block, everywhere)  # [P, rows, Dv]
        self.lse = finite_or_zero(tiles.fold_keys(lse[..., None], block, everywhere))
        # sum_j P_ij dP_ij = grad_i . out_i
        self.delta = (self.grad * tiles.fold_keys(out, block, everywhere)).sum(-1, keepdim=True)

    def weights(self, direction: _Direction) -> Tensor:
        """Returns the probabilities [P, rows, columns]."""
        return _hide((direction.scores - self.lse[:, direction.rows]).exp_(), direction)

    def add_value(self, direction: _Direction, weights: Tensor) -> None:
        """Add to the gradient of the values."""
        if self.grad_value is None:
            return
        kept = weights if direction.keep is None else weights * direction.keep
        visible = None if direction.visible is None else direction.visible.transpose(1, 2)
        part = self.tiles.multiply(kept.transpose(1, 2), self.grad[:, direction.rows], visible)
        _add_at(self.grad_value, self.block, direction.columns, part)

    def score_gradient(self, direction: _Direction, weights: Tensor) -> Tensor:
        """Returns what the direction gives to the gradient of the scores, [P, rows, columns]."""
        values = self.tiles.fold_keys(self.value, self.block, direction.columns)
        grad = torch.bmm(self.grad[:, direction.rows], values.transpose(1, 2))
        if direction.keep is not None:
            grad.mul_(direction.keep)
        return _hide(grad.sub_(self.delta[:, direction.rows]).mul_(weights), direction)


def _hide(x: Tensor, direction: _Direction) -> Tensor:
    """Returns x with 0 where a pair is hidden, which may be NaN, in place."""
    return x if direction.visible is None else x.masked_fill_(direction.visible == 0, 0.0)


def _add_at(total: Tensor, block: Block, at: slice, part: Tensor) -> None:
    place = block.batch, block.heads, at
    total[place] += part.view(total[place].shape)


def _empty(x: Tensor, value: Tensor) -> Tensor:
    """Returns an output for the positions of x, in memory [B, L, H, Dv]."""
    batch, heads, length, _ = x.shape
    return x.new_empty(batch, length, heads, value.shape[3]).transpose(1, 2)


def _tiles(args: Any, others: tuple[Tensor, ...]) -> Tiles:
    hides = args.valid_a is not None or args.valid_b is not None
    return Tiles(pairs_of(args), others, args.seed, args.dropout_p, hides)


def _parts(tiles: Tiles, args: Any, block: Block, floor: Tensor) -> Iterator[_Part]:
    """Yields the tiles of a block."""
    for queries in tiles.query_tiles():
        a = tiles.scaled_rows(block, queries)
        for tile in tiles.key_tiles(block, queries):
            scores = tiles.all_scores(a, block, tile)
            raised = None
            if args.clamp:
                raised = scores < floor
                scores.clamp_(min=floor)
            tiles.hide(scores, block, tile)
            visible = tiles.visible(scores, block, tile)
            of_a = _direction(tiles, scores, visible, block, tile, args.valid_b, 0)
            of_b = _direction(tiles, scores, visible, block, tile, args.valid_a, 1)
            yield _Part(tile, a, raised, (of_a, of_b))


def _direction(
    tiles: Tiles,
    scores: Tensor,  # [P, queries, keys], as the next
    visible: Tensor | None,
    block: Block,
    tile: Tile,
    valid: Tensor | None,
    direction: int,
) -> _Direction:
    """Returns a tile's direction 0, a's rows over b, or 1; `valid` is of the side that it looks at."""
    keep = None
    if tiles.seed is not None:
        keep = torch.ones_like(scores)
        tiles.drop(keep, block, tile, direction)
    rows, columns = tile.queries, tile.keys
    if direction == 1:
        rows, columns = columns, rows
        scores = scores.transpose(1, 2)
        visible = None if visible is None else visible.transpose(1, 2)
        keep = None if keep is None else keep.transpose(1, 2)
    if valid is not None:
        hidden = ~(valid if valid.shape[0] == 1 else valid[block.batch])[:, columns]  # [b or 1, columns]
        hidden = hidden.repeat_interleave(scores.shape[0] // hidden.shape[0], 0)[:, None]  # [P, 1, columns]
        scores = scores.masked_fill(hidden, -math.inf)
        visible = None if visible is None else visible.masked_fill(hidden, 0.0)
    return _Direction(rows, columns, scores, visible, keep)


def _floor(tiles: Tiles, args: Arguments) -> Tensor:
    """Returns what lower scores are raised to, see `Results`."""
    lowest = args.a.new_full((), -math.inf, dtype=tiles.dtype)
    if not args.clamp or args.a.numel() == 0 or args.b.numel() == 0:
        return lowest
    if tiles.on_host and args.bias is None and 2 * _bound(args) <= args.clamp:
        return lowest
    top = lowest.clone()
    for block in tiles.blocks():
        for queries in tiles.query_tiles():
            a = tiles.scaled_rows(block, queries)
            for first in range(0, tiles.k_len, tiles.tile_keys):
                keys = slice(first, min(first + tiles.tile_keys, tiles.k_len))
                scores = tiles.all_scores(a, block, Tile(queries, keys, None))
                torch.maximum(top, scores.masked_fill_(~scores.isfinite(), -math.inf).amax(), out=top)
    return top - args.clamp


def _bound(args: Arguments) -> float:
    """Returns what no score's absolute value exceeds, by the inequality of Cauchy and Schwarz."""
    norms = [float(torch.linalg.vector_norm(x, dim=-1, dtype=wide_dtype(x)).amax()) for x in (args.a, args.b)]
    return abs(args.scale) * norms[0] * norms[1]
