"""The states of rows in Triton: each tile of logits is reduced as soon as it is multiplied, and the results merged.

A tile's reference is a whole number near its row's largest logit, so that nothing is rounded when it is subtracted.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.ops.common.triton.constants import INFINITY, LOG2E
from mmkernels.ops.common.triton.launch import ceil_div
from mmkernels.ops.common.triton.tiles import split_columns
from mmkernels.ops.linear import formula
from mmkernels.ops.linear.triton.arguments import Buffer, Fields
from mmkernels.ops.linear.triton.call import Head
from mmkernels.ops.linear.triton.tiles import (
    buffer_offsets,
    capped,
    exponential,
    has_target,
    hide_past_the_end,
    live_rows,
    logits_tile,
    place_of,
    with_bias,
)
from mmkernels.plan import Config
from mmkernels.runtime.triton import launch

PARTIAL_BYTES = 2**26  # of the tiles' results of one launch
FLOAT16_OCTAVES = 15  # float16 exponentials are stored times 2^15, so that few of them underflow

_REFERENCE, _SUM = tl.constexpr(0), tl.constexpr(1)
_NO_INDEX = tl.constexpr(2**31 - 1)
_MERGE = Config(16, 64, 4, 1)  # rows and tiles of one step

REFERENCE, SUM, PICKED = (tl.constexpr(x) for x in (formula.REFERENCE, formula.SUM, formula.PICKED))
MOMENT, TOTAL, BEST = (tl.constexpr(x) for x in (formula.MOMENT, formula.TOTAL, formula.BEST))


@triton.jit
def store_partial(partials, field, tile, tiles, n, rows, live, x):
    """Store one field of a tile's rows in [fields, tiles, rows]."""
    tl.store(partials + (tl.cast(field, tl.int64) * tiles + tile) * rows + n, x, mask=live)


@triton.jit
def states_of_tile(
    z, vectors, picked, partials, best_indices, stored, numbers, extent, live_count, place, tile, tiles,
    SOFTCAP: tl.constexpr, FIELDS: tl.constexpr, OCTAVES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    FIRST: tl.constexpr,
):  # fmt: skip
    """Store the results of a tile's COLUMNS columns from its column FIRST on; see `states_kernel`."""
    column = place.column + FIRST
    j = column + tl.arange(0, COLUMNS)
    n = place.row - extent.first_row + tl.arange(0, ROWS)
    live = n < live_count
    y = hide_past_the_end(capped(with_bias(z, vectors.bias, j, extent), numbers, SOFTCAP), j, extent)
    target = tl.load(vectors.targets + extent.first_row + n)
    if has_target(target, column, COLUMNS):
        here = j[None, :] == target[:, None]
        mine = live & (target >= column) & (target < column + COLUMNS)
        tl.store(picked + extent.first_row + n, tl.sum(tl.where(here, y, 0.0), 1), mask=mine)
    if FIELDS.total >= 0:
        factor = tl.load(vectors.token_weight + j, mask=j < extent.end_token, other=0.0)
        weighted = tl.where((j < extent.end_token)[None, :], y * factor[None, :], 0.0)
        store_partial(partials, FIELDS.total, tile, tiles, n, extent.rows, live, tl.sum(weighted, 1))
    top = tl.max(y, 1)
    if FIELDS.best >= 0:
        index = tl.min(tl.where(y == top[:, None], j[None, :], _NO_INDEX), 1)
        store_partial(partials, FIELDS.best, tile, tiles, n, extent.rows, live, top)
        store_partial(best_indices, 0, tile, tiles, n, extent.rows, live, index)
    reference = tl.ceil(tl.where(top > -INFINITY, top, 0.0))
    y = y - reference[:, None]
    weights = tl.exp2(tl.fma(y, LOG2E, 1.0 * OCTAVES)) if OCTAVES > 0 else exponential(y)
    total = tl.sum(weights, 1)
    if FIELDS.moment >= 0:
        moment = tl.sum(weights * tl.where(weights == 0, 0.0, y), 1)
        store_partial(partials, FIELDS.moment, tile, tiles, n, extent.rows, live, moment)
    store_partial(partials, _REFERENCE, tile, tiles, n, extent.rows, live, reference)
    store_partial(partials, _SUM, tile, tiles, n, extent.rows, live, total * (0.5**OCTAVES))
    if stored.data is not None:
        offsets = buffer_offsets(place, extent, column, stored.stride, ROWS, COLUMNS)
        tl.store(stored.data + offsets, weights.to(stored.data.dtype.element_ty))


