"""One direction's softmax in Triton: partial results of tiles are merged into running states, and give the losses.

Blocks of columns may come in any order and from anywhere. References are whole numbers wherever float32 represents all
of them, so a merge rounds only sums.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.ops.common.triton.constants import INFINITY, LN2, LOG2E
from mmkernels.ops.common.triton.launch import ceil_div
from mmkernels.ops.contrastive.info_nce import reduction
from mmkernels.ops.contrastive.triton.arguments import Lines
from mmkernels.ops.contrastive.triton.tiles import exponents, load_partial
from mmkernels.runtime.triton import launch
from mmkernels.runtime.tuning import Config

# Fields of partial results, and rows of a state.
REFERENCE, SUM = tl.constexpr(reduction.REFERENCE), tl.constexpr(reduction.SUM)
_POSITIVES, _CLASSES = tl.constexpr(reduction.POSITIVES), tl.constexpr(reduction.CLASSES)
# Further rows of a direction's factors [4, rows], see `softmax_factors`.
PROBABILITY_FACTOR, POSITIVE_FACTOR, CLASS_FACTOR = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)

_MERGE, _MERGE_ENTRIES, _MERGE_TILES = Config(0, 0, 4, 1), 64, 32
_FINISH, _FINISH_BLOCK = Config(0, 0, 4, 1), 256
_NO_INDEX = tl.constexpr(2**31 - 1)


class Fields(NamedTuple):
    """The places of optional fields in partial results [fields, tiles, lines]; 0: absent.

    Args:
        positive: the sum of the positives' dot products.
        all: the sum of all visible dot products, for label smoothing.
        before: how many negatives rank before the line's best positive.
    """

    positive: int = 0
    all: int = 0
    before: int = 0

    @classmethod
    def of(cls, *, positive: bool, all: bool, before: bool) -> Fields:
        """Number the fields that are present, after REFERENCE and SUM."""
        first_all = 2 + positive
        return cls(2 * positive, first_all * all, (first_all + all) * before)

    @property
    def size(self) -> int:
        """The number of fields, REFERENCE and SUM included."""
        return 2 + sum(n > 0 for n in self)

    def without_positive(self) -> Fields:
        return Fields.of(positive=False, all=self.all > 0, before=self.before > 0)


class Sums(NamedTuple):
    """What partial results of `Fields` add up to, each [rows] or None."""

    positive: Any
    all: Any
    before: Any


class Best(NamedTuple):
    """The best positive of each row, float32 and int32 [rows]: its base-2 logit and its column."""

    score: Any
    index: Any


@triton.jit
def _add_to(target, n, x, live):
    tl.store(target + n, tl.load(target + n, mask=live) + x, mask=live)


@triton.jit
def merge_softmax_kernel(
    partials, tiles, lines, state, state_stride, sums,
    FIELDS: tl.constexpr, ENTRIES: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Add partial results to the references and sums of a state, and to `sums`. Grid: (entries,).

    partials: float32 [fields, tiles, lines].
    """
    n = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)
    live = n < lines
    top = tl.load(state + n, mask=live, other=-INFINITY)
    total = tl.load(state + state_stride + n, mask=live, other=0.0)
    positive, all_pairs = tl.zeros([ENTRIES], tl.float32), tl.zeros([ENTRIES], tl.float32)
    before = tl.zeros([ENTRIES], tl.int32)
    for first in range(0, tiles, TILES):
        t = first + tl.arange(0, TILES)[:, None]
        part = Lines(t, tiles, n[None, :], lines, (t < tiles) & live[None, :])
        reference = load_partial(partials, REFERENCE, part, 0.0)
        x = load_partial(partials, SUM, part, 0.0)
        # Normalise sums to 1 <= x < 2, whatever the tile's reference was: powers of two round nothing.
        normal = reference + tl.floor(tl.log2(x))
        x = tl.where(x > 0, x * tl.exp2(reference - normal), x)
        normal = tl.where(x > 0, normal, -INFINITY)
        new = tl.maximum(top, tl.max(normal, 0))
        base = tl.where(new == -INFINITY, 0.0, new)
        total = total * tl.exp2(top - base) + tl.sum(x * tl.exp2(normal - base[None, :]), 0)
        top = new
        if FIELDS.positive > 0:
            positive += tl.sum(load_partial(partials, FIELDS.positive, part, 0.0), 0)
        if FIELDS.all > 0:
            all_pairs += tl.sum(load_partial(partials, FIELDS.all, part, 0.0), 0)
        if FIELDS.before > 0:
            before += tl.sum(load_partial(partials, FIELDS.before, part, 0.0).to(tl.int32), 0)
    tl.store(state + n, top, mask=live)
    tl.store(state + state_stride + n, total, mask=live)
    if FIELDS.positive > 0:
        _add_to(sums.positive, n, positive, live)
    if FIELDS.all > 0:
        _add_to(sums.all, n, all_pairs, live)
    if FIELDS.before > 0:
        _add_to(sums.before, n, before, live)


