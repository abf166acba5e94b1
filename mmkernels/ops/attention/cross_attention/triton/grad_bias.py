"""The gradient of a bias that heads, batch entries or queries share: summed over those in a fixed order."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from mmkernels.ops.attention.triton.arguments import Problem, Rows, SplitStrides, Strides
from mmkernels.ops.attention.triton.scores import keep_pairs, load_gate, load_lse, load_spans, masked_scores
from mmkernels.ops.attention.triton.tiles import dot_keys, load_halves, row_offsets, row_places
from mmkernels.ops.common.triton.constants import INFINITY


class GradBiasStrides(NamedTuple):
    query: Strides
    key: Strides
    value: Strides
    grad_out: Strides
    grad_bias: SplitStrides


@triton.jit
def grad_bias_kernel(
    query, key, value, grad_out, lse, delta, grad_bias, masks, gate, dropout, strides, sizes, sums, scale, splits,
    GROUP: tl.constexpr, NEGATE: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr, SUM_ROWS: tl.constexpr,
):  # fmt: skip
    """Computes one tile of the bias's gradient, summed over the tiles of scores that share it; see `BiasSums`.

    Grid: (key tiles x the bias's query tiles x its batch x heads, splits). SUM_ROWS: all queries share the bias, so
    that it is a row of keys.
    """
    k_len = sizes.k_len
    key_tiles = tl.cdiv(k_len, BLOCK_K)
    first = (tl.program_id(0) % key_tiles) * BLOCK_K
    tile = tl.program_id(0) // key_tiles % sums.tiles_of_bias
    entry = tl.program_id(0) // key_tiles // sums.tiles_of_bias
    bias_batch, bias_head = entry // sums.heads_of_bias, entry % sums.heads_of_bias
    split = tl.program_id(1)
    j = first + tl.arange(0, BLOCK_K)
    total = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    count = sums.batch * sums.heads * sums.tiles
    share = tl.cdiv(count, splits)
    for n in range(split * share, tl.minimum((split + 1) * share, count)):
        i = (tile + n // (sums.heads * sums.batch)) * BLOCK_Q + tl.arange(0, BLOCK_Q)
        head = bias_head + n % sums.heads
        batch = bias_batch + (n // sums.heads) % sums.batch
        rows = Rows(batch + i * 0, head + i * 0, i, i < sizes.q_len)
        spans = load_spans(masks, rows, k_len)
        if (tl.min(spans.start, 0) < first + BLOCK_K) & (tl.max(spans.end, 0) > first):
            problem = Problem(entry, batch, head, head // GROUP)
            offsets = row_offsets(rows, strides.query, UNIT)
            q = load_halves(query, offsets, rows.live, strides.query.column, DIM)
            dots, _ = dot_keys(q, key, problem, first, strides.key, k_len, DIM, UNIT, BLOCK_K, False, False, PRECISION)
            if NEGATE:
                dots = -dots
            scores, _ = masked_scores(dots, masks, rows, spans, j, scale, 0)
            places = row_places(rows, sizes)
            row_lse = load_lse(lse, places, rows.live)
            weights = tl.where(scores == -INFINITY, 0.0, tl.exp2(scores - row_lse[:, None]))
            offsets = row_offsets(rows, strides.grad_out, UNIT)
            do = load_halves(grad_out, offsets, rows.live, strides.grad_out.column, VALUE_DIM)
            grad, _ = dot_keys(
                do, value, problem, first, strides.value, k_len, VALUE_DIM, UNIT, BLOCK_K, False, False, PRECISION
            )
            if dropout is not None:
                grad = tl.where(keep_pairs(dropout, rows, first, BLOCK_K), grad * dropout.scale, 0.0)
            row_delta = tl.load(delta + places, mask=rows.live, other=0.0)
            grad = weights * (grad * load_gate(gate, rows)[:, None] - row_delta[:, None])
            total += tl.where(weights == 0, 0.0, grad)  # a hidden key's may be NaN
    start = split.to(tl.int64) * strides.grad_bias.split + bias_batch.to(tl.int64) * strides.grad_bias.batch
    start += bias_head.to(tl.int64) * strides.grad_bias.head
    places = grad_bias + start + j.to(tl.int64) * strides.grad_bias.column
    if SUM_ROWS:
        tl.store(places, tl.sum(total, 0).to(grad_bias.dtype.element_ty), mask=j < k_len)
    else:
        i = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
        inside = (i < sizes.q_len)[:, None] & (j < k_len)[None, :]
        places = places[None, :] + i.to(tl.int64)[:, None] * strides.grad_bias.row
        tl.store(places, total.to(grad_bias.dtype.element_ty), mask=inside)
