"""Online softmax over the key tiles that a tile of rows sees: log-sum-exps, and with values the attention's output.

Few rows over many keys (decoding) leave most of a GPU idle. There the keys are split over programs, whose partial
results `merge_splits` puts together. Sources: Dao, "FlashAttention-2", 2023, algorithm 1; Dao et al., "Flash-Decoding",
2023.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.ops.attention.plans import MOST_CHANNELS
from mmkernels.ops.attention.triton.arguments import NO_STRIDES, Halves, Rows, State, Strides
from mmkernels.ops.attention.triton.call import (
    Call,
    dropout_of,
    gate_of,
    head_dim,
    one_tile,
    strides_of,
    tma_sources,
    unit_of,
)
from mmkernels.ops.attention.triton.scores import (
    LOWEST,
    finite_or_zero,
    keep_pairs,
    load_gate,
    load_spans,
    masked_scores,
    opaque_zero,
    restore_non_finite,
    rows_non_finite,
)
from mmkernels.ops.attention.triton.tiles import (
    add_halves,
    dot_keys,
    load_halves,
    load_key_halves,
    load_keys,
    load_rows,
    output_places,
    problem_at,
    problem_count,
    program_of_rows,
    row_count,
    row_offsets,
    row_places,
    rows_at,
    scale_halves,
    store_halves,
    zero_halves,
    zero_tile,
)
from mmkernels.ops.attention.triton.walks import full_tile, partial_tile, walk_over_keys
from mmkernels.ops.common.triton.constants import INFINITY, LN2
from mmkernels.ops.common.triton.launch import ceil_div
from mmkernels.runtime.triton import launch, multiprocessors
from mmkernels.runtime.tuning import Config, config

OP = "cross_attention"
MERGE = Config(16, 1, 4, 1)


class ForwardStrides(NamedTuple):
    query: Strides
    key: Strides
    value: Strides


@triton.jit
def attend_tile(
    state, acc, non_finite, q, key, value, masks, dropout, strides, rows, spans, problem, first, k_len, scale,
    MASKED: tl.constexpr, HIDES: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, UNIT: tl.constexpr, TMA: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """Adds one tile of keys to the `State` and the weighted values of the rows.

    `non_finite` notes where a value that not every row sees is not finite. SHARED: values are the first half of keys.
    """
    scores, keys = dot_keys(q, key, problem, first, strides.key, k_len, DIM, UNIT, BLOCK_K, not MASKED, TMA, PRECISION)
    if MASKED:
        scores, _ = masked_scores(scores, masks, rows, spans, first + tl.arange(0, BLOCK_K), scale, 0)
    state, weights, shrink = add_scores(state, scores, scale, not MASKED)
    if value is not None:
        if dropout is not None:
            weights = tl.where(keep_pairs(dropout, rows, first, BLOCK_K), weights, 0.0)
        if SHARED:
            out, non_finite = add_loaded(acc.first, non_finite, weights, shrink, keys.first, MASKED, HIDES, PRECISION)
            acc = Halves(out, acc.second)
        else:
            acc, non_finite = add_both_values(
                acc, non_finite, weights, shrink, value, problem, first, strides.value, k_len,
                MASKED, HIDES, VALUE_DIM, BLOCK_K, PRECISION, UNIT, TMA,
            )  # fmt: skip
    return state, acc, non_finite


@triton.jit
def add_scores(state, scores, scale, SCALE: tl.constexpr):
    """Adds a tile of scores, times `scale` if SCALE; returns the `State`, the weights, what shrinks the rest."""
    if SCALE:
        top = tl.maximum(state.top, tl.max(scores, 1) * scale)
        base = tl.where(top == -INFINITY, 0.0, top)
        weights = tl.exp2(scores * scale - base[:, None])
    else:
        top = tl.maximum(state.top, tl.max(scores, 1))
        base = tl.where(top == -INFINITY, 0.0, top)
        weights = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(state.top - base)
    state = State(top, state.total * shrink + tl.sum(weights, 1))
    return state, weights, shrink


@triton.jit
def lowest_if_nothing(state):
    """Returns the `State` of rows that have a visible key each, if only with a score of -inf (or NaN: so the total)."""
    lowest = (state.top == -INFINITY) & (state.total == 0)
    state = State(tl.where(lowest, LOWEST, state.top), tl.where(lowest, 1.0, state.total))
    return state


@triton.jit
def add_both_values(
    acc, non_finite, weights, shrink, value, problem, first, strides, k_len,
    MASKED: tl.constexpr, HIDES: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    UNIT: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Returns the halves acc times `shrink` plus the weighted values; see `attend_tile`."""
    out, non_finite = add_values(
        acc.first, non_finite, weights, shrink, value, problem, first, strides, k_len,
        0, VALUE_DIM.first, VALUE_DIM.size, MASKED, HIDES, BLOCK_K, PRECISION, UNIT, TMA,
    )  # fmt: skip
    second = acc.second
    if VALUE_DIM.second > 0:
        second, non_finite = add_values(
            second, non_finite, weights, shrink, value, problem, first, strides, k_len,
            VALUE_DIM.first, VALUE_DIM.second, VALUE_DIM.size, MASKED, HIDES, BLOCK_K, PRECISION, UNIT, False,
        )  # fmt: skip
    acc = Halves(out, second)
    return acc, non_finite