@triton.jit
def states_kernel(
    hidden, weight, vectors, picked, partials, best_indices, stored, numbers, strides, extent,
    SOFTCAP: tl.constexpr, FIELDS: tl.constexpr, OCTAVES: tl.constexpr, HALVED: tl.constexpr, FLATTEN: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Store the states of each row over each tile's tokens, or over each half of them. Grid: (programs,).

    picked: float32 [packed rows], receives the targets' logits.
    partials: float32 [fields, tiles or halves, rows] of REFERENCE, SUM and `Fields`; best_indices: int32, one field.
    stored: a `Buffer` that receives exp(y - the tile's reference) times 2^OCTAVES, of whole tiles; None: not wanted.
    """
    live_count = live_rows(extent)
    row_tiles = tl.cdiv(live_count, TILE.BLOCK_Q)
    column_tiles = tl.cdiv(extent.end_token - extent.first_token, TILE.BLOCK_K)
    for t in tl.range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0), flatten=FLATTEN):
        place = place_of(t, row_tiles, column_tiles, extent.first_row, extent.first_token, TILE)
        z = logits_tile(hidden, weight, place, strides, extent, TILE)
        if HALVED:
            HALF: tl.constexpr = TILE.BLOCK_K // 2
            left, right = split_columns(z, TILE.BLOCK_Q, TILE.BLOCK_K)
            states_of_tile(
                left, vectors, picked, partials, best_indices, stored, numbers, extent, live_count,
                place, 2 * place.column_tile, 2 * column_tiles,
                SOFTCAP=SOFTCAP, FIELDS=FIELDS, OCTAVES=OCTAVES, ROWS=TILE.BLOCK_Q, COLUMNS=HALF, FIRST=0,
            )  # fmt: skip
            states_of_tile(
                right, vectors, picked, partials, best_indices, stored, numbers, extent, live_count,
                place, 2 * place.column_tile + 1, 2 * column_tiles,
                SOFTCAP=SOFTCAP, FIELDS=FIELDS, OCTAVES=OCTAVES, ROWS=TILE.BLOCK_Q, COLUMNS=HALF, FIRST=HALF,
            )  # fmt: skip
        else:
            states_of_tile(
                z, vectors, picked, partials, best_indices, stored, numbers, extent, live_count,
                place, place.column_tile, column_tiles,
                SOFTCAP=SOFTCAP, FIELDS=FIELDS, OCTAVES=OCTAVES, ROWS=TILE.BLOCK_Q, COLUMNS=TILE.BLOCK_K, FIRST=0,
            )  # fmt: skip


@triton.jit
def merge_states_kernel(
    partials, best_indices, picked, states, best_index, tiles, states_stride, tokens, extent,
    FIELDS: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Merge the tiles' results of packed rows, and fill in rows that take no part. Grid: (blocks of rows,).

    states: float32 [6, packed rows], with a stride; best_index: int64 [packed rows]; both
    begin with the extent's first row.
    """
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live_count = live_rows(extent)
    inside, live = n < extent.rows, n < live_count
    top, best = tl.full([ROWS], -INFINITY, tl.float32), tl.full([ROWS], -INFINITY, tl.float32)
    total, moment = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    weighted = tl.zeros([ROWS], tl.float64)
    index = tl.full([ROWS], _NO_INDEX, tl.int32)
    if tl.program_id(0) * ROWS < live_count:
        for first in range(0, tiles, TILES):
            tile = first + tl.arange(0, TILES)[:, None]
            at = tile.to(tl.int64) * extent.rows + n[None, :]
            field = tl.cast(tiles, tl.int64) * extent.rows
            mask = (tile < tiles) & live[None, :]
            reference = tl.load(partials + at, mask=mask, other=0.0)
            x = tl.load(partials + field + at, mask=mask, other=0.0)
            reference = tl.where(x == 0, -INFINITY, reference)
            new = tl.maximum(top, tl.max(reference, 0))
            base = tl.where(new == -INFINITY, 0.0, new)
            shift, old_shift = reference - base[None, :], top - base
            factor, old_factor = exponential(shift), exponential(old_shift)
            if FIELDS.moment >= 0:
                part = tl.load(partials + FIELDS.moment * field + at, mask=mask, other=0.0)
                part = tl.where(factor == 0, 0.0, factor * tl.fma(shift, x, part))
                old = tl.where(old_factor == 0, 0.0, old_factor * tl.fma(old_shift, total, moment))
                moment = old + tl.sum(part, 0)
            total = total * old_factor + tl.sum(x * factor, 0)
            top = new
            if FIELDS.total >= 0:
                part = tl.load(partials + FIELDS.total * field + at, mask=mask, other=0.0)
                weighted += tl.sum(part.to(tl.float64), 0)
            if FIELDS.best >= 0:
                part = tl.load(partials + FIELDS.best * field + at, mask=mask, other=-INFINITY)
                there = tl.load(best_indices + at, mask=mask, other=_NO_INDEX)
                part_best = tl.max(part, 0)
                there = tl.min(tl.where(part == part_best[None, :], there, _NO_INDEX), 0)
                nearer = tl.where(part_best == best, tl.minimum(index, there), index)
                index = tl.where(part_best > best, there, nearer)
                best = tl.maximum(best, part_best)
    out = states + n
    tl.store(out + REFERENCE * states_stride, tl.where(live, top, 0.0), mask=inside)
    tl.store(out + SUM * states_stride, tl.where(live, total, 1.0), mask=inside)
    of_target = tl.load(picked + extent.first_row + n, mask=live, other=0.0)
    tl.store(out + PICKED * states_stride, of_target, mask=inside)
    tl.store(out + MOMENT * states_stride, tl.where(live, moment, 0.0), mask=inside)
    tl.store(out + TOTAL * states_stride, tl.where(live, weighted.to(tl.float32), 0.0), mask=inside)
    if FIELDS.best >= 0:
        # Where a logit is NaN there is no largest one; a sum is NaN also where inf is the largest.
        is_nan = (total != total) & (best < INFINITY)
        index = tl.where(is_nan | (index == _NO_INDEX), tokens - 1, index)
        tl.store(best_index + n, tl.where(live, index, -1).to(tl.int64), mask=inside)
        best = tl.where(is_nan, float("nan"), best)
        tl.store(out + BEST * states_stride, tl.where(live, best, 0.0), mask=inside)
    else:
        tl.store(out + BEST * states_stride, tl.zeros([ROWS], tl.float32), mask=inside)


def add_states(
    head: Head, rows: slice, states: Tensor, best_index: Tensor | None, token_weight: Tensor | None, *, entropy: bool,
    stored: Buffer | None = None, octaves: int = 0,
) -> Tensor:  # fmt: skip
    """Fill in the states of some packed rows over all tokens.

    Args:
        states: float32 [6, packed rows]. best_index: int64 [packed rows]; None: not wanted.
        stored, octaves: see `states_kernel`.

    Returns:
        the results of tiles, or halves, float32 [fields, tiles, rows].
    """
    fields = Fields.of(moment=entropy, total=token_weight is not None, best=best_index is not None)
    tiles, count = head.columns_of(head.all_tokens), rows.stop - rows.start
    partials = states.new_empty(fields.size, tiles, count)
    best_indices = None if best_index is None else states.new_empty(tiles, count, dtype=torch.int32)
    extent = head.extent(rows, head.all_tokens)
    launch(
        states_kernel, head.grid(head.logits, count, head.tokens), head.logits,
        *head.logits_operands, head.vectors(token_weight), head.rows.picked, partials, best_indices,
        stored or Buffer(None, 0), head.numbers, head.strides, extent,
        SOFTCAP=head.softcap, FIELDS=fields, OCTAVES=octaves, HALVED=head.halved, FLATTEN=head.flatten,
        TILE=head.logits_tile,
    )  # fmt: skip
    launch(
        merge_states_kernel, (ceil_div(count, _MERGE.block_q),), _MERGE,
        partials, best_indices, head.rows.picked, states[:, rows], None if best_index is None else best_index[rows],
        tiles, states.stride(0), head.tokens, extent,
        FIELDS=fields, ROWS=_MERGE.block_q, TILES=_MERGE.block_k,
    )  # fmt: skip
    return partials


def all_states(head: Head, token_weight: Tensor | None, *, entropy: bool, best: bool) -> tuple[Tensor, Tensor | None]:
    """Returns the states [6, T] of all rows, and the largest logits' tokens, in packed order."""
    states = head.rows.picked.new_empty(formula.STATES_OF_ROW, head.rows.total)
    best_index = head.rows.order.new_empty(head.rows.total) if best else None
    row_bytes = 4 * (3 + 2 * entropy + 2 * best + (token_weight is not None)) * head.columns_of(head.all_tokens)
    for rows in head.split_rows(row_bytes, PARTIAL_BYTES):
        add_states(head, rows, states, best_index, token_weight, entropy=entropy)
    return states, best_index
