"""Co-attention's forward pass in Triton: a launch for a's rows and one for b's, which together multiply 4 matrices.

Each side is attention with an online softmax over the other one. Three products would do if one tile of scores served
both, whose sums of columns would take atomics; and one launch for both sides takes the shared memory of both. Few rows
against many, as words against patches, leave most of a GPU idle: there the other side is split over programs, whose
results `merge_splits` puts together.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.ops.attention.co_attention.record import Arguments
from mmkernels.ops.attention.co_attention.triton.calls import CoCall, Side
from mmkernels.ops.attention.co_attention.triton.floor import find_floor
from mmkernels.ops.attention.co_attention.triton.sides import (
    kept,
    part_at,
    raised,
    rows_of,
    share_of,
    side_scores,
    tile_of,
    valid_at,
    walk_over_other,
)
from mmkernels.ops.attention.triton.arguments import Halves, State
from mmkernels.ops.attention.triton.attend import (
    MERGE,
    add_both_values,
    add_scores,
    finish_rows,
    lowest_if_nothing,
    merge_splits,
)
from mmkernels.ops.attention.triton.call import one_tile
from mmkernels.ops.attention.triton.scores import opaque_zero, restore_non_finite
from mmkernels.ops.attention.triton.tiles import (
    add_halves,
    dot_keys,
    load_halves,
    load_key_halves,
    output_places,
    row_offsets,
    row_places,
    store_halves,
    zero_halves,
    zero_tile,
)
from mmkernels.ops.common.triton.constants import INFINITY, LN2
from mmkernels.ops.common.triton.launch import ceil_div
from mmkernels.runtime.triton import launch


@triton.jit
def places_of(rows, part, sizes, SPLIT: tl.constexpr):
    """Returns where each row's log-sum-exp and output stand, counted in rows."""
    places = row_places(rows, sizes)
    out_places = output_places(rows, sizes)
    if SPLIT:
        places += part.split.to(tl.int64) * sizes.batch * sizes.heads * sizes.q_len
        out_places = places
    return places, out_places


