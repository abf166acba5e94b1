"""Cross-attention's forward pass in Triton: online softmax over the key tiles that a tile of rows sees.

Few rows over many keys (decoding) leave most of a GPU idle; there the keys are split over programs, whose partial
results `merge_splits` puts together. Sources: Dao, "FlashAttention-2", 2023, algorithm 1; Dao et al., "Flash-Decoding",
2023.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.ops.attention.cross_attention.spec import Arguments
from mmkernels.ops.attention.philox import keep_scale
from mmkernels.ops.attention.triton.call import NO_LISTS, Call, in_units, key_strides, pieces, tma_descriptor, unit_of
from mmkernels.ops.attention.triton.tiles import (
    LOWEST,
    add_rows,
    has_non_finite,
    keep_pairs,
    key_tiles,
    list_start,
    load_keys,
    load_rows,
    load_spans,
    masked_scores,
    partial_tile,
    row_offsets,
    split_problem,
    split_rows,
    store_rows,
    taint,
    tanh,
    unknown_zero,
    zero_non_finite,
)
from mmkernels.ops.common.triton.constants import INFINITY, LN2
from mmkernels.ops.common.triton.launch import ceil_div
from mmkernels.runtime.triton import launch, multiprocessors
from mmkernels.runtime.tuning import Config, config

_MERGE = Config(16, 1, 4, 1)
OP = "cross_attention"
LISTED = 2**14  # scores of a head from which on a dense mask's tiles are listed first
_TMA_KEYS = 1024  # from which on a descriptor's 5 us on the host are little beside the kernel


@triton.jit
def attend_tile(
    top, total, acc0, acc1, bad, q0, q1, key, value, masks, mask_strides, key_strides, value_strides, seed,
    b, h, i, lo, hi, key_batch, key_head, first, k_len, scale, threshold,
    MASKED: tl.constexpr, HIDES: tl.constexpr, DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, UNIT: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Add one tile of keys to the largest score, the sum of exponentials and the weighted values of the rows.

    `bad` notes where a value that not every row sees is not finite.
    """
    k = load_keys(key, key_batch, key_head, first, key_strides, k_len, 0, D0, DIM, UNIT, BLOCK_K, not MASKED, TMA)
    scores = tl.dot(q0, tl.trans(k), input_precision=PRECISION)
    if D1 > 0:
        k = load_keys(
            key, key_batch, key_head, first, key_strides, k_len, D0, D1, DIM, UNIT, BLOCK_K, not MASKED, False
        )
        scores = tl.dot(q1, tl.trans(k), scores, input_precision=PRECISION)
    CAREFUL: tl.constexpr = MASKED and HIDES
    if MASKED:
        j = first + tl.arange(0, BLOCK_K)
        scores, _ = masked_scores(
            scores, masks, mask_strides, b[:, None], h[:, None], i[:, None], lo[:, None], hi[:, None], j[None, :], scale
        )
        new = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(new == -INFINITY, 0.0, new)
        weights = tl.exp2(scores - base[:, None])
    else:
        new = tl.maximum(top, tl.max(scores, 1) * scale)
        base = tl.where(new == -INFINITY, 0.0, new)
        weights = tl.exp2(scores * scale - base[:, None])
    shrink = tl.exp2(top - base)
    total = total * shrink + tl.sum(weights, 1)
    if value is not None:
        if seed is not None:
            weights = tl.where(keep_pairs(seed, threshold, b, h, i, first, BLOCK_K), weights, 0.0)
        v = load_keys(
            value, key_batch, key_head, first, value_strides, k_len, 0, V0, DV, UNIT, BLOCK_K, not MASKED, TMA
        )
        weights = weights.to(v.dtype)
        if CAREFUL:
            bad = tl.maximum(bad, has_non_finite(v))
            v = zero_non_finite(v)
        acc0 = tl.dot(weights, v, acc0 * shrink[:, None], input_precision=PRECISION)
        if V1 > 0:
            v = load_keys(
                value, key_batch, key_head, first, value_strides, k_len, V0, V1, DV, UNIT, BLOCK_K, not MASKED, False
            )
            if CAREFUL:
                bad = tl.maximum(bad, has_non_finite(v))
                v = zero_non_finite(v)
            acc1 = tl.dot(weights, v, acc1 * shrink[:, None], input_precision=PRECISION)
    return new, total, acc0, acc1, bad


