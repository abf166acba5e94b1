"""The gradient of a bias that heads, batch entries or positions share: summed over those in a fixed order."""

from __future__ import annotations

import triton
import triton.language as tl

from mmkernels.ops.attention.co_attention.triton.gradients import of_scores, probabilities
from mmkernels.ops.attention.co_attention.triton.sides import below_floor, kept, raised, rows_of, valid_at
from mmkernels.ops.attention.triton.arguments import Halves, Problem
from mmkernels.ops.attention.triton.scores import load_lse, load_spans, masked_scores
from mmkernels.ops.attention.triton.tiles import dot_halves, dot_keys, load_halves, row_offsets, row_places
from mmkernels.ops.common.triton.constants import INFINITY


@triton.jit
def co_grad_bias_kernel(
    a, b, value_a, value_b, valid_a, valid_b, grad_out_a, grad_out_b, lse_a, lse_b, delta_a, delta_b, grad_bias, masks,
    dropout_a, dropout_b, floor, of_a, of_b, bias_strides, sizes_a, sizes_b, sums, scale, splits,
    NEGATE: tl.constexpr, DIM: tl.constexpr, DIM_A: tl.constexpr, DIM_B: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr, SUM_ROWS: tl.constexpr,
):  # fmt: skip
    """Computes one tile of the bias's gradient, summed over the tiles of scores that share it; see `BiasSums`.

    Grid: (b tiles x the bias's a tiles x its batch x heads, splits). SUM_ROWS: all of a shares the bias, so that it is
    a row of b's positions.
    """
    b_len = sizes_a.k_len
    b_tiles = tl.cdiv(b_len, BLOCK_K)
    first = (tl.program_id(0) % b_tiles) * BLOCK_K
    tile = tl.program_id(0) // b_tiles % sums.tiles_of_bias
    entry = tl.program_id(0) // b_tiles // sums.tiles_of_bias
    bias_batch, bias_head = entry // sums.heads_of_bias, entry % sums.heads_of_bias
    split = tl.program_id(1)
    j = first + tl.arange(0, BLOCK_K)
    total = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    count = sums.batch * sums.heads * sums.tiles
    share = tl.cdiv(count, splits)
    for n in range(split * share, tl.minimum((split + 1) * share, count)):
        row_tile = tile + n // (sums.heads * sums.batch)
        head = bias_head + n % sums.heads
        batch = bias_batch + (n // sums.heads) % sums.batch
        problem = Problem(entry, batch, head, head)
        rows = rows_of(row_tile * BLOCK_Q + tl.arange(0, BLOCK_Q), problem, sizes_a.q_len)
        columns = rows_of(j, problem, b_len)
        spans = load_spans(masks, rows, b_len)
        if (tl.min(spans.start, 0) < first + BLOCK_K) & (tl.max(spans.end, 0) > first):
            x = load_halves(a, row_offsets(rows, of_a.inputs.x, UNIT), rows.live, of_a.inputs.x.column, DIM)
            if NEGATE:
                x = Halves(-x.first, -x.second)
            dots, _ = dot_keys(x, b, problem, first, of_b.inputs.x, b_len, DIM, UNIT, BLOCK_K, False, False, PRECISION)
            scores, _ = masked_scores(dots, masks, rows, spans, j, scale, 0)
            low = dots > INFINITY
            if floor is not None:
                low = below_floor(scores, floor)
                scores = raised(scores, floor)
            a_places, b_places = row_places(rows, sizes_a), row_places(columns, sizes_b)
            a_seen = valid_at(valid_a, of_a.inputs.valid, problem, rows.query, sizes_a.q_len)
            b_seen = valid_at(valid_b, of_b.inputs.valid, problem, j, b_len)
            by_rows = probabilities(
                tl.where(b_seen[None, :], scores, -INFINITY), load_lse(lse_a, a_places, rows.live)[:, None]
            )
            by_columns = probabilities(
                tl.where(a_seen[:, None], scores, -INFINITY), load_lse(lse_b, b_places, columns.live)[None, :]
            )
            offsets = row_offsets(rows, of_a.grad_out, UNIT)
            do = load_halves(grad_out_a, offsets, rows.live, of_a.grad_out.column, DIM_B)
            grad, _ = dot_keys(
                do, value_b, problem, first, of_b.inputs.value, b_len, DIM_B, UNIT, BLOCK_K, False, False, PRECISION
            )
            if dropout_a is not None:
                keep = kept(dropout_a, rows, row_tile * BLOCK_Q, first, problem, sizes_a, 0, BLOCK_Q, BLOCK_K)
                grad = tl.where(keep, grad * dropout_a.scale, 0.0)
            a_delta = tl.load(delta_a + a_places, mask=rows.live, other=0.0)
            part = of_scores(by_rows, grad, a_delta[:, None])
            offsets = row_offsets(columns, of_b.grad_out, UNIT)
            do = load_halves(grad_out_b, offsets, columns.live, of_b.grad_out.column, DIM_A)
            offsets = row_offsets(rows, of_a.inputs.value, UNIT)
            value = load_halves(value_a, offsets, rows.live, of_a.inputs.value.column, DIM_A)
            grad = dot_halves(value, do, DIM_A, PRECISION)
            if dropout_b is not None:
                keep = kept(dropout_b, rows, row_tile * BLOCK_Q, first, problem, sizes_a, 0, BLOCK_Q, BLOCK_K)
                grad = tl.where(keep, grad * dropout_b.scale, 0.0)
            b_delta = tl.load(delta_b + b_places, mask=columns.live, other=0.0)
            part += of_scores(by_columns, grad, b_delta[None, :])
            total += tl.where(low, 0.0, part)
    start = split.to(tl.int64) * bias_strides.split + bias_batch.to(tl.int64) * bias_strides.batch
    start += bias_head.to(tl.int64) * bias_strides.head
    places = grad_bias + start + j.to(tl.int64) * bias_strides.column
    if SUM_ROWS:
        tl.store(places, tl.sum(total, 0).to(grad_bias.dtype.element_ty), mask=j < b_len)
    else:
        i = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
        inside = (i < sizes_a.q_len)[:, None] & (j < b_len)[None, :]
        places = places[None, :] + i.to(tl.int64)[:, None] * bias_strides.row
        tl.store(places, total.to(grad_bias.dtype.element_ty), mask=inside)
