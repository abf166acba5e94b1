"""One direction's softmax in Triton: tiles' parts merged into running states, and the losses that follow from these.

Blocks of columns may come in any order and from anywhere. References are whole numbers wherever float32 has them all:
merging rounds nothing but sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.ops.common.triton.constants import INFINITY, LN2, LOG2E
from mmkernels.ops.common.triton.launch import ceil_div
from mmkernels.ops.contrastive.triton.tiles import exponents, load_part
from mmkernels.runtime.triton import launch
from mmkernels.runtime.tuning import Config

_MERGE, _MERGE_ENTRIES, _MERGE_TILES = Config(0, 0, 4, 1), 64, 32
_LINES = Config(0, 0, 4, 1)
_LINE_BLOCK = 256
_NOWHERE = tl.constexpr(2**31 - 1)


@triton.jit
def merge_softmax_kernel(
    part, tiles, count, state, state_stride, sums,
    POSITIVE: tl.constexpr, EVEN: tl.constexpr, BEFORE: tl.constexpr, ENTRIES: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Add tiles' parts to a state's references and sums, and to the `sums` that are there. Grid: (entries,).

    part: float32 [fields, tiles, count]: reference, sum, then what POSITIVE, EVEN, BEFORE name the field of (0: none).
    """
    n = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)
    live = n < count
    top = tl.load(state + n, mask=live, other=-INFINITY)
    total = tl.load(state + state_stride + n, mask=live, other=0.0)
    positive, even = tl.zeros([ENTRIES], tl.float32), tl.zeros([ENTRIES], tl.float32)
    before = tl.zeros([ENTRIES], tl.int32)
    for first in range(0, tiles, TILES):
        t = first + tl.arange(0, TILES)[:, None]
        there = (t < tiles) & live[None, :]
        at = load_part(part, 0, t, tiles, n[None, :], count, there, 0.0)
        x = load_part(part, 1, t, tiles, n[None, :], count, there, 0.0)
        # Sums between 1 and 2, whatever the tile's reference was: of powers of two nothing is rounded.
        own = at + tl.floor(tl.log2(x))
        x = tl.where(x > 0, x * tl.exp2(at - own), x)
        own = tl.where(x > 0, own, -INFINITY)
        new = tl.maximum(top, tl.max(own, 0))
        base = tl.where(new == -INFINITY, 0.0, new)
        total = total * tl.exp2(top - base) + tl.sum(x * tl.exp2(own - base[None, :]), 0)
        top = new
        if POSITIVE > 0:
            positive += tl.sum(load_part(part, POSITIVE, t, tiles, n[None, :], count, there, 0.0), 0)
        if EVEN > 0:
            even += tl.sum(load_part(part, EVEN, t, tiles, n[None, :], count, there, 0.0), 0)
        if BEFORE > 0:
            before += tl.sum(load_part(part, BEFORE, t, tiles, n[None, :], count, there, 0.0).to(tl.int32), 0)
    tl.store(state + n, top, mask=live)
    tl.store(state + state_stride + n, total, mask=live)
    if POSITIVE > 0:
        tl.store(sums[0] + n, tl.load(sums[0] + n, mask=live) + positive, mask=live)
    if EVEN > 0:
        tl.store(sums[1] + n, tl.load(sums[1] + n, mask=live) + even, mask=live)
    if BEFORE > 0:
        tl.store(sums[2] + n, tl.load(sums[2] + n, mask=live) + before, mask=live)


@triton.jit
def merge_best_kernel(
    part, place_part, tiles, count, best, place, ENTRIES: tl.constexpr, TILES: tl.constexpr
):  # fmt: skip
    """Keep each entry's best positive, NaN above all, and of equal ones the first. Grid: (entries,)."""
    n = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)
    live = n < count
    score = tl.load(best + n, mask=live, other=-INFINITY)
    at = tl.load(place + n, mask=live, other=0)
    bad = (score != score).to(tl.int32)
    for first in range(0, tiles, TILES):
        t = first + tl.arange(0, TILES)[:, None]
        there = (t < tiles) & live[None, :]
        x = load_part(part, 0, t, tiles, n[None, :], count, there, -INFINITY)
        where = load_part(place_part, 0, t, tiles, n[None, :], count, there, _NOWHERE)
        bad = tl.maximum(bad, tl.max((x != x).to(tl.int32), 0))
        top = tl.max(tl.where(x == x, x, -INFINITY), 0)
        where = tl.min(tl.where(x == top[None, :], where, _NOWHERE), 0)
        at = tl.where(top > score, where, tl.where(top == score, tl.minimum(at, where), at))
        score = tl.maximum(score, top)
    tl.store(best + n, tl.where(bad > 0, float("nan"), score), mask=live)
    tl.store(place + n, at, mask=live)


