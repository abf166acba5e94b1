"""Received attention in Triton: the rows' log-sum-exp, then sums over rows by tiles of keys, without atomics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.ops.attention.attention_received.spec import Arguments
from mmkernels.ops.attention.cross_attention.triton.forward import LISTED, log_sum_exp
from mmkernels.ops.attention.triton.call import NO_LISTS, Call, in_units, strides_of, unit_of
from mmkernels.ops.attention.triton.tiles import (
    list_start,
    load_keys,
    load_lse,
    load_rows,
    load_spans,
    masked_scores,
    row_offsets,
    split_problem,
    split_rows,
)
from mmkernels.ops.common.triton.constants import INFINITY
from mmkernels.runtime.triton import launch
from mmkernels.runtime.tuning import config


@triton.jit
def column_sums(
    total, k0, k1, query, lse, counts, count_strides, masks, mask_strides, query_strides, problem, first_row, first_key,
    sizes, scale,
    MASKED: tl.constexpr, GROUP: tl.constexpr, NEGATE: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr,
    DIM: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Add to each key what one tile of rows gives it; scores are [keys, rows]."""
    rows = first_row + tl.arange(0, BLOCK_Q)
    b, h, i, live = split_rows(rows, problem, sizes, GROUP, False, False)
    offsets = row_offsets(b, h, i, query_strides, UNIT)
    q = load_rows(query, offsets, live, query_strides[3], 0, D0, DIM)
    dots = tl.dot(k0, tl.trans(q), input_precision=PRECISION)
    if D1 > 0:
        q = load_rows(query, offsets, live, query_strides[3], D0, D1, DIM)
        dots = tl.dot(k1, tl.trans(q), dots, input_precision=PRECISION)
    if NEGATE:
        dots = -dots
    row_lse = load_lse(lse, (b.to(tl.int64) * sizes[1] + h) * sizes[3] + i, live)
    if MASKED:
        j = first_key + tl.arange(0, BLOCK_K)
        lo, hi = load_spans(masks, mask_strides, b, i, live, sizes[4])
        scores, _ = masked_scores(
            dots, masks, mask_strides, b[None, :], h[None, :], i[None, :], lo[None, :], hi[None, :], j[:, None], scale
        )
    else:
        scores = tl.where(live[None, :], dots * scale, -INFINITY)
    weights = tl.exp2(scores - row_lse[None, :])
    if counts is not None:
        weights *= tl.load(counts + row_offsets(b, h, i, count_strides), mask=live, other=0.0).to(tl.float32)[None, :]
    return total + tl.sum(tl.where(scores == -INFINITY, 0.0, weights), 1)


@triton.jit
def received_kernel(
    query, key, lse, counts, received, masks, mask_strides, lists, list_strides, query_strides, key_strides,
    count_strides, sizes, scale,
    GROUP: tl.constexpr, ALL_PARTIAL: tl.constexpr, NEGATE: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr,
    DIM: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of keys of one query head. Grid: (key tiles x batch x query heads,)."""
    k_len = sizes[4]
    key_tiles = tl.cdiv(k_len, BLOCK_K)
    problem, tile = tl.program_id(0) // key_tiles, tl.program_id(0) % key_tiles
    key_batch, _, key_head = split_problem(problem, sizes, GROUP, False)
    first_key = tile * BLOCK_K
    k0 = load_keys(key, key_batch, key_head, first_key, key_strides, k_len, 0, D0, DIM, UNIT, BLOCK_K, False, False)
    k1 = k0
    if D1 > 0:
        k1 = load_keys(
            key, key_batch, key_head, first_key, key_strides, k_len, D0, D1, DIM, UNIT, BLOCK_K, False, False
        )
    total = tl.zeros([BLOCK_K], tl.float32)
    row_tiles = tl.cdiv(sizes[3], BLOCK_Q)
    if lists[0] is None:
        listed, full_tiles, partial_tiles = None, row_tiles, 0
        if ALL_PARTIAL or masks[0] is not None:
            full_tiles, partial_tiles = 0, row_tiles
    else:
        listed, partial_tiles, full_tiles = list_start(
            lists, list_strides, problem, tile, row_tiles, sizes, GROUP, False
        )
    for n in range(0, full_tiles):
        at = n if listed is None else tl.load(listed + row_tiles - 1 - n)
        total = column_sums(
            total, k0, k1, query, lse, counts, count_strides, masks, mask_strides, query_strides, problem, at * BLOCK_Q,
            first_key, sizes, scale, False, GROUP, NEGATE, PRECISION, UNIT, DIM, D0, D1, BLOCK_Q, BLOCK_K,
        )  # fmt: skip
    for n in range(0, partial_tiles):
        at = n if listed is None else tl.load(listed + n)
        total = column_sums(
            total, k0, k1, query, lse, counts, count_strides, masks, mask_strides, query_strides, problem, at * BLOCK_Q,
            first_key, sizes, scale, True, GROUP, NEGATE, PRECISION, UNIT, DIM, D0, D1, BLOCK_Q, BLOCK_K,
        )  # fmt: skip
    j = first_key + tl.arange(0, BLOCK_K)
    tl.store(received + problem.to(tl.int64) * k_len + j, total, mask=j < k_len)


def forward(args: Arguments) -> Tensor:
    """[B, Hq, Lk]."""
    query, key, query_weights = args.query, args.key, args.query_weights
    lse = log_sum_exp(Call(args))
    call = Call(args, packed=False, shared=False)
    plan = config("attention_received", "received", query.device, query.dtype, call.dim)
    unit = unit_of(query, key)
    received = query.new_empty(call.batch, call.heads, call.k_len, dtype=torch.float32)
    listed = any(x is not None for x in (args.start, args.key_valid, args.dense)) and call.q_len * call.k_len >= LISTED
    lists, list_strides = call.lists(plan, of_rows=False) if listed else NO_LISTS
    used = ("GROUP", "ALL_PARTIAL", "NEGATE", "PRECISION", "DIM", "D0", "D1")
    launch(
        received_kernel, (call.key_tiles(plan) * call.problems,), plan,
        query, key, lse, query_weights, received, call.masks, call.mask_strides, lists, list_strides,
        in_units(query.stride(), unit), in_units(call.key_strides, unit),
        (0, 0, 0) if query_weights is None else strides_of(query_weights, 0, 1, 2), call.sizes, call.scale_log2,
        **{name: call.constants[name] for name in used}, UNIT=unit, BLOCK_Q=plan.block_q, BLOCK_K=plan.block_k,
    )  # fmt: skip
    return received
