"""The gradients of one side's inputs, by tiles of its rows, from both directions at once."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from mmkernels.ops.attention.co_attention.triton.sides import (
    SideStrides,
    below_floor,
    kept,
    part_at,
    raised,
    rows_of,
    share_of,
    side_scores,
    tile_of,
    valid_at,
    walk_over_other,
)
from mmkernels.ops.attention.triton.arguments import Halves, SplitStrides, Strides
from mmkernels.ops.attention.triton.scores import (
    load_lse,
    note_non_finite,
    opaque_zero,
    restore_non_finite,
    zero_non_finite,
)
from mmkernels.ops.attention.triton.tiles import (
    add_halves,
    add_product,
    dot_halves,
    dot_keys,
    load_halves,
    load_key_halves,
    row_offsets,
    row_places,
    scale_halves,
    store_halves,
    zero_halves,
    zero_tile,
)
from mmkernels.ops.common.triton.constants import INFINITY


class FlowStrides(NamedTuple):
    """The strides of one side's inputs, of what flows back to its output, and of its gradients in parts."""

    inputs: SideStrides
    grad_out: Strides
    grad_x: SplitStrides
    grad_value: SplitStrides


class OwnRows(NamedTuple):
    """What a tile of own rows brings: inputs, what flows back, log-sum-exp (base 2), delta, what the other sees."""

    x: Any
    value: Any
    grad_out: Any
    lse: Any
    delta: Any
    valid: Any


class OwnGradients(NamedTuple):
    """The gradients of a tile of own rows, and each row's sum of the scores' gradient."""

    x: Any
    value: Any
    sums: Any


@triton.jit
def probabilities(scores, lse):
    """Returns the softmax of scores; lse is of their rows or columns, to be broadcast."""
    return tl.where(scores == -INFINITY, 0.0, tl.exp2(scores - lse))


@triton.jit
def of_scores(weights, grad, delta):
    """Returns what one direction gives to the gradient of the scores; a hidden pair's may be NaN."""
    return tl.where(weights == 0, 0.0, weights * (grad - delta))