@triton.jit
def finish_rows(top, total, acc, factor, PART: tl.constexpr):
    """What one accumulator says of its rows, and their log2-sum-exp: nothing seen 0 and -inf, only -inf seen NaN.

    PART: there is more to come, and what saw only -inf stays at LOWEST.
    """
    some = tl.where(total == 0, 1.0, total)
    out = acc * (factor / some)[:, None]
    lse = tl.where(total == 0, -INFINITY, top + tl.log2(some))
    if not PART:
        lowest = (top > -INFINITY) & (top <= LOWEST)
        out, lse = tl.where(lowest[:, None], float("nan"), out), tl.where(lowest, float("nan"), lse)
    return out, lse


@triton.jit
def gate_of(gate, h, live, stride):
    """tanh(gate) of each row's head; 1 without a gate."""
    factor = h * 0.0 + 1.0
    if gate is not None:
        factor = tanh(tl.load(gate + h * stride, mask=live, other=0.0).to(tl.float32))
    return factor


@triton.jit
def places_of(rows, problem, split, problems, b, h, i, sizes, GROUP: tl.constexpr, PACKED: tl.constexpr,
              SHARED: tl.constexpr, SPLIT: tl.constexpr):  # fmt: skip
    """Where each row's log-sum-exp and output stand, in units of themselves."""
    if SPLIT:
        count = sizes[3] * (GROUP if PACKED else 1) * (sizes[0] if SHARED else 1)
        lse_place = (split * problems + problem).to(tl.int64) * count + rows
        out_place = lse_place
    else:  # lse [B, Hq, Lq]; out in memory [B, Lq, Hq, Dv]
        lse_place = (b.to(tl.int64) * sizes[1] + h) * sizes[3] + i
        out_place = (b.to(tl.int64) * sizes[3] + i) * sizes[1] + h
    return lse_place, out_place