@triton.jit
def merge_best_kernel(scores, indices, tiles, lines, best, ENTRIES: tl.constexpr, TILES: tl.constexpr):
    """Keep each entry's best positive, NaN above all, and of equal ones the first. Grid: (entries,).

    scores, indices: [1, tiles, lines].
    """
    n = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)
    live = n < lines
    score = tl.load(best.score + n, mask=live, other=-INFINITY)
    index = tl.load(best.index + n, mask=live, other=0)
    is_nan = (score != score).to(tl.int32)
    for first in range(0, tiles, TILES):
        t = first + tl.arange(0, TILES)[:, None]
        part = Lines(t, tiles, n[None, :], lines, (t < tiles) & live[None, :])
        x = load_partial(scores, 0, part, -INFINITY)
        new_index = load_partial(indices, 0, part, _NO_INDEX)
        is_nan = tl.maximum(is_nan, tl.max((x != x).to(tl.int32), 0))
        top = tl.max(tl.where(x == x, x, -INFINITY), 0)
        new_index = tl.min(tl.where(x == top[None, :], new_index, _NO_INDEX), 0)
        index = tl.where(top > score, new_index, tl.where(top == score, tl.minimum(index, new_index), index))
        score = tl.maximum(score, top)
    tl.store(best.score + n, tl.where(is_nan > 0, float("nan"), score), mask=live)
    tl.store(best.index + n, index, mask=live)


