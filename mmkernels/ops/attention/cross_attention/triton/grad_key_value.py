"""The gradients of cross-attention's key and value, by tiles of keys."""

from __future__ import annotations

import triton
import triton.language as tl

from mmkernels.ops.attention.cross_attention.triton.forward import gate_of
from mmkernels.ops.attention.triton.tiles import (
    add_rows,
    has_non_finite,
    keep_pairs,
    list_start,
    load_keys,
    load_lse,
    load_rows,
    load_spans,
    masked_scores,
    row_offsets,
    split_problem,
    split_rows,
    store_rows,
    taint,
    unknown_zero,
    zero_non_finite,
)
from mmkernels.ops.common.triton.constants import INFINITY


@triton.jit
def key_value_tile(
    dk0, dk1, dv0, dv1, bad, k0, k1, v0, v1, query, grad_out, lse, delta, masks, mask_strides, gate, gate_stride, seed,
    query_strides, grad_out_strides, problem, first_row, first_key, sizes, scale, threshold, kept,
    MASKED: tl.constexpr, GROUP: tl.constexpr, PACKED: tl.constexpr, SHARED: tl.constexpr, NEGATE: tl.constexpr,
    PRECISION: tl.constexpr, UNIT: tl.constexpr, DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    DV: tl.constexpr, V0: tl.constexpr,
    V1: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, NEED_K: tl.constexpr, NEED_V: tl.constexpr,
):  # fmt: skip
    """Add one tile of rows to the gradients of the keys and values; scores are [keys, rows] here.

    Rows past the last are 0 in query and gradient, and add nothing.
    """
    rows = first_row + tl.arange(0, BLOCK_Q)
    b, h, i, live = split_rows(rows, problem, sizes, GROUP, PACKED, SHARED)
    place = (b.to(tl.int64) * sizes[1] + h) * sizes[3] + i
    offsets = row_offsets(b, h, i, query_strides, UNIT)
    q0 = load_rows(query, offsets, live, query_strides[3], 0, D0, DIM)
    if NEGATE:
        q0 = -q0
    if MASKED:  # the log-sum-exp of a row that is not finite is NaN, and says so to all that it sees
        q0 = zero_non_finite(q0)
    dots = tl.dot(k0, tl.trans(q0), input_precision=PRECISION)
    q1 = q0
    if D1 > 0:
        q1 = load_rows(query, offsets, live, query_strides[3], D0, D1, DIM)
        if NEGATE:
            q1 = -q1
        if MASKED:
            q1 = zero_non_finite(q1)
        dots = tl.dot(k1, tl.trans(q1), dots, input_precision=PRECISION)
    row_lse = load_lse(lse, place, live)
    if MASKED:
        j = first_key + tl.arange(0, BLOCK_K)
        lo, hi = load_spans(masks, mask_strides, b, i, live, sizes[4])
        scores, _ = masked_scores(
            dots, masks, mask_strides, b[None, :], h[None, :], i[None, :], lo[None, :], hi[None, :], j[:, None], scale
        )
        weights = tl.where(scores == -INFINITY, 0.0, tl.exp2(scores - row_lse[None, :]))
    else:
        weights = tl.exp2(dots * scale - row_lse[None, :])
    offsets = row_offsets(b, h, i, grad_out_strides, UNIT)
    do0 = load_rows(grad_out, offsets, live, grad_out_strides[3], 0, V0, DV)
    do1 = do0
    if V1 > 0:
        do1 = load_rows(grad_out, offsets, live, grad_out_strides[3], V0, V1, DV)
    if MASKED:  # as does delta; the values get it from `taint_values`
        bad = tl.maximum(bad, has_non_finite(do0))
        do0 = zero_non_finite(do0)
        if V1 > 0:
            bad = tl.maximum(bad, has_non_finite(do1))
            do1 = zero_non_finite(do1)
    if gate is not None:
        factor = gate_of(gate, h, live, gate_stride)
        do0 = (do0.to(tl.float32) * factor[:, None]).to(do0.dtype)
        do1 = do0 if V1 == 0 else (do1.to(tl.float32) * factor[:, None]).to(do1.dtype)
    if seed is not None:
        keep = tl.trans(keep_pairs(seed, threshold, b, h, i, first_key, BLOCK_K))
    if NEED_V:
        dropped = weights
        if seed is not None:
            dropped = tl.where(keep, weights * kept, 0.0)
        dropped = dropped.to(do0.dtype)
        dv0 = tl.dot(dropped, do0, dv0, input_precision=PRECISION)
        if V1 > 0:
            dv1 = tl.dot(dropped, do1, dv1, input_precision=PRECISION)
    if NEED_K:
        grad = tl.dot(v0, tl.trans(do0), input_precision=PRECISION)
        if V1 > 0:
            grad = tl.dot(v1, tl.trans(do1), grad, input_precision=PRECISION)
        if seed is not None:
            grad = tl.where(keep, grad * kept, 0.0)
        grad = weights * (grad - tl.load(delta + place, mask=live, other=0.0)[None, :])
        if MASKED:
            grad = tl.where(weights == 0, 0.0, grad)  # a hidden key's may be NaN
        grad = grad.to(q0.dtype)
        dk0 = tl.dot(grad, q0, dk0, input_precision=PRECISION)
        if D1 > 0:
            dk1 = tl.dot(grad, q1, dk1, input_precision=PRECISION)
    return dk0, dk1, dv0, dv1, bad


