"""The gradients of cross-attention's key and value, by tiles of keys; its tiles of scores are [keys, rows]."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from mmkernels.ops.attention.triton.arguments import Halves, Rows, SplitStrides, Strides
from mmkernels.ops.attention.triton.scores import (
    keep_pairs,
    load_gate,
    load_lse,
    load_spans,
    masked_scores,
    note_non_finite,
    opaque_zero,
    restore_non_finite,
    zero_non_finite,
)
from mmkernels.ops.attention.triton.tiles import (
    add_halves,
    add_product,
    dot_halves,
    load_halves,
    load_key_halves,
    problem_at,
    row_offsets,
    row_places,
    rows_at,
    scale_halves,
    store_halves,
    zero_halves,
    zero_tile,
)
from mmkernels.ops.attention.triton.walks import full_tile, partial_tile, walk_over_rows
from mmkernels.ops.common.triton.constants import INFINITY


class GradKeyValueStrides(NamedTuple):
    query: Strides
    key: Strides
    value: Strides
    grad_out: Strides
    grad_key: SplitStrides
    grad_value: SplitStrides


class KeyGradients(NamedTuple):
    """The gradients of a tile of keys and values, each in `Halves`."""

    key: Any
    value: Any


@triton.jit
def key_value_tile(
    grads, non_finite, k, v, query, grad_out, lse, delta, masks, gate, dropout, strides, problem, first_row, first_key,
    sizes, scale,
    MASKED: tl.constexpr, NEED_KEY: tl.constexpr, NEED_VALUE: tl.constexpr, LAYOUT: tl.constexpr, NEGATE: tl.constexpr,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """Adds one tile of rows to the gradients of the keys and values.

    Rows past the last are 0 in query and gradient, and add nothing. `non_finite` notes rows whose dO is not finite.
    """
    rows = rows_at(first_row + tl.arange(0, BLOCK_Q), problem, sizes, LAYOUT)
    places = row_places(rows, sizes)
    q = load_halves(query, row_offsets(rows, strides.query, UNIT), rows.live, strides.query.column, DIM)
    if NEGATE:
        q = Halves(-q.first, -q.second)
    if MASKED:  # the log-sum-exp of a row that is not finite is NaN, and reaches all keys that the row sees
        q = zero_non_finite(q, DIM)
    dots = dot_halves(k, q, DIM, PRECISION)
    row_lse = load_lse(lse, places, rows.live)
    if MASKED:
        spans = load_spans(masks, rows, sizes.k_len)
        scores, _ = masked_scores(dots, masks, rows, spans, first_key + tl.arange(0, BLOCK_K), scale, 1)
        weights = tl.where(scores == -INFINITY, 0.0, tl.exp2(scores - row_lse[None, :]))
    else:
        weights = tl.exp2(dots * scale - row_lse[None, :])
    do = load_halves(
        grad_out, row_offsets(rows, strides.grad_out, UNIT), rows.live, strides.grad_out.column, VALUE_DIM
    )  # fmt: skip
    if MASKED:  # delta carries a dO that is not finite to the keys that see it, `restore_values` to their values
        non_finite = note_non_finite(non_finite, do, VALUE_DIM)
        do = zero_non_finite(do, VALUE_DIM)
    if gate is not None:
        do = gated(do, load_gate(gate, rows), VALUE_DIM)
    if dropout is not None:
        keep = tl.trans(keep_pairs(dropout, rows, first_key, BLOCK_K))
    grad_key, grad_value = grads.key, grads.value
    if NEED_VALUE:
        dropped = weights
        if dropout is not None:
            dropped = tl.where(keep, weights * dropout.scale, 0.0)
        grad_value = add_product(grad_value, dropped.to(do.first.dtype), do, VALUE_DIM, PRECISION)
    if NEED_KEY:
        grad = dot_halves(v, do, VALUE_DIM, PRECISION)
        if dropout is not None:
            grad = tl.where(keep, grad * dropout.scale, 0.0)
        grad = weights * (grad - tl.load(delta + places, mask=rows.live, other=0.0)[None, :])
        if MASKED:
            grad = tl.where(weights == 0, 0.0, grad)  # a hidden key's may be NaN
        grad_key = add_product(grad_key, grad.to(q.first.dtype), q, DIM, PRECISION)
    grads = KeyGradients(grad_key, grad_value)
    return grads, non_finite


@triton.jit
def gated(x, factor, DIM: tl.constexpr):
    """Returns the halves x times the factor of each row, rounded to x's dtype."""
    first = (x.first.to(tl.float32) * factor[:, None]).to(x.first.dtype)
    second = first
    if DIM.second > 0:
        second = (x.second.to(tl.float32) * factor[:, None]).to(x.second.dtype)
    halves = Halves(first, second)
    return halves


