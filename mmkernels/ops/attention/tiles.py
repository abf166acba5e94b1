"""Attention in tiles of plain PyTorch: its memory is linear in the inputs, and it skips hidden tiles of keys.

A tile works on P = key batches x key heads matrices at once. The query heads of a key head, and the query batches that
share one key batch, are rows of the same matrix, so that no key is copied, neither for a group nor for a batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mmkernels.ops.attention.formula import all_finite
from mmkernels.ops.attention.inputs import Scores
from mmkernels.ops.attention.philox import keep_mask, keep_scale
from mmkernels.ops.common.dtypes import wide_dtype

# Measured on 2 cores with 1 MiB of L2 cache each: at 512 K scores the elementwise passes stay in the cache, and a
# tile's ten PyTorch calls cost about 3 % of its matrix products.
TILE_SCORES = 2**19
TILE_QUERIES = 128
TILE_KEYS = 512
_LAST = 2**31 - 1


@dataclass(frozen=True)
class Block:
    """Some batch entries and key heads, whose tiles are computed together."""

    batch: slice  # of query and mask
    key_batch: slice
    heads: slice  # of query
    key_heads: slice


@dataclass(frozen=True)
class Tile:
    """Some keys for some queries of a block."""

    queries: slice
    keys: slice
    hidden: Tensor | None  # bool, broadcastable to the six dimensions of Tiles.as_pairs; None: all pairs are visible


class Tiles:
    """One attention call in tiles.

    Args:
        args: of the op.
        others: further tensors whose non-finite elements must not reach rows they are hidden from: value, grad_out.
        seed, dropout_p: of dropout, where the op has it.
        hides: the op hides pairs by more than the mask and the bias.
    """

    def __init__(
        self,
        args: Scores,
        others: tuple[Tensor, ...] = (),
        seed: Tensor | None = None,
        dropout_p: float = 0.0,
        hides: bool = False,
    ) -> None:
        query, key, bias = args.query, args.key, args.bias
        self.query, self.key, self.bias, self.scale = query, key, bias, args.scale
        self.start, self.end, self.key_valid, self.dense = args.start, args.end, args.key_valid, args.dense
        self.seed, self.dropout_p = seed, dropout_p
        self.batch, self.heads, self.q_len, _ = query.shape
        self.key_batch, self.key_heads, self.k_len, _ = key.shape
        self.group = self.heads // self.key_heads
        self.shared = self.key_batch == 1 and self.batch != 1
        self.dtype = wide_dtype(query)
        self.on_host = query.device.type == "cpu"  # elsewhere reading a value would wait for the device
        self.bias_hides = bias is not None and not (self.on_host and not bool(torch.isneginf(bias).any()))
        masks = (args.start, args.key_valid, args.dense)
        self.hides = hides or self.bias_hides or any(x is not None for x in masks)
        # A hidden NaN or inf must not reach a row. That takes further products, so where values can be read without
        # waiting, they are read first.
        self.non_finite = self.hides and not (self.on_host and all_finite(query, key, *others))
        self._plan()

    def _plan(self) -> None:
        self.tile_queries = max(1, min(self.q_len, TILE_QUERIES))
        rows = self.group * self.tile_queries
        pairs = max(1, TILE_SCORES // (rows * max(1, min(self.k_len, TILE_KEYS))))
        self.block_heads = min(pairs, self.key_heads)
        self.block_batch = max(1, min(self.batch, pairs // self.key_heads))
        spans = self.start if self.start is not None and self.end is not None else None
        if spans is not None and max(spans.shape[0], self.end.shape[0]) > 1 and self.tile_queries >= 16:  # type: ignore[union-attr]
            self.block_batch = 1  # then each sequence skips the tiles that its spans hide
        per_key = self.block_batch * self.block_heads * rows
        self.tile_keys = max(TILE_KEYS, min(8 * TILE_KEYS, TILE_SCORES // per_key))
        if spans is not None:
            assert self.end is not None
            empty = self.end <= spans
            self._first = torch.where(empty, _LAST, spans)  # a row that sees nothing adds no keys to a tile
            self._last = torch.where(empty, 0, self.end)

    def blocks(self) -> Iterator[Block]:
        """Yields the blocks of the call."""
        for b in range(0, self.batch, self.block_batch):
            batch = slice(b, min(b + self.block_batch, self.batch))
            for h in range(0, self.key_heads, self.block_heads):
                key_heads = slice(h, min(h + self.block_heads, self.key_heads))
                heads = slice(key_heads.start * self.group, key_heads.stop * self.group)
                yield Block(batch, slice(0, 1) if self.key_batch == 1 else batch, heads, key_heads)

    def query_tiles(self) -> Iterator[slice]:
        """Yields the queries of each tile."""
        for i in range(0, self.q_len, self.tile_queries):
            yield slice(i, min(i + self.tile_queries, self.q_len))

    def key_tiles(self, block: Block, queries: slice) -> Iterator[Tile]:
        """Yields the tiles of keys that these queries see; all tiles where reading the mask would wait for a device."""
        first, last = 0, self.k_len
        if self.start is not None and self.on_host:
            rows = self._rows(self._first, block, queries), self._rows(self._last, block, queries)
            first, last = max(0, int(rows[0].min())), min(self.k_len, int(rows[1].max()))
        for j in range(first, last, self.tile_keys):
            keys = slice(j, min(j + self.tile_keys, last))
            visible = self._visible(block, queries, keys)
            if visible is None:
                yield Tile(queries, keys, None)
            elif not self.on_host:
                yield Tile(queries, keys, ~self.fold_pairs(visible, block))
            elif visible.any():
                yield Tile(queries, keys, None if visible.all() else ~self.fold_pairs(visible, block))

    def _rows(self, span: Tensor, block: Block, queries: slice) -> Tensor:
        span = span if span.shape[0] == 1 else span[block.batch]
        return span if span.shape[1] == 1 else span[:, queries]

    def _visible(self, block: Block, queries: slice, keys: slice) -> Tensor | None:
        """Returns the mask of a tile, bool, broadcastable to [B, Hq, Lq, Lk] of the tile; None: all is visible."""
        visible = None
        if self.start is not None and self.end is not None:
            start, end = self._rows(self.start, block, queries), self._rows(self.end, block, queries)
            if not (self.on_host and int(start.max()) <= keys.start and keys.stop <= int(end.min())):
                key = torch.arange(keys.start, keys.stop, dtype=torch.int32, device=start.device)
                visible = ((start[..., None] <= key) & (key < end[..., None]))[:, None]
        if self.key_valid is not None:
            valid = self.key_valid if self.key_valid.shape[0] == 1 else self.key_valid[block.batch]
            valid = valid[:, None, None, keys]
            visible = valid if visible is None else visible & valid
        if self.dense is not None:
            dense = self._part(self.dense, block, queries, keys)
            visible = dense if visible is None else visible & dense
        return visible

    @staticmethod
    def _part(x: Tensor, block: Block, queries: slice, keys: slice) -> Tensor:
        """Returns a tile of a tensor that broadcasts to [B, Hq, Lq, Lk]."""
        parts = (block.batch, block.heads, queries, keys)
        return x[tuple(slice(None) if size == 1 else part for size, part in zip(x.shape, parts, strict=True))]

    # Between [B, H, L, C] and the matrices of a tile.

    def fold_rows(self, x: Tensor, block: Block, queries: slice) -> Tensor:
        """[B, Hq, Lq, C] -> [P, rows, C], in `dtype`."""
        x = x[block.batch, block.heads, queries].unflatten(1, (-1, self.group))  # [b, h, G, T, C]
        x = x.transpose(0, 1) if self.shared else x  # the batches that share a key become its rows
        problems = x.shape[0] if self.shared else x.shape[0] * x.shape[1]
        return x.reshape(problems, -1, x.shape[-1]).to(self.dtype)

    def unfold_rows(self, x: Tensor, block: Block) -> Tensor:
        """[P, rows, C] -> [B, Hq, Lq, C] of the tile."""
        batch, heads = block.batch.stop - block.batch.start, block.key_heads.stop - block.key_heads.start
        if self.shared:
            x = x.view(heads, batch, self.group, -1, x.shape[-1]).transpose(0, 1)
        else:
            x = x.view(batch, heads, self.group, -1, x.shape[-1])
        return x.flatten(1, 2)

    def fold_keys(self, x: Tensor, block: Block, keys: slice) -> Tensor:
        """[Bk, Hkv, Lk, C] -> [P, keys, C], in `dtype`."""
        return x[block.key_batch, block.key_heads, keys].flatten(0, 1).to(self.dtype)

    def fold_pairs(self, x: Tensor, block: Block) -> Tensor:
        """[b or 1, H or 1, T or 1, K or 1] -> broadcastable to the six dimensions of `as_pairs`."""
        x = x.unflatten(1, (-1, self.group)) if x.shape[1] > 1 else x[:, :, None]  # [b, h, G, T, K]
        return x.transpose(0, 1)[None] if self.shared else x[:, :, None]

    def as_pairs(self, tile: Tensor, block: Block) -> Tensor:
        """[P, rows, K] -> [key batch, key head, batch that shares the key, group, query, key], a view."""
        batch, heads = block.batch.stop - block.batch.start, block.key_heads.stop - block.key_heads.start
        outer = (1, heads, batch) if self.shared else (batch, heads, 1)
        return tile.view(*outer, self.group, -1, tile.shape[-1])

    def unfold_pairs(self, tile: Tensor, block: Block) -> Tensor:
        """[P, rows, K] -> [b, H, T, K]."""
        pairs = self.as_pairs(tile, block)
        return (pairs[0].transpose(0, 1) if self.shared else pairs[:, :, 0]).flatten(1, 2)

    # The arithmetic of one tile.

    def scaled_rows(self, block: Block, queries: slice) -> Tensor:
        """Returns the query times the scale, [P, rows, D]."""
        return self.fold_rows(self.query, block, queries) * self.scale

    def scores(self, rows: Tensor, block: Block, tile: Tile) -> Tensor:
        """Returns the scores [P, rows, K], -inf where hidden."""
        return self.hide(self.all_scores(rows, block, tile), block, tile)

    def all_scores(self, rows: Tensor, block: Block, tile: Tile) -> Tensor:
        """Returns the scores [P, rows, K] of hidden pairs too."""
        scores = torch.bmm(rows, self.fold_keys(self.key, block, tile.keys).transpose(1, 2))
        if self.bias is not None:
            self.as_pairs(scores, block).add_(self._bias(block, tile))
        return scores

    def hide(self, scores: Tensor, block: Block, tile: Tile) -> Tensor:
        """Returns the scores [P, rows, K] with -inf where hidden, in place."""
        pairs = self.as_pairs(scores, block)
        if self.bias_hides:  # an overflowed score plus -inf is NaN
            pairs.masked_fill_(self._bias(block, tile) == -math.inf, -math.inf)
        if tile.hidden is not None:
            pairs.masked_fill_(tile.hidden, -math.inf)
        return scores

    def _bias(self, block: Block, tile: Tile) -> Tensor:
        assert self.bias is not None
        return self.fold_pairs(self._part(self.bias, block, tile.queries, tile.keys), block)

    def drop(self, weights: Tensor, block: Block, tile: Tile, direction: int = 0) -> None:
        """Apply dropout to the probabilities [P, rows, K], in place, by the seed of a direction."""
        if self.seed is None:
            return
        seed = self.seed[direction : direction + 1]
        index = [torch.arange(s.start, s.stop, device=weights.device) for s in (block.batch, block.heads, tile.queries)]
        b, h, i = index[0][:, None, None, None], index[1][:, None, None], index[2][:, None]
        keep = keep_mask(seed, self.dropout_p, b, h, i, range(tile.keys.start, tile.keys.stop))
        self.as_pairs(weights, block).mul_(self.fold_pairs(keep, block)).mul_(keep_scale(self.dropout_p))

    def add_bias(self, grad: Tensor, total: Tensor, block: Block, tile: Tile) -> None:
        """Add the scores' gradient [P, rows, K] to the bias's, summed over the dimensions that broadcast."""
        shared = [dim for dim, size in enumerate(total.shape) if size == 1]
        pairs = self.unfold_pairs(grad, block)
        part = pairs.sum(shared, keepdim=True) if shared else pairs
        self._part(total, block, tile.queries, tile.keys).add_(part)

    def multiply(self, weights: Tensor, x: Tensor, visible: Tensor | None) -> Tensor:
        """Returns weights @ x, in which a non-finite element of x reaches only the rows that it is visible to."""
        if visible is None:
            return torch.bmm(weights, x)
        out = torch.bmm(weights, without_non_finite(x))
        nan = x.isnan()
        up = torch.bmm(visible, (nan | x.isposinf()).to(x.dtype)) > 0
        down = torch.bmm(visible, (nan | x.isneginf()).to(x.dtype)) > 0
        return out + torch.where(up, math.inf, 0.0) + torch.where(down, -math.inf, 0.0)

    def visible(self, scores: Tensor, block: Block, tile: Tile) -> Tensor | None:
        """Returns 1 where the mask shows a key and 0 where it hides one, like `scores`; None: all values are finite.

        The scores do not tell: one of -inf may be visible.
        """
        if not self.non_finite:
            return None
        visible = torch.ones_like(scores)
        pairs = self.as_pairs(visible, block)
        if tile.hidden is not None:
            pairs.masked_fill_(tile.hidden, 0.0)
        if self.bias is not None:
            pairs.masked_fill_(self._bias(block, tile) == -math.inf, 0.0)
        return visible


class RowSums:
    """The online softmax of one tile of queries: the largest score and the sum of exponentials, [P, rows, 1]."""

    def __init__(self, tiles: Tiles, rows: Tensor) -> None:
        self.tiles = tiles
        self.top = rows.new_full((*rows.shape[:2], 1), -math.inf)
        self.total = torch.zeros_like(self.top)
        self.sees = torch.zeros_like(self.top)  # 1 for a row with a visible key; used with `visible` only

    def add(self, scores: Tensor, visible: Tensor | None) -> tuple[Tensor, Tensor]:
        """Add a tile's scores, and overwrite them with their weights.

        Returns:
            The weights, relative to the largest score so far, and the factor for what earlier tiles gave.
        """
        new = torch.maximum(self.top, scores.amax(-1, keepdim=True))
        # A row that sees nothing has weights 0. Without a mask a row of -inf is NaN, as in a softmax.
        base = finite_or_zero(new) if self.tiles.hides else new
        weights, shrink = scores.sub_(base).exp_(), (self.top - base).exp_()
        self.total.mul_(shrink).add_(weights.sum(-1, keepdim=True))
        self.top = new
        if visible is not None:
            self.sees = torch.maximum(self.sees, visible.amax(-1, keepdim=True))
        return weights, shrink

    def log_sum_exp(self) -> Tensor:
        """Returns the log-sum-exp: -inf for a row that sees nothing, NaN for one that sees only scores of -inf."""
        lse = finite_or_zero(self.top) + self.total.log()
        return torch.where((self.total == 0) & (self.sees > 0), math.nan, lse) if self.tiles.non_finite else lse


def without_non_finite(x: Tensor) -> Tensor:
    """Returns x with 0 for NaN and inf. Safe for keys and queries: a row that sees those has a NaN score already."""
    return torch.where(x.isfinite(), x, 0.0)


def finite_or_zero(x: Tensor) -> Tensor:
    """Returns x with 0 for -inf, so that it can be subtracted from a score of -inf."""
    return x.masked_fill(x == -math.inf, 0.0)


def log_sum_exp(tiles: Tiles, block: Block, queries: slice, rows: Tensor) -> Tensor:
    """Returns the log-sum-exp [P, rows, 1] of a tile of queries, see `RowSums`."""
    sums = RowSums(tiles, rows)
    for tile in tiles.key_tiles(block, queries):
        scores = tiles.scores(rows, block, tile)
        sums.add(scores, tiles.visible(scores, block, tile))
    return sums.log_sum_exp()
