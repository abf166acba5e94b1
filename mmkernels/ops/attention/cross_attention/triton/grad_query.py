"""The gradient of cross-attention's query, by tiles of rows, and what else is a sum over keys.

These are delta, which the gradient of key and value needs too, the bias's gradient where the bias is not broadcast, and
the sums that the gradients of the gate and of a bias shared by all keys are made of.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from mmkernels.ops.attention.triton.arguments import Halves, Strides
from mmkernels.ops.attention.triton.scores import (
    keep_pairs,
    load_gate,
    load_lse,
    load_spans,
    masked_scores,
    zero_non_finite,
)
from mmkernels.ops.attention.triton.tiles import (
    add_product,
    dot_keys,
    load_halves,
    problem_at,
    program_of_rows,
    row_offsets,
    row_places,
    rows_at,
    scale_halves,
    store_halves,
    sum_of_products,
    zero_halves,
)
from mmkernels.ops.attention.triton.walks import full_tile, partial_tile, walk_over_keys
from mmkernels.ops.common.triton.constants import INFINITY


class GradQueryStrides(NamedTuple):
    query: Strides
    key: Strides
    value: Strides
    grad_out: Strides
    out: Strides
    grad_query: Strides
    grad_bias: Strides


class RowGradients(NamedTuple):
    """The gradients of a tile of rows: of the query, and each row's sums for the gate's and the bias's gradients."""

    query: Any
    gate: Any
    bias: Any


class RowInputs(NamedTuple):
    """What the gradients of a tile of rows are made of: query, dO, log-sum-exp (base 2), delta, gate factor."""

    query: Any
    grad_out: Any
    lse: Any
    delta: Any
    factor: Any


@triton.jit
def query_tile(
    grads, inputs, key, value, grad_bias, masks, dropout, strides, rows, spans, problem, first, k_len, scale,
    MASKED: tl.constexpr, NEED_GATE: tl.constexpr, NEED_BIAS: tl.constexpr, DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Adds one tile of keys to the gradients of the rows."""
    dots, k = dot_keys(
        inputs.query, key, problem, first, strides.key, k_len, DIM, UNIT, BLOCK_K, not MASKED, False, PRECISION
    )
    j = first + tl.arange(0, BLOCK_K)
    if MASKED:
        scores, _ = masked_scores(dots, masks, rows, spans, j, scale, 0)
        weights = tl.where(scores == -INFINITY, 0.0, tl.exp2(scores - inputs.lse[:, None]))
    else:
        weights = tl.exp2(dots * scale - inputs.lse[:, None])
    grad, _ = dot_keys(
        inputs.grad_out, value, problem, first, strides.value, k_len, VALUE_DIM, UNIT, BLOCK_K, not MASKED, False,
        PRECISION,
    )  # fmt: skip
    if dropout is not None:
        grad = tl.where(keep_pairs(dropout, rows, first, BLOCK_K), grad * dropout.scale, 0.0)
    gate_sums, bias_sums = grads.gate, grads.bias
    if NEED_GATE:
        product = weights * grad
        if MASKED:
            product = tl.where(weights == 0, 0.0, product)
        gate_sums += tl.sum(product, 1)
    grad = weights * (grad * inputs.factor[:, None] - inputs.delta[:, None])
    if MASKED:
        grad = tl.where(weights == 0, 0.0, grad)  # a hidden key's may be NaN
        k = zero_non_finite(k, DIM)
    if grad_bias is not None:
        places = grad_bias + row_offsets(rows, strides.grad_bias)[:, None]
        places += j.to(tl.int64)[None, :] * strides.grad_bias.column
        tl.store(places, grad.to(grad_bias.dtype.element_ty), mask=rows.live[:, None] & (j < k_len)[None, :])
    if NEED_BIAS:
        bias_sums += tl.sum(grad, 1)
    grad_query = add_product(grads.query, grad.to(k.first.dtype), k, DIM, PRECISION)
    grads = RowGradients(grad_query, gate_sums, bias_sums)
    return grads


@triton.jit
def grad_query_kernel(
    query, key, value, grad_out, out, lse, grad_lse, delta, grad_query, grad_bias, gate_sums, bias_sums,
    masks, lists, gate, dropout, strides, sizes, scale, true_scale,
    LAYOUT: tl.constexpr, ALL_PARTIAL: tl.constexpr, NEGATE: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Computes one tile of rows; outputs that are None are not wanted. Grid: (row tiles x problems,).

    delta: ``sum_j P_ij dP_ij = grad_out_i . out_i``, less the log-sum-exp's gradient, whose derivative by a score is P.
    """
    number, tile = program_of_rows(sizes, LAYOUT)
    n = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    problem = problem_at(number, sizes, LAYOUT)
    rows = rows_at(n, problem, sizes, LAYOUT)
    live = rows.live
    offsets, out_offsets = row_offsets(rows, strides.grad_out, UNIT), row_offsets(rows, strides.out, UNIT)
    do = load_halves(grad_out, offsets, live, strides.grad_out.column, VALUE_DIM)
    o = load_halves(out, out_offsets, live, strides.out.column, VALUE_DIM)
    deltas = sum_of_products(do, o, VALUE_DIM)
    places = row_places(rows, sizes)
    if grad_lse is not None:
        deltas -= tl.load(grad_lse + places, mask=live, other=0.0)
    tl.store(delta + places, deltas, mask=live)

    if grad_query is not None or grad_bias is not None or gate_sums is not None or bias_sums is not None:
        q = load_halves(query, row_offsets(rows, strides.query, UNIT), live, strides.query.column, DIM)
        if NEGATE:
            q = Halves(-q.first, -q.second)
        spans = load_spans(masks, rows, sizes.k_len)
        inputs = RowInputs(q, do, load_lse(lse, places, live), deltas, load_gate(gate, rows))
        zeros = tl.zeros([BLOCK_Q], tl.float32)
        grads = RowGradients(zero_halves(BLOCK_Q, DIM), zeros, zeros)
        walk = walk_over_keys(lists, spans, live, problem, tile, sizes.k_len, 0, 1, BLOCK_K, ALL_PARTIAL)
        for MASKED in tl.static_range(2):
            for n in range(0, walk.partial if MASKED else walk.full):
                tile = partial_tile(walk, lists, n) if MASKED else full_tile(walk, lists, n)
                grads = query_tile(
                    grads, inputs, key, value, grad_bias, masks, dropout, strides, rows, spans, problem, tile * BLOCK_K,
                    sizes.k_len, scale, MASKED, gate_sums is not None, bias_sums is not None, DIM, VALUE_DIM, BLOCK_K,
                    PRECISION, UNIT,
                )  # fmt: skip
        if gate_sums is not None:
            tl.store(gate_sums + places, grads.gate, mask=live)
        if bias_sums is not None:
            tl.store(bias_sums + places, grads.bias, mask=live)
        if grad_query is not None:
            offsets = row_offsets(rows, strides.grad_query)
            total = scale_halves(grads.query, true_scale, DIM)
            store_halves(grad_query, offsets, live, total, strides.grad_query.column, DIM)
