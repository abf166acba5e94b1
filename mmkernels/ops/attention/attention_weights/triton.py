"""Attention probabilities in Triton: the rows' log-sum-exp, then each tile of probabilities written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.ops.attention.attention_weights.spec import Arguments
from mmkernels.ops.attention.cross_attention.triton.forward import log_sum_exp
from mmkernels.ops.attention.triton.call import Call, in_units, unit_of
from mmkernels.ops.attention.triton.tiles import (
    load_keys,
    load_lse,
    load_rows,
    load_spans,
    masked_scores,
    row_offsets,
    split_problem,
    split_rows,
)
from mmkernels.runtime.triton import launch
from mmkernels.runtime.tuning import config


@triton.jit
def weights_kernel(
    query, key, lse, result, masks, mask_strides, query_strides, key_strides, sizes, row_tiles, scale,
    GROUP: tl.constexpr, PACKED: tl.constexpr, SHARED: tl.constexpr, NEGATE: tl.constexpr, PRECISION: tl.constexpr,
    UNIT: tl.constexpr,
    DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of rows by keys. Grid: (key tiles x row tiles x problems,)."""
    k_len = sizes[4]
    key_tiles = tl.cdiv(k_len, BLOCK_K)
    first = (tl.program_id(0) % key_tiles) * BLOCK_K
    line = tl.program_id(0) // key_tiles
    problem = line // row_tiles
    rows = (line % row_tiles) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    b, h, i, live = split_rows(rows, problem, sizes, GROUP, PACKED, SHARED)
    key_batch, _, key_head = split_problem(problem, sizes, GROUP, PACKED)
    lo, hi = load_spans(masks, mask_strides, b, i, live, k_len)
    j = first + tl.arange(0, BLOCK_K)
    weights = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    if (tl.min(lo, 0) < first + BLOCK_K) & (tl.max(hi, 0) > first):
        offsets = row_offsets(b, h, i, query_strides, UNIT)
        q = load_rows(query, offsets, live, query_strides[3], 0, D0, DIM)
        k = load_keys(key, key_batch, key_head, first, key_strides, k_len, 0, D0, DIM, UNIT, BLOCK_K, False, False)
        dots = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if D1 > 0:
            q = load_rows(query, offsets, live, query_strides[3], D0, D1, DIM)
            k = load_keys(key, key_batch, key_head, first, key_strides, k_len, D0, D1, DIM, UNIT, BLOCK_K, False, False)
            dots = tl.dot(q, tl.trans(k), dots, input_precision=PRECISION)
        if NEGATE:
            dots = -dots
        scores, visible = masked_scores(
            dots, masks, mask_strides, b[:, None], h[:, None], i[:, None], lo[:, None], hi[:, None], j[None, :], scale
        )
        row_lse = load_lse(lse, (b.to(tl.int64) * sizes[1] + h) * sizes[3] + i, live)
        weights = tl.where(visible, tl.exp2(scores - row_lse[:, None]), 0.0)
    places = ((b.to(tl.int64) * sizes[1] + h) * sizes[3] + i) * k_len
    tl.store(result + places[:, None] + j[None, :], weights, mask=live[:, None] & (j < k_len)[None, :])


def forward(args: Arguments) -> Tensor:
    """[B, Hq, Lq, Lk]."""
    query, key = args.query, args.key
    call = Call(args)
    lse = log_sum_exp(call)
    plan = config("attention_weights", "weights", query.device, query.dtype, call.dim)
    unit = unit_of(query, key)
    result = query.new_empty(call.batch, call.heads, call.q_len, call.k_len, dtype=torch.float32)
    row_tiles = call.row_tiles(plan)
    used = ("GROUP", "PACKED", "SHARED", "NEGATE", "PRECISION", "DIM", "D0", "D1")
    launch(
        weights_kernel, (call.key_tiles(plan) * row_tiles * call.problems,), plan,
        query, key, lse, result, call.masks, call.mask_strides, in_units(query.stride(), unit),
        in_units(call.key_strides, unit), call.sizes,
        row_tiles, call.scale_log2,
        **{name: call.constants[name] for name in used}, UNIT=unit, BLOCK_Q=plan.block_q, BLOCK_K=plan.block_k,
    )  # fmt: skip
    return result
