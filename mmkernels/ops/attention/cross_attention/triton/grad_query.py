"""The gradient of cross-attention's query, by tiles of rows; what else is a sum over keys falls off on the way."""

from __future__ import annotations

import triton
import triton.language as tl

from mmkernels.ops.attention.cross_attention.triton.forward import gate_of
from mmkernels.ops.attention.triton.tiles import (
    keep_pairs,
    key_tiles,
    list_start,
    load_keys,
    load_lse,
    load_rows,
    load_spans,
    masked_scores,
    partial_tile,
    row_offsets,
    split_problem,
    split_rows,
    store_rows,
    zero_non_finite,
)
from mmkernels.ops.common.triton.constants import INFINITY


@triton.jit
def query_tile(
    dq0, dq1, gate_rows, bias_rows, q0, q1, do0, do1, lse, delta, factor, key, value, grad_bias, masks, mask_strides,
    key_strides, value_strides, grad_bias_strides, seed, b, h, i, live, lo, hi, key_batch, key_head, first, sizes,
    scale, threshold, kept,
    MASKED: tl.constexpr, DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr, V0: tl.constexpr,
    V1: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr, GATE_ROWS: tl.constexpr,
    BIAS_ROWS: tl.constexpr,
):  # fmt: skip
    """Add one tile of keys to the gradients of the rows."""
    k_len = sizes[4]
    k0 = load_keys(key, key_batch, key_head, first, key_strides, k_len, 0, D0, DIM, UNIT, BLOCK_K, not MASKED, False)
    dots = tl.dot(q0, tl.trans(k0), input_precision=PRECISION)
    k1 = k0
    if D1 > 0:
        k1 = load_keys(
            key, key_batch, key_head, first, key_strides, k_len, D0, D1, DIM, UNIT, BLOCK_K, not MASKED, False
        )
        dots = tl.dot(q1, tl.trans(k1), dots, input_precision=PRECISION)
    j = first + tl.arange(0, BLOCK_K)
    if MASKED:
        scores, _ = masked_scores(
            dots, masks, mask_strides, b[:, None], h[:, None], i[:, None], lo[:, None], hi[:, None], j[None, :], scale
        )
        weights = tl.where(scores == -INFINITY, 0.0, tl.exp2(scores - lse[:, None]))
    else:
        weights = tl.exp2(dots * scale - lse[:, None])
    v = load_keys(value, key_batch, key_head, first, value_strides, k_len, 0, V0, DV, UNIT, BLOCK_K, not MASKED, False)
    grad = tl.dot(do0, tl.trans(v), input_precision=PRECISION)
    if V1 > 0:
        v = load_keys(
            value, key_batch, key_head, first, value_strides, k_len, V0, V1, DV, UNIT, BLOCK_K, not MASKED, False
        )
        grad = tl.dot(do1, tl.trans(v), grad, input_precision=PRECISION)
    if seed is not None:
        grad = tl.where(keep_pairs(seed, threshold, b, h, i, first, BLOCK_K), grad * kept, 0.0)
    if GATE_ROWS:
        product = weights * grad
        if MASKED:
            product = tl.where(weights == 0, 0.0, product)
        gate_rows += tl.sum(product, 1)
    grad = weights * (grad * factor[:, None] - delta[:, None])
    if MASKED:
        grad = tl.where(weights == 0, 0.0, grad)  # a hidden key's may be NaN
        k0 = zero_non_finite(k0)
        if D1 > 0:
            k1 = zero_non_finite(k1)
    if grad_bias is not None:
        places = (
            grad_bias
            + row_offsets(b, h, i, grad_bias_strides)[:, None]
            + j.to(tl.int64)[None, :] * grad_bias_strides[3]
        )
        tl.store(places, grad.to(grad_bias.dtype.element_ty), mask=live[:, None] & (j < k_len)[None, :])
    if BIAS_ROWS:
        bias_rows += tl.sum(grad, 1)
    grad = grad.to(k0.dtype)
    dq0 = tl.dot(grad, k0, dq0, input_precision=PRECISION)
    if D1 > 0:
        dq1 = tl.dot(grad, k1, dq1, input_precision=PRECISION)
    return dq0, dq1, gate_rows, bias_rows