@triton.jit
def taint_values(
    grad_value, grad_value_strides, grad_out, masks, mask_strides, grad_out_strides, listed, split, partial_tiles,
    share, problem, key_batch, key_head, tile, sizes, readable,
    GROUP: tl.constexpr, PACKED: tl.constexpr, SHARED: tl.constexpr, UNIT: tl.constexpr, DV: tl.constexpr,
    V0: tl.constexpr, V1: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Bring what is not finite in the output's gradient to the stored rows of the value's; see `taint_rows`."""
    j = tile * BLOCK_K + tl.arange(0, BLOCK_K) + unknown_zero(readable)
    dv0 = tl.zeros([BLOCK_K, V0], tl.float32)
    dv1 = tl.zeros([BLOCK_K, V1 if V1 > 0 else 16], tl.float32)
    nothing = tl.zeros([BLOCK_K, BLOCK_Q], tl.float32)
    for n in tl.range(split * share, tl.minimum((split + 1) * share, partial_tiles), num_stages=1):
        at = n if listed is None else tl.load(listed + n)
        rows = at * BLOCK_Q + tl.arange(0, BLOCK_Q)
        b, h, i, live = split_rows(rows, problem, sizes, GROUP, PACKED, SHARED)
        lo, hi = load_spans(masks, mask_strides, b, i, live, sizes[4])
        _, visible = masked_scores(
            nothing, masks, mask_strides, b[None, :], h[None, :], i[None, :], lo[None, :], hi[None, :], j[:, None], 1.0
        )
        offsets = row_offsets(b, h, i, grad_out_strides, UNIT)
        dv0 = taint(dv0, load_rows(grad_out, offsets, live, grad_out_strides[3], 0, V0, DV), visible)
        if V1 > 0:
            dv1 = taint(dv1, load_rows(grad_out, offsets, live, grad_out_strides[3], V0, V1, DV), visible)
    offsets = key_offsets(split, key_batch, key_head, j, grad_value_strides)
    add_rows(grad_value, offsets, j < sizes[4], dv0, grad_value_strides[4], 0, V0, DV)
    if V1 > 0:
        add_rows(grad_value, offsets, j < sizes[4], dv1, grad_value_strides[4], V0, V1, DV)


@triton.jit
def key_offsets(split, key_batch, key_head, j, strides):
    """Where keys begin in a gradient of strides (split, batch, head, key, channel)."""
    rows = row_offsets(key_batch + j * 0, key_head + j * 0, j, (strides[1], strides[2], strides[3]))
    return split.to(tl.int64) * strides[0] + rows


@triton.jit
def grad_key_value_kernel(
    query, key, value, grad_out, lse, delta, grad_key, grad_value, masks, mask_strides, lists, list_strides,
    gate, gate_stride, seed, query_strides, key_strides, value_strides, grad_out_strides, grad_key_strides,
    grad_value_strides, sizes, scale, abs_scale, threshold, kept, splits,
    GROUP: tl.constexpr, PACKED: tl.constexpr, SHARED: tl.constexpr, ALL_PARTIAL: tl.constexpr, NEGATE: tl.constexpr,
    PRECISION: tl.constexpr, UNIT: tl.constexpr, DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    HIDES: tl.constexpr,
):  # fmt: skip
    """The gradients of one tile of keys and values from one of `splits` parts of the rows.

    Grid: (key tiles x problems, splits). The gradients have strides (split, batch, head, key, channel).
    """
    k_len = sizes[4]
    key_tiles_ = tl.cdiv(k_len, BLOCK_K)
    problem, tile = tl.program_id(0) // key_tiles_, tl.program_id(0) % key_tiles_
    split = tl.program_id(1)
    key_batch, _, key_head = split_problem(problem, sizes, GROUP, PACKED)
    first_key = tile * BLOCK_K
    k0 = load_keys(key, key_batch, key_head, first_key, key_strides, k_len, 0, D0, DIM, UNIT, BLOCK_K, False, False)
    v0 = load_keys(value, key_batch, key_head, first_key, value_strides, k_len, 0, V0, DV, UNIT, BLOCK_K, False, False)
    k1, v1 = k0, v0
    if D1 > 0:
        k1 = load_keys(
            key, key_batch, key_head, first_key, key_strides, k_len, D0, D1, DIM, UNIT, BLOCK_K, False, False
        )
    if V1 > 0:
        v1 = load_keys(
            value, key_batch, key_head, first_key, value_strides, k_len, V0, V1, DV, UNIT, BLOCK_K, False, False
        )
    dk0 = tl.zeros([BLOCK_K, D0], tl.float32)
    dk1 = tl.zeros([BLOCK_K, D1 if D1 > 0 else 16], tl.float32)
    dv0 = tl.zeros([BLOCK_K, V0], tl.float32)
    dv1 = tl.zeros([BLOCK_K, V1 if V1 > 0 else 16], tl.float32)
    bad = tl.zeros([BLOCK_Q], tl.int32)

    count = sizes[3] * (GROUP if PACKED else 1) * (sizes[0] if SHARED else 1)
    row_tiles = tl.cdiv(count, BLOCK_Q)
    if lists[0] is None:
        listed, full_tiles, partial_tiles = None, row_tiles, 0
        if ALL_PARTIAL or masks[0] is not None:
            full_tiles, partial_tiles = 0, row_tiles
    else:
        listed, partial_tiles, full_tiles = list_start(
            lists, list_strides, problem, tile, row_tiles, sizes, GROUP, PACKED
        )
    share = tl.cdiv(full_tiles, splits)
    for n in range(split * share, tl.minimum((split + 1) * share, full_tiles)):
        at = n if listed is None else tl.load(listed + row_tiles - 1 - n)
        dk0, dk1, dv0, dv1, bad = key_value_tile(
            dk0, dk1, dv0, dv1, bad, k0, k1, v0, v1, query, grad_out, lse, delta, masks, mask_strides, gate,
            gate_stride, seed, query_strides, grad_out_strides, problem, at * BLOCK_Q, first_key, sizes, scale,
            threshold, kept, False, GROUP, PACKED, SHARED, NEGATE, PRECISION, UNIT, DIM, D0, D1, DV, V0, V1, BLOCK_Q,
            BLOCK_K,
            grad_key is not None, grad_value is not None,
        )  # fmt: skip
    share = tl.cdiv(partial_tiles, splits)
    for n in range(split * share, tl.minimum((split + 1) * share, partial_tiles)):
        at = n if listed is None else tl.load(listed + n)
        dk0, dk1, dv0, dv1, bad = key_value_tile(
            dk0, dk1, dv0, dv1, bad, k0, k1, v0, v1, query, grad_out, lse, delta, masks, mask_strides, gate,
            gate_stride, seed, query_strides, grad_out_strides, problem, at * BLOCK_Q, first_key, sizes, scale,
            threshold, kept, True, GROUP, PACKED, SHARED, NEGATE, PRECISION, UNIT, DIM, D0, D1, DV, V0, V1, BLOCK_Q,
            BLOCK_K,
            grad_key is not None, grad_value is not None,
        )  # fmt: skip
    j = first_key + tl.arange(0, BLOCK_K)
    live = j < k_len
    if grad_key is not None:
        offsets = key_offsets(split, key_batch, key_head, j, grad_key_strides)
        store_rows(grad_key, offsets, live, dk0 * abs_scale, grad_key_strides[4], 0, D0, DIM)
        if D1 > 0:
            store_rows(grad_key, offsets, live, dk1 * abs_scale, grad_key_strides[4], D0, D1, DIM)
    if grad_value is not None:
        offsets = key_offsets(split, key_batch, key_head, j, grad_value_strides)
        store_rows(grad_value, offsets, live, dv0, grad_value_strides[4], 0, V0, DV)
        if V1 > 0:
            store_rows(grad_value, offsets, live, dv1, grad_value_strides[4], V0, V1, DV)
        if HIDES:
            if tl.max(bad, 0) > 0:
                taint_values(
                    grad_value, grad_value_strides, grad_out, masks, mask_strides, grad_out_strides, listed, split,
                    partial_tiles, share, problem, key_batch, key_head, tile, sizes, query,
                    GROUP, PACKED, SHARED, UNIT, DV, V0, V1, BLOCK_Q, BLOCK_K,
                )  # fmt: skip
