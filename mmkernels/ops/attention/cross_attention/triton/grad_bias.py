"""The gradient of a bias that heads, batch entries or queries share: summed over those in a fixed order."""

from __future__ import annotations

import triton
import triton.language as tl

from mmkernels.ops.attention.cross_attention.triton.forward import gate_of
from mmkernels.ops.attention.triton.tiles import (
    keep_pairs,
    load_keys,
    load_lse,
    load_rows,
    load_spans,
    masked_scores,
    row_offsets,
)
from mmkernels.ops.common.triton.constants import INFINITY


@triton.jit
def grad_bias_kernel(
    query, key, value, grad_out, lse, delta, grad_bias, masks, mask_strides, gate, gate_stride, seed,
    query_strides, key_strides, value_strides, grad_out_strides, grad_bias_strides, sizes, bias_heads, bias_tiles,
    sum_batch, sum_heads, sum_tiles, scale, threshold, kept, splits,
    GROUP: tl.constexpr, NEGATE: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr, DIM: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr, DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, SUM_ROWS: tl.constexpr,
):  # fmt: skip
    """One tile of the bias's gradient: the sum over ``sum_batch x sum_heads x sum_tiles`` tiles of scores.

    Grid: (key tiles x the bias's query tiles x its batch x heads, splits). SUM_ROWS: all queries share the bias, so
    that it is a row of keys and `sum_tiles` counts the tiles of queries; else that is 1. `grad_bias` has strides
    (split, batch, head, query, key).
    """
    k_len = sizes[4]
    key_tiles_ = tl.cdiv(k_len, BLOCK_K)
    first = (tl.program_id(0) % key_tiles_) * BLOCK_K
    own_tile = tl.program_id(0) // key_tiles_ % bias_tiles
    entry = tl.program_id(0) // key_tiles_ // bias_tiles
    bias_batch, bias_head = entry // bias_heads, entry % bias_heads
    split = tl.program_id(1)
    j = first + tl.arange(0, BLOCK_K)
    total = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    share = tl.cdiv(sum_batch * sum_heads * sum_tiles, splits)
    for n in range(split * share, tl.minimum((split + 1) * share, sum_batch * sum_heads * sum_tiles)):
        i = (own_tile + n // (sum_heads * sum_batch)) * BLOCK_Q + tl.arange(0, BLOCK_Q)
        h = bias_head + n % sum_heads + i * 0
        b = bias_batch + (n // sum_heads) % sum_batch + i * 0
        live = i < sizes[3]
        lo, hi = load_spans(masks, mask_strides, b, i, live, k_len)
        if (tl.min(lo, 0) < first + BLOCK_K) & (tl.max(hi, 0) > first):
            key_head = (bias_head + n % sum_heads) // GROUP
            key_batch = bias_batch + (n // sum_heads) % sum_batch
            offsets = row_offsets(b, h, i, query_strides, UNIT)
            q = load_rows(query, offsets, live, query_strides[3], 0, D0, DIM)
            k = load_keys(key, key_batch, key_head, first, key_strides, k_len, 0, D0, DIM, UNIT, BLOCK_K, False, False)
            dots = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            if D1 > 0:
                q = load_rows(query, offsets, live, query_strides[3], D0, D1, DIM)
                k = load_keys(
                    key, key_batch, key_head, first, key_strides, k_len, D0, D1, DIM, UNIT, BLOCK_K, False, False
                )
                dots = tl.dot(q, tl.trans(k), dots, input_precision=PRECISION)
            if NEGATE:
                dots = -dots
            scores, _ = masked_scores(
                dots, masks, mask_strides, b[:, None], h[:, None], i[:, None], lo[:, None], hi[:, None], j[None, :],
                scale,
            )  # fmt: skip
            place = (b.to(tl.int64) * sizes[1] + h) * sizes[3] + i
            row_lse = load_lse(lse, place, live)
            weights = tl.where(scores == -INFINITY, 0.0, tl.exp2(scores - row_lse[:, None]))
            offsets = row_offsets(b, h, i, grad_out_strides, UNIT)
            do = load_rows(grad_out, offsets, live, grad_out_strides[3], 0, V0, DV)
            v = load_keys(
                value, key_batch, key_head, first, value_strides, k_len, 0, V0, DV, UNIT, BLOCK_K, False, False
            )
            grad = tl.dot(do, tl.trans(v), input_precision=PRECISION)
            if V1 > 0:
                do = load_rows(grad_out, offsets, live, grad_out_strides[3], V0, V1, DV)
                v = load_keys(
                    value, key_batch, key_head, first, value_strides, k_len, V0, V1, DV, UNIT, BLOCK_K, False, False
                )
                grad = tl.dot(do, tl.trans(v), grad, input_precision=PRECISION)
            if seed is not None:
                grad = tl.where(keep_pairs(seed, threshold, b, h, i, first, BLOCK_K), grad * kept, 0.0)
            factor = gate_of(gate, h, live, gate_stride)
            row_delta = tl.load(delta + place, mask=live, other=0.0)
            grad = weights * (grad * factor[:, None] - row_delta[:, None])
            total += tl.where(weights == 0, 0.0, grad)  # a hidden key's may be NaN
    place = split.to(tl.int64) * grad_bias_strides[0] + bias_batch.to(tl.int64) * grad_bias_strides[1]
    place += bias_head.to(tl.int64) * grad_bias_strides[2]
    places = grad_bias + place + j.to(tl.int64) * grad_bias_strides[4]
    if SUM_ROWS:
        tl.store(places, tl.sum(total, 0).to(grad_bias.dtype.element_ty), mask=j < k_len)
    else:
        i = own_tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
        places = places[None, :] + i.to(tl.int64)[:, None] * grad_bias_strides[3]
        inside = (i < sizes[3])[:, None] & (j < k_len)[None, :]
        tl.store(places, total.to(grad_bias.dtype.element_ty), mask=inside)