@triton.jit
def taint_rows(
    out, value, masks, mask_strides, value_strides, listed, first, full, full_end, partial_tiles,
    gate, gate_stride, split, problems, problem, tile, key_batch, key_head, sizes, readable,
    GROUP: tl.constexpr, PACKED: tl.constexpr, SHARED: tl.constexpr, UNIT: tl.constexpr, DV: tl.constexpr,
    V0: tl.constexpr, V1: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """Bring what is not finite in the values to the stored rows that see it, whose sums were made without it.

    Rare. It comes after everything else and computes its rows anew, so that the loops before it lose no registers.
    """
    rows = tile * BLOCK_Q + tl.arange(0, BLOCK_Q) + unknown_zero(readable)
    b, h, i, live = split_rows(rows, problem, sizes, GROUP, PACKED, SHARED)
    lo, hi = load_spans(masks, mask_strides, b, i, live, sizes[4])
    acc0 = tl.zeros([BLOCK_Q, V0], tl.float32)
    acc1 = tl.zeros([BLOCK_Q, V1 if V1 > 0 else 16], tl.float32)
    nothing = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    for n in tl.range(0, partial_tiles, num_stages=1):
        at = partial_tile(n, listed, first, full, full_end) * BLOCK_K
        j = at + tl.arange(0, BLOCK_K)
        _, visible = masked_scores(
            nothing, masks, mask_strides, b[:, None], h[:, None], i[:, None], lo[:, None], hi[:, None], j[None, :], 1.0
        )
        v = load_keys(value, key_batch, key_head, at, value_strides, sizes[4], 0, V0, DV, UNIT, BLOCK_K, False, TMA)
        acc0 = taint(acc0, v, visible)
        if V1 > 0:
            v = load_keys(
                value, key_batch, key_head, at, value_strides, sizes[4], V0, V1, DV, UNIT, BLOCK_K, False, False
            )
            acc1 = taint(acc1, v, visible)
    factor = 1.0 if SPLIT else gate_of(gate, h, live, gate_stride)[:, None]
    _, place = places_of(rows, problem, split, problems, b, h, i, sizes, GROUP, PACKED, SHARED, SPLIT)
    add_rows(out, place * DV, live, acc0 * factor, 1, 0, V0, DV)
    if V1 > 0:
        add_rows(out, place * DV, live, acc1 * factor, 1, V0, V1, DV)


@triton.jit
def forward_kernel(
    query, key, value, out, lse, masks, mask_strides, lists, list_strides, gate, gate_stride, seed,
    query_strides, key_strides, value_strides, sizes, scale, threshold, keep_scale, splits,
    GROUP: tl.constexpr, PACKED: tl.constexpr, SHARED: tl.constexpr, ALL_PARTIAL: tl.constexpr, NEGATE: tl.constexpr,
    PRECISION: tl.constexpr, UNIT: tl.constexpr, DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    HIDES: tl.constexpr, SPLIT: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """One tile of rows of one problem; with SPLIT one of `splits` parts of its keys.

    Grid: (row tiles x problems, splits). `out` and `lse` are the op's, or with SPLIT float32 [splits, problem, row, Dv]
    and [splits, problem, row] (base 2). Without a value (None) only the log-sum-exp.
    """
    row_tiles = tl.num_programs(0) // (sizes[2] if PACKED else sizes[1])
    if not SHARED:
        row_tiles = row_tiles // sizes[0]
    problem = tl.program_id(0) // row_tiles
    tile = tl.program_id(0) % row_tiles
    split = tl.program_id(1)
    rows = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    b, h, i, live = split_rows(rows, problem, sizes, GROUP, PACKED, SHARED)
    key_batch, _, key_head = split_problem(problem, sizes, GROUP, PACKED)
    k_len = sizes[4]
    offsets = row_offsets(b, h, i, query_strides, UNIT)
    q0 = load_rows(query, offsets, live, query_strides[3], 0, D0, DIM)
    q1 = q0
    if D1 > 0:
        q1 = load_rows(query, offsets, live, query_strides[3], D0, D1, DIM)
    if NEGATE:
        q0, q1 = -q0, -q1
    lo, hi = load_spans(masks, mask_strides, b, i, live, k_len)

    top = tl.full([BLOCK_Q], -INFINITY, tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    acc0 = tl.zeros([BLOCK_Q, V0], tl.float32)
    acc1 = tl.zeros([BLOCK_Q, V1 if V1 > 0 else 16], tl.float32)
    bad = tl.zeros([BLOCK_K], tl.int32)

    if lists[0] is None:
        first, end, full, full_end = key_tiles(lo, hi, live, k_len, split, splits, BLOCK_K, ALL_PARTIAL)
        partial_tiles, full_tiles = (full - first) + (end - full_end), full_end - full
        listed, length = None, 0
    else:
        length = tl.cdiv(k_len, BLOCK_K)
        listed, partial_tiles, full_tiles = list_start(lists, list_strides, problem, tile, length, sizes, GROUP, PACKED)
        first, full, full_end = 0, 0, 0
    for n in range(0, full_tiles):
        at = full + n if listed is None else tl.load(listed + length - 1 - n)
        top, total, acc0, acc1, bad = attend_tile(
            top, total, acc0, acc1, bad, q0, q1, key, value, masks, mask_strides, key_strides, value_strides, seed,
            b, h, i, lo, hi, key_batch, key_head, at * BLOCK_K, k_len, scale, threshold,
            False, HIDES, DIM, D0, D1, DV, V0, V1, BLOCK_K, PRECISION, UNIT, TMA,
        )  # fmt: skip
    if full_tiles > 0:  # every row has seen something, if only scores of -inf (or NaN, which makes its total NaN)
        lowest = (top == -INFINITY) & (total == 0)
        total = tl.where(lowest, 1.0, total)
        top = tl.where(lowest, LOWEST, top)
    for n in range(0, partial_tiles):
        at = partial_tile(n, listed, first, full, full_end)
        top, total, acc0, acc1, bad = attend_tile(
            top, total, acc0, acc1, bad, q0, q1, key, value, masks, mask_strides, key_strides, value_strides, seed,
            b, h, i, lo, hi, key_batch, key_head, at * BLOCK_K, k_len, scale, threshold,
            True, HIDES, DIM, D0, D1, DV, V0, V1, BLOCK_K, PRECISION, UNIT, TMA,
        )  # fmt: skip
    place, out_place = places_of(
        rows, problem, split, tl.num_programs(0) // row_tiles, b, h, i, sizes, GROUP, PACKED, SHARED, SPLIT
    )
    factor = tl.zeros([BLOCK_Q], tl.float32) + keep_scale
    if not SPLIT:
        factor = factor * gate_of(gate, h, live, gate_stride)
    done, log2 = finish_rows(top, total, acc0, factor, SPLIT)
    tl.store(lse + place, log2 if SPLIT else log2 * LN2, mask=live)
    if value is not None:
        store_rows(out, out_place * DV, live, done, 1, 0, V0, DV)
        if V1 > 0:
            done, _ = finish_rows(top, total, acc1, factor, SPLIT)
            store_rows(out, out_place * DV, live, done, 1, V0, V1, DV)
        if HIDES:
            if tl.max(bad, 0) > 0:  # rare, and so after the fact: its registers would be missed in the loops above
                taint_rows(
                    out, value, masks, mask_strides, value_strides, listed, first, full, full_end, partial_tiles,
                    gate, gate_stride, split, tl.num_programs(0) // row_tiles, problem, tile, key_batch,
                    key_head, sizes, query, GROUP, PACKED, SHARED, UNIT, DV, V0, V1, BLOCK_Q, BLOCK_K, SPLIT,
                    TMA,
                )  # fmt: skip


@triton.jit
def merge_splits(
    part_out, part_lse, out, lse, gate, gate_stride, sizes, splits, count, total_rows,
    GROUP: tl.constexpr, PACKED: tl.constexpr, SHARED: tl.constexpr,
    DV: tl.constexpr, VALUE: tl.constexpr, WIDTH: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """Put the results for the parts of the keys together. Grid: (tiles of all problems' rows,)."""
    rows = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    live = rows < total_rows
    b, h, i, _ = split_rows(rows % count, rows // count, sizes, GROUP, PACKED, SHARED)
    top = tl.full([BLOCK_Q], -INFINITY, tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, WIDTH], tl.float32)
    for split in range(0, splits):
        place = (tl.zeros([BLOCK_Q], tl.int64) + split) * total_rows + rows
        part = tl.load(part_lse + place, mask=live, other=-INFINITY)
        new = tl.maximum(top, part)
        base = tl.where(new == -INFINITY, 0.0, new)
        shrink, weight = tl.exp2(top - base), tl.exp2(part - base)
        total = total * shrink + weight
        if VALUE:
            x = load_rows(part_out, place * DV, live, 1, 0, WIDTH, DV)
            acc = acc * shrink[:, None] + x * weight[:, None]
        top = new
    done, log2 = finish_rows(top, total, acc, gate_of(gate, h, live, gate_stride), False)
    tl.store(lse + (b.to(tl.int64) * sizes[1] + h) * sizes[3] + i, log2 * LN2, mask=live)
    if VALUE:
        store_rows(out, ((b.to(tl.int64) * sizes[3] + i) * sizes[1] + h) * DV, live, done, 1, 0, WIDTH, DV)


def forward(args: Arguments) -> tuple[Tensor, Tensor]:
    """Returns out [B, Hq, Lq, Dv] and the log-sum-exp [B, Hq, Lq]."""
    call = Call(args)
    out = args.query.new_empty(call.batch, call.q_len, call.heads, args.value.shape[3]).transpose(1, 2)
    return out, attend(call, args.value, out, args.gate, args.seed, args.dropout_p)


def log_sum_exp(call: Call) -> Tensor:
    """[B, Hq, Lq], without values."""
    return attend(call, None, None, None, None, 0.0)


def attend(
    call: Call, value: Tensor | None, out: Tensor | None, gate: Tensor | None, seed: Tensor | None, dropout_p: float
) -> Tensor:
    """Write `out` and answer the log-sum-exp."""
    query, key = call.query, call.key
    lse = query.new_empty(call.batch, call.heads, call.q_len, dtype=torch.float32)
    dv = 16 if value is None else value.shape[3]
    plan = config(OP, "forward", query.device, query.dtype, max(call.dim, dv))
    splits = 1
    if call.rows <= plan.block_q // 2:
        plan = config(OP, "decode", query.device, query.dtype, max(call.dim, dv))
        splits = count_splits(call, plan)
    listed = splits == 1 and call.masks[3] is not None and call.rows * call.k_len >= LISTED
    lists, list_strides = call.lists(plan, of_rows=True) if listed else NO_LISTS
    v0, v1 = pieces(dv)
    key_source, value_source = tma_sources(call, value, plan)
    part_out, part_lse = out, lse
    if splits > 1:
        part_lse = lse.new_empty(splits, call.problems, call.rows)
        part_out = None if value is None else lse.new_empty(splits, call.problems, call.rows, dv)
    unit = unit_of(query, key, *(() if value is None else (value,)))
    gate_stride = 0 if gate is None or gate.numel() == 1 else gate.stride(0)
    kept = 1.0 if seed is None else keep_scale(dropout_p)
    launch(
        forward_kernel, (call.row_tiles(plan) * call.problems, splits), plan,
        query, key_source, value_source, part_out, part_lse, call.masks, call.mask_strides, lists, list_strides,
        gate, gate_stride, seed, in_units(query.stride(), unit), in_units(call.key_strides, unit),
        (0, 0, 0, 0) if value is None else in_units(key_strides(value), unit), call.sizes, call.scale_log2,
        threshold(dropout_p), kept, splits,
        **call.constants, UNIT=unit, HIDES=call.hides, DV=dv, V0=v0, V1=v1, BLOCK_Q=plan.block_q,
        BLOCK_K=plan.block_k, SPLIT=splits > 1, TMA=key_source is not key,
    )  # fmt: skip
    if splits > 1:
        rows = call.problems * call.rows
        launch(
            merge_splits, (ceil_div(rows, _MERGE.block_q),), _MERGE,
            part_out, part_lse, out, lse, gate, gate_stride, call.sizes, splits, call.rows, rows,
            GROUP=call.group, PACKED=call.packed, SHARED=call.shared,
            DV=dv, VALUE=value is not None, WIDTH=max(16, triton.next_power_of_2(dv)), BLOCK_Q=_MERGE.block_q,
        )  # fmt: skip
    return lse


def count_splits(call: Call, plan: Config) -> int:
    """Into how many parts the keys are cut, so that about four programs go to each multiprocessor; 1: not at all."""
    programs = call.problems * call.row_tiles(plan)
    wanted = ceil_div(4 * multiprocessors(call.query.device), max(1, programs))
    # A part of fewer than two tiles costs more to merge than it saves.
    return max(1, min(wanted, call.key_tiles(plan) // 2))


def tma_sources(call: Call, value: Tensor | None, plan: Config) -> tuple[object, object]:
    """Key and value as tensor descriptors where the copy engine can fetch both, else themselves."""
    if call.k_len < _TMA_KEYS or call.rows <= plan.block_q or value is None:
        return call.key, value
    sources = tma_descriptor(call.key, plan.block_k), tma_descriptor(value, plan.block_k)
    return (call.key, value) if None in sources else sources


def threshold(dropout_p: float) -> int:
    """Words of Philox below it are dropped; all of them at 2^32."""
    return round(dropout_p * 2**32)