@triton.jit
def finish_softmax_kernel(
    state, state_stride, sums, best, positives, hidden, columns, logit_scale, loss, rank, label_smoothing, rows,
    SMOOTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute losses, the rest of the state, and ranks unless `rank` is None. Grid: (entries,).

    positives, hidden: int64 [rows], how many pairs of each row are; None: one, and none.
    columns: how many pairs a row has, hidden ones included.
    """
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = n < rows
    top = tl.load(state + n, mask=live, other=0.0)
    total = tl.load(state + state_stride + n, mask=live, other=1.0)
    scale = tl.abs(tl.load(logit_scale).to(tl.float32) * LOG2E)
    positive_count = tl.zeros([BLOCK], tl.int64) + 1
    if positives is not None:
        positive_count = tl.load(positives + n, mask=live, other=0)
    classes = tl.zeros([BLOCK], tl.int64) + columns
    if hidden is not None:
        classes -= tl.load(hidden + n, mask=live, other=0)
    # The tiles' `exponents`, so that what a positive adds to its row's sum cancels to the last bit.
    mean = tl.load(sums.positive + n, mask=live, other=0.0) / tl.maximum(positive_count, 1).to(tl.float32)
    target = exponents(mean, scale, top)
    if SMOOTH:
        mean_of_all = tl.load(sums.all + n, mask=live, other=0.0) / classes.to(tl.float32)
        target = (1 - label_smoothing) * target + label_smoothing * exponents(mean_of_all, scale, top)
    x = (tl.log2(total) - target) * LN2
    x = tl.where(x < 0, 0.0, x)  # a cross-entropy is >= 0: below is rounding noise
    x = tl.where(classes == 1, x * 0.0, x)  # a single class has loss 0, or NaN
    x = tl.where(top == -INFINITY, float("nan"), x)  # all logits of the row are -inf
    tl.store(loss + n, tl.where(positive_count > 0, x, 0.0), mask=live)
    tl.store(state + _POSITIVES * state_stride + n, positive_count.to(tl.float32), mask=live)
    tl.store(state + _CLASSES * state_stride + n, classes.to(tl.float32), mask=live)
    if rank is not None:
        score = tl.load(best.score + n, mask=live, other=0.0)
        before = tl.load(sums.before + n, mask=live, other=0).to(tl.int64)
        before = tl.where(score != score, classes - positive_count, before)
        tl.store(rank + n, tl.where(positive_count > 0, before, -1), mask=live)


@triton.jit
def softmax_factors_kernel(
    state, state_stride, grad, grad_stride, largest, factors, ranges, loss_scale, label_smoothing, rows,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute what `softmax_factors` returns. Grid: (tiles of rows,)."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = n < rows
    positive_count = tl.load(state + _POSITIVES * state_stride + n, mask=live, other=0.0)
    classes = tl.load(state + _CLASSES * state_stride + n, mask=live, other=1.0)
    weight = tl.zeros([BLOCK], tl.float32)
    if grad is not None:
        # A single class has the probability 1 whatever its logit is, so its gradient is 0.
        has_gradient = live & (positive_count > 0) & (classes > 1)
        weight = tl.load(grad + n * grad_stride, mask=has_gradient, other=0.0).to(tl.float32)
        weight *= loss_scale / tl.load(largest)
    reference = tl.load(state + n, mask=live, other=0.0)
    tl.store(factors + n, reference, mask=live)
    tl.store(ranges + 2 * tl.program_id(0), tl.min(tl.where(live, reference, INFINITY), 0))
    tl.store(ranges + 2 * tl.program_id(0) + 1, tl.max(tl.where(live, reference, -INFINITY), 0))
    total = tl.load(state + state_stride + n, mask=live, other=1.0)
    tl.store(factors + rows + n, tl.where(weight == 0, 0.0, weight / total), mask=live)
    share = (1 - label_smoothing) * weight / tl.maximum(positive_count, 1.0)
    tl.store(factors + POSITIVE_FACTOR * tl.cast(rows, tl.int64) + n, share, mask=live)
    tl.store(factors + CLASS_FACTOR * tl.cast(rows, tl.int64) + n, label_smoothing * weight / classes, mask=live)


class DirectionState:
    """The running softmax of one direction's rows.

    Args:
        rows: how many.
        like: a tensor on the device.
        fields: of the direction's partial results.
        positive_dots: float32 [rows], the dot product of each row's only positive, for partial results without them.
    """

    def __init__(self, rows: int, like: Tensor, fields: Fields, positive_dots: Tensor | None) -> None:
        self.rows, self.fields = rows, fields
        self.state = like.new_zeros(4, rows, dtype=torch.float32)  # reduction.REFERENCE, ...
        self.state[reduction.REFERENCE].fill_(-torch.inf)
        self.sums = Sums(
            positive=like.new_zeros(rows, dtype=torch.float32) if fields.positive else positive_dots,
            all=like.new_zeros(rows, dtype=torch.float32) if fields.all else None,
            before=like.new_zeros(rows, dtype=torch.int32) if fields.before else None,
        )
        self.best: Best | None = None
        if fields.before:
            score = like.new_full((rows,), -torch.inf, dtype=torch.float32)
            self.best = Best(score, like.new_zeros(rows, dtype=torch.int32))

    def add(self, partials: Tensor, fields: Fields, first: int = 0) -> None:
        """Add partial results [fields, tiles, lines] of the rows from `first` on."""
        _, tiles, lines = partials.shape
        sums = Sums(*(None if x is None else x[first:] for x in self.sums))
        launch(
            merge_softmax_kernel, (ceil_div(lines, _MERGE_ENTRIES),), _MERGE,
            partials, tiles, lines, self.state[0, first:], self.rows, sums,
            FIELDS=fields, ENTRIES=_MERGE_ENTRIES, TILES=_MERGE_TILES,
        )  # fmt: skip

    def add_best(self, scores: Tensor, indices: Tensor, first: int = 0) -> None:
        """Add the best positives [1, tiles, lines] of the rows from `first` on."""
        assert self.best is not None
        _, tiles, lines = scores.shape
        launch(
            merge_best_kernel, (ceil_div(lines, _MERGE_ENTRIES),), _MERGE,
            scores, indices, tiles, lines, Best(self.best.score[first:], self.best.index[first:]),
            ENTRIES=_MERGE_ENTRIES, TILES=_MERGE_TILES,
        )  # fmt: skip

    def finish(
        self,
        logit_scale: Tensor,
        label_smoothing: float,
        positives: Tensor | None,
        hidden: Tensor | None,
        columns: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns losses [rows], the state [4, rows], and ranks [rows] or [0].

        Args:
            positives, hidden: int64 [rows], how many pairs of each row are; None: one, and none.
            columns: how many pairs a row has, hidden ones included.
        """
        loss = self.state.new_empty(self.rows)
        rank = loss.new_empty(self.rows if self.fields.before else 0, dtype=torch.int64)
        launch(
            finish_softmax_kernel, (ceil_div(self.rows, _FINISH_BLOCK),), _FINISH,
            self.state, self.rows, self.sums, self.best, positives, hidden, columns, logit_scale, loss,
            rank if self.fields.before else None, label_smoothing, self.rows,
            SMOOTH=label_smoothing > 0, BLOCK=_FINISH_BLOCK,
        )  # fmt: skip
        return loss, self.state, rank


def softmax_factors(
    state: Tensor, grad: Tensor | None, largest: Tensor, loss_scale: float, label_smoothing: float, tile: int
) -> tuple[Tensor, Tensor]:
    """Returns what the tiles of gradients need of one direction's rows.

    Args:
        largest: > 0, the largest magnitude of all gradients. It is scaled to `loss_scale`, so that 16-bit gradients of
            logits neither underflow nor overflow.
        tile: rows of a tile.

    Returns:
        float32 [4, rows]: the reference, and the gradient of the row's loss as the factor of a probability, of a
        positive and of any class; and [tiles, 2]: the smallest and the largest reference of each tile.
    """
    rows = state.shape[1]
    factors, ranges = state.new_empty(4, rows), state.new_empty(ceil_div(rows, tile), 2)
    launch(
        softmax_factors_kernel, (ceil_div(rows, tile),), _FINISH,
        state, state.stride(0), grad, 0 if grad is None else grad.stride(0), largest, factors, ranges, loss_scale,
        label_smoothing, rows, BLOCK=tile,
    )  # fmt: skip
    return factors, ranges
