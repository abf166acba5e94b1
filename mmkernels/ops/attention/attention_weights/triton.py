"""Attention probabilities in Triton: the rows' log-sum-exp, then each tile of probabilities written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.ops.attention.attention_weights.spec import Arguments
from mmkernels.ops.attention.triton.attend import log_sum_exp
from mmkernels.ops.attention.triton.call import Call, strides_of, unit_of
from mmkernels.ops.attention.triton.scores import load_lse, load_spans, masked_scores
from mmkernels.ops.attention.triton.tiles import (
    dot_keys,
    load_halves,
    problem_at,
    row_offsets,
    row_places,
    rows_at,
)
from mmkernels.runtime.triton import launch
from mmkernels.runtime.tuning import config


@triton.jit
def weights_kernel(
    query, key, lse, result, masks, query_strides, key_strides, sizes, row_tiles, scale,
    LAYOUT: tl.constexpr, NEGATE: tl.constexpr, DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Computes one tile of rows by keys. Grid: (key tiles x row tiles x problems,)."""
    k_len = sizes.k_len
    key_tiles = tl.cdiv(k_len, BLOCK_K)
    first = (tl.program_id(0) % key_tiles) * BLOCK_K
    line = tl.program_id(0) // key_tiles
    number, tile = line // row_tiles, line % row_tiles
    n = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    problem = problem_at(number, sizes, LAYOUT)
    rows = rows_at(n, problem, sizes, LAYOUT)
    spans = load_spans(masks, rows, k_len)
    j = first + tl.arange(0, BLOCK_K)
    weights = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    if (tl.min(spans.start, 0) < first + BLOCK_K) & (tl.max(spans.end, 0) > first):
        q = load_halves(query, row_offsets(rows, query_strides, UNIT), rows.live, query_strides.column, DIM)
        dots, _ = dot_keys(q, key, problem, first, key_strides, k_len, DIM, UNIT, BLOCK_K, False, False, PRECISION)
        if NEGATE:
            dots = -dots
        scores, visible = masked_scores(dots, masks, rows, spans, j, scale, 0)
        row_lse = load_lse(lse, row_places(rows, sizes), rows.live)
        weights = tl.where(visible, tl.exp2(scores - row_lse[:, None]), 0.0)
    places = result + (row_places(rows, sizes) * k_len)[:, None] + j[None, :]
    tl.store(places, weights, mask=rows.live[:, None] & (j < k_len)[None, :])


def forward(args: Arguments) -> Tensor:
    """Returns the probabilities, float32 [B, Hq, Lq, Lk]."""
    query, key = args.query, args.key
    call = Call(args)
    lse = log_sum_exp(call)
    plan = config("attention_weights", "weights", query.device, query.dtype, call.dim.size)
    unit = unit_of(query, key)
    result = query.new_empty(call.batch, call.heads, call.q_len, call.k_len, dtype=torch.float32)
    row_tiles = call.row_tiles(plan)
    constants = {name: x for name, x in call.constants.items() if name != "ALL_PARTIAL"}
    launch(
        weights_kernel, (call.key_tiles(plan) * row_tiles * call.problems,), plan,
        query, key, lse, result, call.masks, strides_of(query, unit), strides_of(key, unit), call.sizes, row_tiles,
        call.scale_log2, **constants, BLOCK_Q=plan.block_q, BLOCK_K=plan.block_k, UNIT=unit,
    )  # fmt: skip
    return result