@triton.jit
def gradient_tile(
    grads, non_finite, own, other, other_value, other_grad_out, other_valid, other_lse, other_delta, grad_bias, masks,
    own_dropout, other_dropout, floor, strides, bias_strides, rows, own_first, first, problem, sizes, other_sizes,
    scale,
    SIDE: tl.constexpr, MASKED: tl.constexpr, NEED_X: tl.constexpr, NEED_VALUE: tl.constexpr, NEED_SUMS: tl.constexpr,
    DIM: tl.constexpr, OWN_DIM: tl.constexpr, OTHER_DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Adds one tile of the other side to the gradients of own rows. `strides` are the other side's."""
    others = rows_of(first + tl.arange(0, BLOCK_K), problem, sizes.k_len)
    dots, y = dot_keys(
        own.x, other, problem, first, strides.inputs.x, sizes.k_len, DIM, UNIT, BLOCK_K, not MASKED, False, PRECISION
    )
    places = row_places(others, other_sizes)
    column_lse = load_lse(other_lse, places, others.live)
    column_delta = tl.load(other_delta + places, mask=others.live, other=0.0)
    low = zero_tile(BLOCK_Q, BLOCK_K) > 0
    if MASKED:
        scores, _ = side_scores(dots, masks, rows, first, problem, sizes, scale, SIDE, BLOCK_K)
        if floor is not None:
            low = below_floor(scores, floor)
            scores = raised(scores, floor)
        seen = valid_at(other_valid, strides.inputs.valid, problem, others.query, sizes.k_len)
        by_rows = probabilities(tl.where(seen[None, :], scores, -INFINITY), own.lse[:, None])
        by_columns = probabilities(tl.where(own.valid[:, None], scores, -INFINITY), column_lse[None, :])
        y = zero_non_finite(y, DIM)
    else:
        by_rows = tl.exp2(dots * scale - own.lse[:, None])
        by_columns = tl.exp2(dots * scale - column_lse[None, :])
    do = load_halves(
        other_grad_out, row_offsets(others, strides.grad_out, UNIT), others.live, strides.grad_out.column, OWN_DIM
    )  # fmt: skip
    if MASKED:  # delta carries what is not finite to the scores' gradient, `restore_value` to the values'
        non_finite = note_non_finite(non_finite, do, OWN_DIM)
        do = zero_non_finite(do, OWN_DIM)
    if own_dropout is not None:
        keep_rows = kept(own_dropout, rows, own_first, first, problem, sizes, SIDE, BLOCK_Q, BLOCK_K)
        keep_columns = kept(other_dropout, rows, own_first, first, problem, sizes, SIDE, BLOCK_Q, BLOCK_K)
    of_x, of_value, sums = grads.x, grads.value, grads.sums
    if NEED_VALUE:
        dropped = by_columns
        if own_dropout is not None:
            dropped = tl.where(keep_columns, by_columns * other_dropout.scale, 0.0)
        of_value = add_product(of_value, dropped.to(do.first.dtype), do, OWN_DIM, PRECISION)
    if NEED_X:
        grad = dot_halves(own.value, do, OWN_DIM, PRECISION)
        if own_dropout is not None:
            grad = tl.where(keep_columns, grad * other_dropout.scale, 0.0)
        total = of_scores(by_columns, grad, column_delta[None, :])
        grad, _ = dot_keys(
            own.grad_out, other_value, problem, first, strides.inputs.value, sizes.k_len, OTHER_DIM, UNIT, BLOCK_K,
            not MASKED, False, PRECISION,
        )  # fmt: skip
        if own_dropout is not None:
            grad = tl.where(keep_rows, grad * own_dropout.scale, 0.0)
        total += of_scores(by_rows, grad, own.delta[:, None])
        if MASKED:
            total = tl.where(low, 0.0, total)
        if grad_bias is not None:
            offsets = row_offsets(rows, bias_strides)[:, None]
            offsets += others.query.to(tl.int64)[None, :] * bias_strides.column
            inside = rows.live[:, None] & others.live[None, :]
            tl.store(grad_bias + offsets, total.to(grad_bias.dtype.element_ty), mask=inside)
        if NEED_SUMS:
            sums += tl.sum(total, 1)
        of_x = add_product(of_x, total.to(y.first.dtype), y, DIM, PRECISION)
    grads = OwnGradients(of_x, of_value, sums)
    return grads, non_finite


@triton.jit
def restore_value(
    grad_value, own, other_grad_out, own_valid, masks, lists, own_strides, strides, part, splits, sizes, walk,
    SIDE: tl.constexpr, OWN_DIM: tl.constexpr, UNIT: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Adds what is not finite in what flows back to the other side's outputs, to the own values that they see."""
    n = part.tile * BLOCK_Q + tl.arange(0, BLOCK_Q) + opaque_zero(own)
    rows = rows_of(n, part.problem, sizes.q_len)
    valid = valid_at(own_valid, own_strides.inputs.valid, part.problem, n, sizes.q_len)
    total = zero_halves(BLOCK_Q, OWN_DIM)
    begin, end = share_of(walk, part.split, splits, True)
    for m in tl.range(begin, end, num_stages=1):
        first = tile_of(walk, lists, m, True, SIDE) * BLOCK_K
        _, visible = side_scores(
            zero_tile(BLOCK_Q, BLOCK_K), masks, rows, first, part.problem, sizes, 1.0, SIDE, BLOCK_K
        )  # fmt: skip
        do = load_key_halves(
            other_grad_out, part.problem, first, strides.grad_out, sizes.k_len, OWN_DIM, UNIT, BLOCK_K, False, False
        )  # fmt: skip
        total = restore_non_finite(total, do, visible & valid[:, None], OWN_DIM)
    offsets = part_offsets(part, rows, own_strides.grad_value)
    add_halves(grad_value, offsets, rows.live, total, own_strides.grad_value.column, OWN_DIM)


@triton.jit
def part_offsets(part, rows, strides):
    """Returns where rows begin in a gradient in parts."""
    return part.split.to(tl.int64) * strides.split + row_offsets(rows, strides)


@triton.jit
def co_gradients_kernel(
    own, other, own_value, other_value, own_valid, other_valid, own_grad_out, other_grad_out, own_lse, other_lse,
    own_delta, other_delta, grad_x, grad_value, grad_bias, sums, masks, lists, own_dropout, other_dropout, floor,
    own_strides, strides, bias_strides, sizes, other_sizes, scale, true_scale, splits,
    SIDE: tl.constexpr, ALL_PARTIAL: tl.constexpr, HIDES: tl.constexpr, NEGATE: tl.constexpr, DIM: tl.constexpr,
    OWN_DIM: tl.constexpr, OTHER_DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Computes the gradients of one tile of own rows from one part of the other side; those of None are not wanted.

    Of a's side these may be the gradient of a bias that nothing shares, and each row's sum of the scores' gradient.
    OWN_DIM and OTHER_DIM are the values' dims. Grid: (row tiles x problems x splits,).
    """
    part = part_at(tl.program_id(0), sizes, splits, BLOCK_Q)
    problem, own_first = part.problem, part.tile * BLOCK_Q
    rows = rows_of(own_first + tl.arange(0, BLOCK_Q), problem, sizes.q_len)
    live, inputs = rows.live, own_strides.inputs
    x = load_halves(own, row_offsets(rows, inputs.x, UNIT), live, inputs.x.column, DIM)
    if NEGATE:
        x = Halves(-x.first, -x.second)
    value = load_halves(own_value, row_offsets(rows, inputs.value, UNIT), live, inputs.value.column, OWN_DIM)
    offsets = row_offsets(rows, own_strides.grad_out, UNIT)
    do = load_halves(own_grad_out, offsets, live, own_strides.grad_out.column, OTHER_DIM)
    places = row_places(rows, sizes)
    mine = OwnRows(
        x, value, do, load_lse(own_lse, places, live), tl.load(own_delta + places, mask=live, other=0.0),
        valid_at(own_valid, inputs.valid, problem, rows.query, sizes.q_len),
    )  # fmt: skip
    grads = OwnGradients(zero_halves(BLOCK_Q, DIM), zero_halves(BLOCK_Q, OWN_DIM), tl.zeros([BLOCK_Q], tl.float32))
    non_finite = tl.zeros([BLOCK_K], tl.int32)
    walk = walk_over_other(lists, masks, rows, part, sizes, SIDE, BLOCK_K, ALL_PARTIAL)
    for MASKED in tl.static_range(2):
        begin, end = share_of(walk, part.split, splits, MASKED)
        for m in range(begin, end):
            first = tile_of(walk, lists, m, MASKED, SIDE) * BLOCK_K
            grads, non_finite = gradient_tile(
                grads, non_finite, mine, other, other_value, other_grad_out, other_valid, other_lse, other_delta,
                grad_bias, masks, own_dropout, other_dropout, floor, strides, bias_strides, rows, own_first, first,
                problem, sizes, other_sizes, scale, SIDE, MASKED,
                grad_x is not None or grad_bias is not None or sums is not None, grad_value is not None,
                sums is not None, DIM, OWN_DIM, OTHER_DIM, BLOCK_Q, BLOCK_K, PRECISION, UNIT,
            )  # fmt: skip
    if grad_x is not None:
        total = scale_halves(grads.x, true_scale, DIM)
        store_halves(grad_x, part_offsets(part, rows, own_strides.grad_x), live, total, own_strides.grad_x.column, DIM)
    if sums is not None:
        tl.store(
            sums + part.split.to(tl.int64) * sizes.batch * sizes.heads * sizes.q_len + places, grads.sums, mask=live
        )
    if grad_value is not None:
        offsets = part_offsets(part, rows, own_strides.grad_value)
        store_halves(grad_value, offsets, live, grads.value, own_strides.grad_value.column, OWN_DIM)
        if HIDES:
            if tl.max(non_finite, 0) > 0:
                restore_value(
                    grad_value, own, other_grad_out, own_valid, masks, lists, own_strides, strides, part, splits, sizes,
                    walk, SIDE, OWN_DIM, UNIT, BLOCK_Q, BLOCK_K,
                )  # fmt: skip