@triton.jit
def add_values(
    acc, non_finite, weights, shrink, value, problem, first, strides, k_len,
    FROM: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr, MASKED: tl.constexpr, HIDES: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Returns acc, of WIDTH channels, times `shrink` plus the weighted values; see `attend_tile`."""
    v = load_keys(value, problem, first, strides, k_len, FROM, WIDTH, SIZE, UNIT, BLOCK_K, not MASKED, TMA)
    return add_loaded(acc, non_finite, weights, shrink, v, MASKED, HIDES, PRECISION)


@triton.jit
def add_loaded(
    acc, non_finite, weights, shrink, v, MASKED: tl.constexpr, HIDES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Returns acc times `shrink` plus the weighted values v [BLOCK_K, WIDTH]; see `attend_tile`."""
    weights = weights.to(v.dtype)  # before the check below, which takes registers
    if MASKED and HIDES:
        non_finite = tl.maximum(non_finite, rows_non_finite(v))
        v = finite_or_zero(v)
    return tl.dot(weights, v, acc * shrink[:, None], input_precision=PRECISION), non_finite


@triton.jit
def finish_rows(state, acc, factor, DIM: tl.constexpr, PART: tl.constexpr):
    """Returns the output and the log2-sum-exp of rows: 0 and -inf for one that saw nothing, NaN where only -inf.

    PART: other keys follow, so that the state of a row that saw only -inf stays at LOWEST.
    """
    some = tl.where(state.total == 0, 1.0, state.total)
    out = scale_halves(acc, (factor / some)[:, None], DIM)
    lse = tl.where(state.total == 0, -INFINITY, state.top + tl.log2(some))
    if not PART:
        lowest = (state.top > -INFINITY) & (state.top <= LOWEST)
        first, second = tl.where(lowest[:, None], float("nan"), out.first), out.second
        if DIM.second > 0:
            second = tl.where(lowest[:, None], float("nan"), second)
        out, lse = Halves(first, second), tl.where(lowest, float("nan"), lse)
    return out, lse


@triton.jit
def places_of(n, split, problem, rows, sizes, LAYOUT: tl.constexpr, SPLIT: tl.constexpr):
    """Returns where each row's log-sum-exp and output stand, counted in rows."""
    if SPLIT:
        places = (split * problem_count(sizes, LAYOUT) + problem.number).to(tl.int64) * row_count(sizes, LAYOUT) + n
        out_places = places
    else:
        places, out_places = row_places(rows, sizes), output_places(rows, sizes)
    return places, out_places


@triton.jit
def restore_rows(
    out, query, value, masks, lists, gate, strides, walk, split, problem, tile, sizes,
    LAYOUT: tl.constexpr, VALUE_DIM: tl.constexpr, UNIT: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Adds what is not finite in the values to the stored rows that see it; see scores.py."""
    n = tile * BLOCK_Q + tl.arange(0, BLOCK_Q) + opaque_zero(query)
    rows = rows_at(n, problem, sizes, LAYOUT)
    spans = load_spans(masks, rows, sizes.k_len)
    acc = zero_halves(BLOCK_Q, VALUE_DIM)
    for m in tl.range(0, walk.partial, num_stages=1):
        first = partial_tile(walk, lists, m) * BLOCK_K
        j = first + tl.arange(0, BLOCK_K)
        _, visible = masked_scores(zero_tile(BLOCK_Q, BLOCK_K), masks, rows, spans, j, 1.0, 0)
        v = load_key_halves(value, problem, first, strides, sizes.k_len, VALUE_DIM, UNIT, BLOCK_K, False, TMA)
        acc = restore_non_finite(acc, v, visible, VALUE_DIM)
    if not SPLIT:
        acc = scale_halves(acc, load_gate(gate, rows)[:, None], VALUE_DIM)
    _, places = places_of(n, split, problem, rows, sizes, LAYOUT, SPLIT)
    add_halves(out, places * VALUE_DIM.size, rows.live, acc, 1, VALUE_DIM)


@triton.jit
def forward_kernel(
    query, key, value, out, lse, masks, lists, gate, dropout, strides, sizes, scale, splits,
    LAYOUT: tl.constexpr, ALL_PARTIAL: tl.constexpr, HIDES: tl.constexpr, NEGATE: tl.constexpr, DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr,
    SPLIT: tl.constexpr, TMA: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """Computes one tile of rows of one problem; with SPLIT over one of `splits` parts of its keys.

    Grid: (row tiles x problems, splits). `out` and `lse` are the op's, or with SPLIT float32 [splits, problem, row, Dv]
    and [splits, problem, row] (base 2). Without a value (None) only the log-sum-exp. SHARED: see `attend_tile`.
    """
    number, tile = program_of_rows(sizes, LAYOUT)
    split = tl.program_id(1)
    n = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    problem = problem_at(number, sizes, LAYOUT)
    rows = rows_at(n, problem, sizes, LAYOUT)
    q = load_halves(query, row_offsets(rows, strides.query, UNIT), rows.live, strides.query.column, DIM)
    if NEGATE:
        q = Halves(-q.first, -q.second)
    spans = load_spans(masks, rows, sizes.k_len)

    state = State(tl.full([BLOCK_Q], -INFINITY, tl.float32), tl.zeros([BLOCK_Q], tl.float32))
    acc = zero_halves(BLOCK_Q, VALUE_DIM)
    non_finite = tl.zeros([BLOCK_K], tl.int32)
    walk = walk_over_keys(
        lists, spans, rows.live, problem, tile, sizes.k_len, split, splits, BLOCK_K, ALL_PARTIAL
    )  # fmt: skip
    for MASKED in tl.static_range(2):
        for m in range(0, walk.partial if MASKED else walk.full):
            key_tile = partial_tile(walk, lists, m) if MASKED else full_tile(walk, lists, m)
            state, acc, non_finite = attend_tile(
                state, acc, non_finite, q, key, value, masks, dropout, strides, rows, spans, problem,
                key_tile * BLOCK_K, sizes.k_len, scale,
                MASKED, HIDES, DIM, VALUE_DIM, BLOCK_K, PRECISION, UNIT, TMA, SHARED,
            )  # fmt: skip
        if not MASKED:
            if walk.full > 0:
                state = lowest_if_nothing(state)

    places, out_places = places_of(n, split, problem, rows, sizes, LAYOUT, SPLIT)
    factor = tl.full([BLOCK_Q], 1.0, tl.float32)
    if dropout is not None:
        factor = factor * dropout.scale
    if not SPLIT:
        factor = factor * load_gate(gate, rows)
    done, log2 = finish_rows(state, acc, factor, VALUE_DIM, SPLIT)
    tl.store(lse + places, log2 if SPLIT else log2 * LN2, mask=rows.live)
    if value is not None:
        store_halves(out, out_places * VALUE_DIM.size, rows.live, done, 1, VALUE_DIM)
        if HIDES:
            # Rare. The rows are corrected last, so that the loops need no registers for it.
            if tl.max(non_finite, 0) > 0:
                restore_rows(
                    out, query, value, masks, lists, gate, strides.value, walk, split, problem, tile, sizes,
                    LAYOUT, VALUE_DIM, UNIT, BLOCK_Q, BLOCK_K, SPLIT, TMA,
                )  # fmt: skip


@triton.jit
def merge_splits(
    part_out, part_lse, out, lse, gate, sizes, splits, count, total_rows,
    LAYOUT: tl.constexpr, VALUE: tl.constexpr, DIM: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """Merges the results of `splits` parts of the keys. DIM: one tile. Grid: (tiles of all problems' rows,)."""
    n = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    live = n < total_rows
    rows = rows_at(n % count, problem_at(n // count, sizes, LAYOUT), sizes, LAYOUT)
    rows = Rows(rows.batch, rows.head, rows.query, live)
    state = State(tl.full([BLOCK_Q], -INFINITY, tl.float32), tl.zeros([BLOCK_Q], tl.float32))
    acc = zero_halves(BLOCK_Q, DIM)
    for split in range(0, splits):
        places = (tl.zeros([BLOCK_Q], tl.int64) + split) * total_rows + n
        part = tl.load(part_lse + places, mask=live, other=-INFINITY)
        top = tl.maximum(state.top, part)
        base = tl.where(top == -INFINITY, 0.0, top)
        shrink, weight = tl.exp2(state.top - base), tl.exp2(part - base)
        state = State(top, state.total * shrink + weight)
        if VALUE:
            x = load_rows(part_out, places * DIM.size, live, 1, 0, DIM.first, DIM.size)
            acc = Halves(acc.first * shrink[:, None] + x * weight[:, None], acc.second)
    done, log2 = finish_rows(state, acc, load_gate(gate, rows), DIM, False)
    tl.store(lse + row_places(rows, sizes), log2 * LN2, mask=live)
    if VALUE:
        store_halves(out, output_places(rows, sizes) * DIM.size, live, done, 1, DIM)


def log_sum_exp(call: Call) -> Tensor:
    """Returns the log-sum-exp [B, Hq, Lq], without values."""
    return attend(call, None, None, None, None, 0.0)


def attend(
    call: Call, value: Tensor | None, out: Tensor | None, gate: Tensor | None, seed: Tensor | None, dropout_p: float
) -> Tensor:
    """Writes `out` and returns the log-sum-exp [B, Hq, Lq]."""
    query, key = call.query, call.key
    lse = query.new_empty(call.batch, call.heads, call.q_len, dtype=torch.float32)
    value_dim = head_dim(16 if value is None else value.shape[3])
    widest = max(call.dim.size, value_dim.size)
    plan = config(OP, "forward", query.device, query.dtype, widest)
    splits = 1
    if widest > MOST_CHANNELS or call.rows <= plan.block_q // 2:
        kernel = "decode" if widest <= MOST_CHANNELS else "latent"
        plan = config(OP, kernel, query.device, query.dtype, widest)
        splits = count_splits(call, plan)
    key_source, value_source = tma_sources(call, value, plan)
    part_out, part_lse = out, lse
    if splits > 1:
        part_lse = lse.new_empty(splits, call.problems, call.rows)
        part_out = None if value is None else lse.new_empty(splits, call.problems, call.rows, value_dim.size)
    unit = unit_of(query, key, *(() if value is None else (value,)))
    gates = gate_of(gate)
    launch(
        forward_kernel, (call.row_tiles(plan) * call.problems, splits), plan,
        query, key_source, value_source, part_out, part_lse, call.masks,
        call.lists(plan, of_rows=True) if splits == 1 else None, gates, dropout_of(seed, dropout_p),
        ForwardStrides(
            strides_of(query, unit), strides_of(key, unit), NO_STRIDES if value is None else strides_of(value, unit)
        ), call.sizes, call.scale_log2, splits,
        **call.constants, HIDES=call.hides, VALUE_DIM=value_dim, BLOCK_Q=plan.block_q, BLOCK_K=plan.block_k, UNIT=unit,
        SPLIT=splits > 1, TMA=key_source is not key, SHARED=widest > MOST_CHANNELS and value_is_key(call, value),
    )  # fmt: skip
    if splits > 1:
        rows = call.problems * call.rows
        launch(
            merge_splits, (ceil_div(rows, MERGE.block_q),), MERGE,
            part_out, part_lse, out, lse, gates, call.sizes, splits, call.rows, rows,
            LAYOUT=call.layout, VALUE=value is not None, DIM=one_tile(value_dim.size), BLOCK_Q=MERGE.block_q,
        )  # fmt: skip
    return lse


def value_is_key(call: Call, value: Tensor | None) -> bool:
    """Returns whether values are the first tile of the keys' channels in place, so that a tile is read for both."""
    return value is not None and (
        value.shape[3] == call.dim.first
        and value.data_ptr() == call.key.data_ptr()
        and strides_of(value) == strides_of(call.key)
    )


def count_splits(call: Call, plan: Config) -> int:
    """Returns into how many parts to split the keys: about four programs for each multiprocessor; 1 is no split."""
    programs = call.problems * call.row_tiles(plan)
    wanted = ceil_div(4 * multiprocessors(call.query.device), max(1, programs))
    # A part of fewer than two tiles costs more to merge than it saves.
    return max(1, min(wanted, call.key_tiles(plan) // 2))