@triton.jit
def grad_query_kernel(
    query, key, value, grad_out, out, lse, grad_lse, delta, grad_query, grad_bias, gate_sums, bias_sums,
    masks, mask_strides, lists, list_strides, gate, gate_stride, seed,
    query_strides, key_strides, value_strides, grad_out_strides, out_strides, grad_query_strides,
    grad_bias_strides, sizes, scale, true_scale, threshold, kept,
    GROUP: tl.constexpr, PACKED: tl.constexpr, SHARED: tl.constexpr, ALL_PARTIAL: tl.constexpr, NEGATE: tl.constexpr,
    PRECISION: tl.constexpr, UNIT: tl.constexpr, DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The query's gradient of one tile of rows; on the way delta, and where wanted the bias's gradient and the sums
    over keys that the gate's and the bias's gradients are made of. Grid: (row tiles x problems,).

    delta: ``sum_j P_ij dP_ij = grad_out_i . out_i``, less the log-sum-exp's gradient, whose derivative by a score is P.
    """
    row_tiles = tl.num_programs(0) // (sizes[2] if PACKED else sizes[1])
    if not SHARED:
        row_tiles = row_tiles // sizes[0]
    problem, tile = tl.program_id(0) // row_tiles, tl.program_id(0) % row_tiles
    rows = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    b, h, i, live = split_rows(rows, problem, sizes, GROUP, PACKED, SHARED)
    key_batch, _, key_head = split_problem(problem, sizes, GROUP, PACKED)
    k_len = sizes[4]

    offsets = row_offsets(b, h, i, grad_out_strides, UNIT)
    out_offsets = row_offsets(b, h, i, out_strides, UNIT)
    do0 = load_rows(grad_out, offsets, live, grad_out_strides[3], 0, V0, DV)
    o = load_rows(out, out_offsets, live, out_strides[3], 0, V0, DV)
    sums = tl.sum(do0.to(tl.float32) * o.to(tl.float32), 1)
    do1 = do0
    if V1 > 0:
        do1 = load_rows(grad_out, offsets, live, grad_out_strides[3], V0, V1, DV)
        o = load_rows(out, out_offsets, live, out_strides[3], V0, V1, DV)
        sums += tl.sum(do1.to(tl.float32) * o.to(tl.float32), 1)
    place = (b.to(tl.int64) * sizes[1] + h) * sizes[3] + i
    if grad_lse is not None:
        sums -= tl.load(grad_lse + place, mask=live, other=0.0)
    tl.store(delta + place, sums, mask=live)

    if grad_query is not None or grad_bias is not None or gate_sums is not None or bias_sums is not None:
        offsets = row_offsets(b, h, i, query_strides, UNIT)
        q0 = load_rows(query, offsets, live, query_strides[3], 0, D0, DIM)
        q1 = q0
        if D1 > 0:
            q1 = load_rows(query, offsets, live, query_strides[3], D0, D1, DIM)
        if NEGATE:
            q0, q1 = -q0, -q1
        lo, hi = load_spans(masks, mask_strides, b, i, live, k_len)
        row_lse = load_lse(lse, place, live)
        factor = gate_of(gate, h, live, gate_stride)
        dq0 = tl.zeros([BLOCK_Q, D0], tl.float32)
        dq1 = tl.zeros([BLOCK_Q, D1 if D1 > 0 else 16], tl.float32)
        gate_rows = tl.zeros([BLOCK_Q], tl.float32)
        bias_rows = tl.zeros([BLOCK_Q], tl.float32)

        if lists[0] is None:
            first, end, full, full_end = key_tiles(lo, hi, live, k_len, 0, 1, BLOCK_K, ALL_PARTIAL)
            partial_tiles, full_tiles = (full - first) + (end - full_end), full_end - full
            listed, length = None, 0
        else:
            length = tl.cdiv(k_len, BLOCK_K)
            listed, partial_tiles, full_tiles = list_start(
                lists, list_strides, problem, tile, length, sizes, GROUP, PACKED
            )
            first, full, full_end = 0, 0, 0
        for n in range(0, full_tiles):
            at = full + n if listed is None else tl.load(listed + length - 1 - n)
            dq0, dq1, gate_rows, bias_rows = query_tile(
                dq0, dq1, gate_rows, bias_rows, q0, q1, do0, do1, row_lse, sums, factor, key, value, grad_bias, masks,
                mask_strides, key_strides, value_strides, grad_bias_strides, seed, b, h, i, live, lo, hi, key_batch,
                key_head, at * BLOCK_K, sizes, scale, threshold, kept,
                False, DIM, D0, D1, DV, V0, V1, BLOCK_K, PRECISION, UNIT, gate_sums is not None, bias_sums is not None,
            )  # fmt: skip
        for n in range(0, partial_tiles):
            at = partial_tile(n, listed, first, full, full_end)
            dq0, dq1, gate_rows, bias_rows = query_tile(
                dq0, dq1, gate_rows, bias_rows, q0, q1, do0, do1, row_lse, sums, factor, key, value, grad_bias, masks,
                mask_strides, key_strides, value_strides, grad_bias_strides, seed, b, h, i, live, lo, hi, key_batch,
                key_head, at * BLOCK_K, sizes, scale, threshold, kept,
                True, DIM, D0, D1, DV, V0, V1, BLOCK_K, PRECISION, UNIT, gate_sums is not None, bias_sums is not None,
            )  # fmt: skip
        if gate_sums is not None:
            tl.store(gate_sums + place, gate_rows, mask=live)
        if bias_sums is not None:
            tl.store(bias_sums + place, bias_rows, mask=live)
        if grad_query is not None:
            offsets = row_offsets(b, h, i, grad_query_strides)
            store_rows(grad_query, offsets, live, dq0 * true_scale, grad_query_strides[3], 0, D0, DIM)
            if D1 > 0:
                store_rows(grad_query, offsets, live, dq1 * true_scale, grad_query_strides[3], D0, D1, DIM)
