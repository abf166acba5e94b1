"""Received attention in Triton: the rows' log-sum-exp, then sums over rows by tiles of keys, without atomics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.ops.attention.attention_received.spec import Arguments
from mmkernels.ops.attention.triton.arguments import RowStrides
from mmkernels.ops.attention.triton.attend import log_sum_exp
from mmkernels.ops.attention.triton.call import Call, broadcast_strides, strides_of, unit_of
from mmkernels.ops.attention.triton.scores import load_lse, load_spans, masked_scores
from mmkernels.ops.attention.triton.tiles import (
    dot_halves,
    load_halves,
    load_key_halves,
    problem_at,
    row_offsets,
    row_places,
    rows_at,
)
from mmkernels.ops.attention.triton.walks import full_tile, partial_tile, walk_over_rows
from mmkernels.ops.common.triton.constants import INFINITY
from mmkernels.runtime.triton import launch
from mmkernels.runtime.tuning import config


@triton.jit
def column_sums(
    total, k, query, lse, counts, masks, query_strides, count_strides, problem, first_row, first_key, sizes, scale,
    MASKED: tl.constexpr, LAYOUT: tl.constexpr, NEGATE: tl.constexpr, DIM: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Adds to each key what one tile of rows gives it; scores are [keys, rows]."""
    rows = rows_at(first_row + tl.arange(0, BLOCK_Q), problem, sizes, LAYOUT)
    q = load_halves(query, row_offsets(rows, query_strides, UNIT), rows.live, query_strides.column, DIM)
    dots = dot_halves(k, q, DIM, PRECISION)
    if NEGATE:
        dots = -dots
    row_lse = load_lse(lse, row_places(rows, sizes), rows.live)
    if MASKED:
        spans = load_spans(masks, rows, sizes.k_len)
        scores, _ = masked_scores(dots, masks, rows, spans, first_key + tl.arange(0, BLOCK_K), scale, 1)
    else:
        scores = tl.where(rows.live[None, :], dots * scale, -INFINITY)
    weights = tl.exp2(scores - row_lse[None, :])
    if counts is not None:
        count = tl.load(counts + row_offsets(rows, count_strides), mask=rows.live, other=0.0)
        weights *= count.to(tl.float32)[None, :]
    return total + tl.sum(tl.where(scores == -INFINITY, 0.0, weights), 1)


@triton.jit
def received_kernel(
    query, key, lse, counts, received, masks, lists, query_strides, key_strides, count_strides, sizes, scale,
    LAYOUT: tl.constexpr, ALL_PARTIAL: tl.constexpr, NEGATE: tl.constexpr, DIM: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Computes one tile of keys of one query head. Grid: (key tiles x batch x query heads,)."""
    key_tiles = tl.cdiv(sizes.k_len, BLOCK_K)
    number, tile = tl.program_id(0) // key_tiles, tl.program_id(0) % key_tiles
    problem = problem_at(number, sizes, LAYOUT)
    first_key = tile * BLOCK_K
    k = load_key_halves(key, problem, first_key, key_strides, sizes.k_len, DIM, UNIT, BLOCK_K, False, False)
    total = tl.zeros([BLOCK_K], tl.float32)
    walk = walk_over_rows(lists, masks, problem, tile, sizes, LAYOUT, BLOCK_Q, ALL_PARTIAL)
    for MASKED in tl.static_range(2):
        for n in range(0, walk.partial if MASKED else walk.full):
            row_tile = partial_tile(walk, lists, n) if MASKED else full_tile(walk, lists, n)
            total = column_sums(
                total, k, query, lse, counts, masks, query_strides, count_strides, problem, row_tile * BLOCK_Q,
                first_key, sizes, scale, MASKED, LAYOUT, NEGATE, DIM, BLOCK_Q, BLOCK_K, PRECISION, UNIT,
            )  # fmt: skip
    j = first_key + tl.arange(0, BLOCK_K)
    tl.store(received + problem.number.to(tl.int64) * sizes.k_len + j, total, mask=j < sizes.k_len)


def forward(args: Arguments) -> Tensor:
    """Returns the received attention, float32 [B, Hq, Lk]."""
    query, key, query_weights = args.query, args.key, args.query_weights
    lse = log_sum_exp(Call(args))
    call = Call(args, packed=False, shared=False)
    plan = config("attention_received", "received", query.device, query.dtype, call.dim.size)
    unit = unit_of(query, key)
    received = query.new_empty(call.batch, call.heads, call.k_len, dtype=torch.float32)
    launch(
        received_kernel, (call.key_tiles(plan) * call.problems,), plan,
        query, key, lse, query_weights, received, call.masks, call.lists(plan, of_rows=False), strides_of(query, unit),
        strides_of(key, unit), None if query_weights is None else RowStrides(*broadcast_strides(query_weights)),
        call.sizes, call.scale_log2, **call.constants, BLOCK_Q=plan.block_q, BLOCK_K=plan.block_k, UNIT=unit,
    )  # fmt: skip
    return received