@triton.jit
def restore_values(
    grad_value, query, grad_out, masks, lists, strides, walk, split, splits, problem, tile, sizes,
    LAYOUT: tl.constexpr, VALUE_DIM: tl.constexpr, UNIT: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Adds what is not finite in dO to the stored gradients of the values that see it; see scores.py."""
    j = tile * BLOCK_K + tl.arange(0, BLOCK_K) + opaque_zero(query)
    total = zero_halves(BLOCK_K, VALUE_DIM)
    share = tl.cdiv(walk.partial, splits)
    for n in tl.range(split * share, tl.minimum((split + 1) * share, walk.partial), num_stages=1):
        first = partial_tile(walk, lists, n) * BLOCK_Q
        rows = rows_at(first + tl.arange(0, BLOCK_Q), problem, sizes, LAYOUT)
        spans = load_spans(masks, rows, sizes.k_len)
        _, visible = masked_scores(zero_tile(BLOCK_K, BLOCK_Q), masks, rows, spans, j, 1.0, 1)
        offsets = row_offsets(rows, strides.grad_out, UNIT)
        do = load_halves(grad_out, offsets, rows.live, strides.grad_out.column, VALUE_DIM)
        total = restore_non_finite(total, do, visible, VALUE_DIM)
    offsets = key_offsets(split, problem, j, strides.grad_value)
    add_halves(grad_value, offsets, j < sizes.k_len, total, strides.grad_value.column, VALUE_DIM)


@triton.jit
def key_offsets(split, problem, j, strides):
    """Returns where keys begin in a gradient in parts."""
    offsets = row_offsets(Rows(problem.batch + j * 0, problem.key_head + j * 0, j, None), strides)
    return split.to(tl.int64) * strides.split + offsets


@triton.jit
def grad_key_value_kernel(
    query, key, value, grad_out, lse, delta, grad_key, grad_value, masks, lists, gate, dropout, strides, sizes,
    scale, abs_scale, splits,
    LAYOUT: tl.constexpr, ALL_PARTIAL: tl.constexpr, HIDES: tl.constexpr, NEGATE: tl.constexpr, DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Computes the gradients of one tile of keys and values from one of `splits` parts of the rows.

    Gradients that are None are not wanted. Grid: (key tiles x problems, splits).
    """
    k_len = sizes.k_len
    key_tiles = tl.cdiv(k_len, BLOCK_K)
    number, tile = tl.program_id(0) // key_tiles, tl.program_id(0) % key_tiles
    split = tl.program_id(1)
    problem = problem_at(number, sizes, LAYOUT)
    first_key = tile * BLOCK_K
    k = load_key_halves(key, problem, first_key, strides.key, k_len, DIM, UNIT, BLOCK_K, False, False)
    v = load_key_halves(value, problem, first_key, strides.value, k_len, VALUE_DIM, UNIT, BLOCK_K, False, False)
    grads = KeyGradients(zero_halves(BLOCK_K, DIM), zero_halves(BLOCK_K, VALUE_DIM))
    non_finite = tl.zeros([BLOCK_Q], tl.int32)
    walk = walk_over_rows(lists, masks, problem, tile, sizes, LAYOUT, BLOCK_Q, ALL_PARTIAL)
    for MASKED in tl.static_range(2):
        count = walk.partial if MASKED else walk.full
        share = tl.cdiv(count, splits)
        for n in range(split * share, tl.minimum((split + 1) * share, count)):
            row_tile = partial_tile(walk, lists, n) if MASKED else full_tile(walk, lists, n)
            grads, non_finite = key_value_tile(
                grads, non_finite, k, v, query, grad_out, lse, delta, masks, gate, dropout, strides, problem,
                row_tile * BLOCK_Q, first_key, sizes, scale, MASKED, grad_key is not None, grad_value is not None,
                LAYOUT, NEGATE, DIM, VALUE_DIM, BLOCK_Q, BLOCK_K, PRECISION, UNIT,
            )  # fmt: skip
    j = first_key + tl.arange(0, BLOCK_K)
    live = j < k_len
    if grad_key is not None:
        offsets = key_offsets(split, problem, j, strides.grad_key)
        total = scale_halves(grads.key, abs_scale, DIM)
        store_halves(grad_key, offsets, live, total, strides.grad_key.column, DIM)
    if grad_value is not None:
        offsets = key_offsets(split, problem, j, strides.grad_value)
        store_halves(grad_value, offsets, live, grads.value, strides.grad_value.column, VALUE_DIM)
        if HIDES:
            if tl.max(non_finite, 0) > 0:
                restore_values(
                    grad_value, query, grad_out, masks, lists, strides, walk, split, splits, problem, tile, sizes,
                    LAYOUT, VALUE_DIM, UNIT, BLOCK_Q, BLOCK_K,
                )  # fmt: skip