@triton.jit
def restore_side(
    out, own, other_value, other_valid, masks, lists, strides, part, splits, sizes, places, walk,
    SIDE: tl.constexpr, VALUE_DIM: tl.constexpr, UNIT: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Adds what is not finite in the other side's values to the stored rows that see it."""
    n = part.tile * BLOCK_Q + tl.arange(0, BLOCK_Q) + opaque_zero(own)
    rows = rows_of(n, part.problem, sizes.q_len)
    acc = zero_halves(BLOCK_Q, VALUE_DIM)
    begin, end = share_of(walk, part.split, splits, True)
    for m in tl.range(begin, end, num_stages=1):
        first = tile_of(walk, lists, m, True, SIDE) * BLOCK_K
        _, visible = side_scores(
            zero_tile(BLOCK_Q, BLOCK_K), masks, rows, first, part.problem, sizes, 1.0, SIDE, BLOCK_K
        )  # fmt: skip
        others = first + tl.arange(0, BLOCK_K)
        visible = visible & valid_at(other_valid, strides.valid, part.problem, others, sizes.k_len)[None, :]
        v = load_key_halves(
            other_value, part.problem, first, strides.value, sizes.k_len, VALUE_DIM, UNIT, BLOCK_K, False, False
        )  # fmt: skip
        acc = restore_non_finite(acc, v, visible, VALUE_DIM)
    add_halves(out, places * VALUE_DIM.size, rows.live, acc, 1, VALUE_DIM)


@triton.jit
def co_forward_kernel(
    own, other, other_value, other_valid, out, lse, masks, lists, dropout, floor, own_strides, strides, sizes, scale,
    splits,
    SIDE: tl.constexpr, SPLIT: tl.constexpr, ALL_PARTIAL: tl.constexpr, HIDES: tl.constexpr, NEGATE: tl.constexpr,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """Computes one tile of rows of the own side over one part of the other one, whose `strides` are given.

    `out` and `lse` are the op's, or of the parts as `attend` has them. Grid: (row tiles x problems x splits,).
    """
    part = part_at(tl.program_id(0), sizes, splits, BLOCK_Q)
    problem = part.problem
    rows = rows_of(part.tile * BLOCK_Q + tl.arange(0, BLOCK_Q), problem, sizes.q_len)
    q = load_halves(own, row_offsets(rows, own_strides.x, UNIT), rows.live, own_strides.x.column, DIM)
    if NEGATE:
        q = Halves(-q.first, -q.second)
    state = State(tl.full([BLOCK_Q], -INFINITY, tl.float32), tl.zeros([BLOCK_Q], tl.float32))
    acc = zero_halves(BLOCK_Q, VALUE_DIM)
    non_finite = tl.zeros([BLOCK_K], tl.int32)
    walk = walk_over_other(lists, masks, rows, part, sizes, SIDE, BLOCK_K, ALL_PARTIAL)
    for MASKED in tl.static_range(2):
        begin, end = share_of(walk, part.split, splits, MASKED)
        for m in range(begin, end):
            first = tile_of(walk, lists, m, MASKED, SIDE) * BLOCK_K
            scores, _ = dot_keys(
                q, other, problem, first, strides.x, sizes.k_len, DIM, UNIT, BLOCK_K, not MASKED, False, PRECISION
            )
            if MASKED:
                scores, _ = side_scores(scores, masks, rows, first, problem, sizes, scale, SIDE, BLOCK_K)
                scores = raised(scores, floor)
                others = first + tl.arange(0, BLOCK_K)
                seen = valid_at(other_valid, strides.valid, problem, others, sizes.k_len)
                scores = tl.where(seen[None, :], scores, -INFINITY)
            state, weights, shrink = add_scores(state, scores, scale, not MASKED)
            if dropout is not None:
                keep = kept(dropout, rows, part.tile * BLOCK_Q, first, problem, sizes, SIDE, BLOCK_Q, BLOCK_K)
                weights = tl.where(keep, weights, 0.0)
            acc, non_finite = add_both_values(
                acc, non_finite, weights, shrink, other_value, problem, first, strides.value, sizes.k_len,
                MASKED, HIDES, VALUE_DIM, BLOCK_K, PRECISION, UNIT, False,
            )  # fmt: skip
        if not MASKED:
            if end > begin:
                state = lowest_if_nothing(state)

    places, out_places = places_of(rows, part, sizes, SPLIT)
    factor = tl.full([BLOCK_Q], 1.0, tl.float32)
    if dropout is not None:
        factor = factor * dropout.scale
    done, log2 = finish_rows(state, acc, factor, VALUE_DIM, SPLIT)
    tl.store(lse + places, log2 if SPLIT else log2 * LN2, mask=rows.live)
    store_halves(out, out_places * VALUE_DIM.size, rows.live, done, 1, VALUE_DIM)
    if HIDES:
        # Rare. The rows are corrected last, so that the loops need no registers for it.
        if tl.max(non_finite, 0) > 0:
            restore_side(
                out, own, other_value, other_valid, masks, lists, strides, part, splits, sizes, out_places, walk,
                SIDE, VALUE_DIM, UNIT, BLOCK_Q, BLOCK_K,
            )  # fmt: skip


def forward(args: Arguments) -> tuple[Tensor, ...]:
    """Returns `Results`."""
    call = CoCall(args)
    floor = find_floor(call, args)
    (out_a, lse_a), (out_b, lse_b) = (_attend(call, side, floor if args.clamp else None) for side in call.sides)
    return out_a, out_b, lse_a, lse_b, floor


def _attend(call: CoCall, side: Side, floor: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns the output and the log-sum-exp of one side."""
    other, sizes, plan = call.other(side), side.sizes, call.config(call.forward_kernel)
    splits, channels = call.splits(side, plan), other.value.shape[3]
    out = side.x.new_empty(sizes.batch, sizes.q_len, sizes.heads, channels).transpose(1, 2)
    lse = side.x.new_empty(sizes.batch, sizes.heads, sizes.q_len, dtype=torch.float32)
    part_out, part_lse = out, lse
    if splits > 1:
        part_out = lse.new_empty(splits, call.problems, sizes.q_len, channels)
        part_lse = lse.new_empty(splits, call.problems, sizes.q_len)
    launch(
        co_forward_kernel, (side.programs(plan) * splits,), plan,
        side.x, other.x, other.value, other.valid, part_out, part_lse, call.masks, call.lists_of(side, plan),
        side.dropout, floor, side.strides, other.strides, sizes, call.scale_log2, splits,
        **call.constants, SIDE=side.number, SPLIT=splits > 1, VALUE_DIM=other.value_dim,
        BLOCK_Q=plan.block_q, BLOCK_K=plan.block_k,
    )  # fmt: skip
    if splits > 1:
        rows = call.problems * sizes.q_len
        launch(
            merge_splits, (ceil_div(rows, MERGE.block_q),), MERGE,
            part_out, part_lse, out, lse, None, sizes, splits, sizes.q_len, rows,
            LAYOUT=call.layout, VALUE=True, DIM=one_tile(channels), BLOCK_Q=MERGE.block_q,
        )  # fmt: skip
    return out, lse