@triton.jit
def finish_softmax_kernel(
    state, state_stride, sums, best, positives, hidden, classes, logit_scale, loss, rank, label_smoothing, count,
    SMOOTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Losses, the rest of the state, and ranks where `rank` is there. Grid: (entries,).

    positives, hidden: how many of each, or None: one, and none; `classes` counts what is hidden too.
    """
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = n < count
    top = tl.load(state + n, mask=live, other=0.0)
    total = tl.load(state + state_stride + n, mask=live, other=1.0)
    scale = tl.abs(tl.load(logit_scale).to(tl.float32) * LOG2E)
    own = tl.zeros([BLOCK], tl.int64) + 1
    if positives is not None:
        own = tl.load(positives + n, mask=live, other=0)
    every = tl.zeros([BLOCK], tl.int64) + classes
    if hidden is not None:
        every -= tl.load(hidden + n, mask=live, other=0)
    # As the tiles' exponents, so that what a positive adds to its row's sum is taken away again to the last bit.
    mean = tl.load(sums[0] + n, mask=live, other=0.0) / tl.maximum(own, 1).to(tl.float32)
    target = exponents(mean, scale, top)
    if SMOOTH:
        even = tl.load(sums[1] + n, mask=live, other=0.0) / every.to(tl.float32)
        target = (1 - label_smoothing) * target + label_smoothing * exponents(even, scale, top)
    x = (tl.log2(total) - target) * LN2
    x = tl.where(x < 0, 0.0, x)  # which only rounding can make of a cross-entropy
    x = tl.where(every == 1, x * 0.0, x)  # so has one class alone a loss
    x = tl.where(top == -INFINITY, float("nan"), x)  # all its logits are -inf
    tl.store(loss + n, tl.where(own > 0, x, 0.0), mask=live)
    tl.store(state + 2 * state_stride + n, own.to(tl.float32), mask=live)
    tl.store(state + 3 * state_stride + n, every.to(tl.float32), mask=live)
    if rank is not None:
        score = tl.load(best + n, mask=live, other=0.0)
        before = tl.load(sums[2] + n, mask=live, other=0).to(tl.int64)
        before = tl.where(score != score, every - own, before)
        tl.store(rank + n, tl.where(own > 0, before, -1), mask=live)


@triton.jit
def softmax_factors_kernel(
    state, state_stride, grad, grad_stride, largest, factors, ranges, boost, label_smoothing, count,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """What the gradient's tiles need of each row, see `softmax_factors`. Grid: (tiles of rows,)."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = n < count
    own = tl.load(state + 2 * state_stride + n, mask=live, other=0.0)
    every = tl.load(state + 3 * state_stride + n, mask=live, other=1.0)
    weight = tl.zeros([BLOCK], tl.float32)
    if grad is not None:
        # One class alone has the probability 1, whatever its logit.
        weight = tl.load(grad + n * grad_stride, mask=live & (own > 0) & (every > 1), other=0.0).to(tl.float32)
        weight *= boost / tl.load(largest)
    reference = tl.load(state + n, mask=live, other=0.0)
    tl.store(factors + n, reference, mask=live)
    tl.store(ranges + 2 * tl.program_id(0), tl.min(tl.where(live, reference, INFINITY), 0))
    tl.store(ranges + 2 * tl.program_id(0) + 1, tl.max(tl.where(live, reference, -INFINITY), 0))
    total = tl.load(state + state_stride + n, mask=live, other=1.0)
    tl.store(factors + count + n, tl.where(weight == 0, 0.0, weight / total), mask=live)
    share = (1 - label_smoothing) * weight / tl.maximum(own, 1.0)
    tl.store(factors + 2 * tl.cast(count, tl.int64) + n, share, mask=live)
    tl.store(factors + 3 * tl.cast(count, tl.int64) + n, label_smoothing * weight / every, mask=live)


class Side:
    """The running state of one direction's rows.

    Args:
        rows: how many.
        like: a tensor of the device.
        fields: of the parts beyond reference and sum: the field of the positives' products, of all products, and of how
            many stand before the best positive; 0: not asked for.
        products: [rows], of each row's one positive, where the parts don't have them.
    """

    def __init__(self, rows: int, like: Tensor, fields: tuple[int, int, int], products: Tensor | None) -> None:
        self.rows, self.fields = rows, fields
        self.state = like.new_zeros(4, rows, dtype=torch.float32)
        self.state[0].fill_(-torch.inf)
        positive, even, before = fields
        self.sums = (
            like.new_zeros(rows, dtype=torch.float32) if positive else products,
            like.new_zeros(rows, dtype=torch.float32) if even else None,
            like.new_zeros(rows, dtype=torch.int32) if before else None,
        )
        self.best = like.new_full((rows,), -torch.inf, dtype=torch.float32) if before else None
        self.place = like.new_zeros(rows, dtype=torch.int32) if before else None

    @property
    def fields_of_hard(self) -> tuple[int, int, int]:
        """Of parts without positives."""
        gone = int(self.fields[0] > 0)
        return 0, max(self.fields[1] - gone, 0), max(self.fields[2] - gone, 0)

    def add(self, part: Tensor, fields: tuple[int, int, int], first: int = 0) -> None:
        """Parts [fields, tiles, count] of the rows from `first` on."""
        _, tiles, count = part.shape
        sums = tuple(None if x is None else x[first:] for x in self.sums)
        launch(
            merge_softmax_kernel, (ceil_div(count, _MERGE_ENTRIES),), _MERGE,
            part, tiles, count, self.state[0, first:], self.rows, sums,
            POSITIVE=fields[0], EVEN=fields[1], BEFORE=fields[2], ENTRIES=_MERGE_ENTRIES, TILES=_MERGE_TILES,
        )  # fmt: skip

    def add_best(self, part: Tensor, places: Tensor, first: int = 0) -> None:
        """Best positives [1, tiles, count] of the rows from `first` on, and where they stand."""
        assert self.best is not None and self.place is not None
        _, tiles, count = part.shape
        launch(
            merge_best_kernel, (ceil_div(count, _MERGE_ENTRIES),), _MERGE,
            part, places, tiles, count, self.best[first:], self.place[first:],
            ENTRIES=_MERGE_ENTRIES, TILES=_MERGE_TILES,
        )  # fmt: skip

    def finish(
        self,
        logit_scale: Tensor,
        label_smoothing: float,
        positives: Tensor | None,
        hidden: Tensor | None,
        classes: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Losses [rows], state [4, rows], ranks [rows] or [0].

        Args:
            positives, hidden: int64 [rows], how many each row has; None: one, and none.
            classes: columns, hidden ones too.
        """
        loss = self.state.new_empty(self.rows)
        rank = loss.new_empty(self.rows if self.fields[2] else 0, dtype=torch.int64)
        launch(
            finish_softmax_kernel, (ceil_div(self.rows, _LINE_BLOCK),), _LINES,
            self.state, self.rows, self.sums, self.best, positives, hidden, classes, logit_scale, loss,
            rank if self.fields[2] else None, label_smoothing, self.rows,
            SMOOTH=label_smoothing > 0, BLOCK=_LINE_BLOCK,
        )  # fmt: skip
        return loss, self.state, rank


def softmax_factors(
    state: Tensor, grad: Tensor | None, largest: Tensor, boost: float, label_smoothing: float, tile: int
) -> tuple[Tensor, Tensor]:
    """What the gradient's tiles need of one direction.

    Args:
        largest: above 0, of all gradients by magnitude, which becomes `boost`: 16-bit gradients of logits then neither
            underflow nor overflow.
        tile: of rows.

    Returns:
        float32 [4, rows]: reference, and times the row's gradient: of a probability, of a positive, of any column;
        and [tiles, 2]: the least and the largest reference of each tile.
    """
    rows = state.shape[1]
    factors, ranges = state.new_empty(4, rows), state.new_empty(ceil_div(rows, tile), 2)
    launch(
        softmax_factors_kernel, (ceil_div(rows, tile),), _LINES,
        state, state.stride(0), grad, 0 if grad is None else grad.stride(0), largest, factors, ranges, boost,
        label_smoothing, rows, BLOCK=tile,
    )  # fmt: skip
    return factors, ranges
