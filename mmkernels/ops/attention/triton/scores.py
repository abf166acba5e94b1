"""What the Triton attention kernels share: the scores of a tile, its mask, what is not finite in it, dropout, gate.

Scores are in base 2: scaled by log2(e), their softmax takes ``exp2``. A tile of scores is [rows, keys], or [keys, rows]
where keys are what a program sums for; ROW_AXIS is the axis of the rows, 0 or 1.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mmkernels.ops.attention.triton.arguments import Halves, Rows, Spans, Strides
from mmkernels.ops.attention.triton.tiles import row_offsets
from mmkernels.ops.common.triton.constants import INFINITY, LOG2E

# Stands for a visible score of -inf, so that a row which sees nothing else is told from one that sees nothing.
LOWEST = tl.constexpr(-3.0e38)
# A bias below this is taken for it: in base 2 it stays finite, and above `LOWEST`. Models write "hidden" as the lowest
# finite number.
LOWEST_BIAS = tl.constexpr(-2.0e38)

# What is visible.


@triton.jit
def load_spans(masks, rows, k_len):
    """Returns the `Spans` of rows; from k_len to 0 for a row that sees nothing."""
    start = tl.zeros_like(rows.query)
    end = start + k_len
    if masks.start is not None:
        batch, query = rows.batch.to(tl.int64), rows.query.to(tl.int64)
        places = masks.start + batch * masks.start_batch + query * masks.start_row
        start = tl.load(places, mask=rows.live, other=0)
        places = masks.end + batch * masks.end_batch + query * masks.end_row
        end = tl.load(places, mask=rows.live, other=0)
        start, end = tl.maximum(start, 0), tl.minimum(end, k_len)
    sees = rows.live & (start < end)
    spans = Spans(tl.where(sees, start, k_len), tl.where(sees, end, 0))
    return spans


@triton.jit
def visible_pairs(masks, rows, spans, j, ROW_AXIS: tl.constexpr):
    """Returns whether each row sees each key j, by spans, key_valid and dense."""
    start, end = tl.expand_dims(spans.start, 1 - ROW_AXIS), tl.expand_dims(spans.end, 1 - ROW_AXIS)
    key = tl.expand_dims(j, ROW_AXIS)
    visible = (key >= start) & (key < end)
    if masks.key_valid is not None:
        batch = tl.expand_dims(rows.batch, 1 - ROW_AXIS).to(tl.int64)
        places = masks.key_valid + batch * masks.key_valid_batch + key.to(tl.int64) * masks.key_valid_key
        visible = visible & (tl.load(places, mask=visible, other=0) != 0)
    if masks.dense is not None:
        strides = Strides(masks.dense_batch, masks.dense_head, masks.dense_row, masks.dense_column)
        places = masks.dense + line_offsets(rows, strides, ROW_AXIS) + key.to(tl.int64) * masks.dense_column
        visible = visible & (tl.load(places, mask=visible, other=0) != 0)
    return visible


@triton.jit
def line_offsets(rows, strides, ROW_AXIS: tl.constexpr):
    """Returns where each row's line of a tensor [B, Hq, Lq, Lk] begins, to be broadcast over keys."""
    rows = Rows(
        tl.expand_dims(rows.batch, 1 - ROW_AXIS), tl.expand_dims(rows.head, 1 - ROW_AXIS),
        tl.expand_dims(rows.query, 1 - ROW_AXIS), None,
    )  # fmt: skip
    return row_offsets(rows, strides)


@triton.jit
def masked_scores(dots, masks, rows, spans, j, scale, ROW_AXIS: tl.constexpr):
    """Returns the scores of inner products, -inf where hidden; and what is visible."""
    visible = visible_pairs(masks, rows, spans, j, ROW_AXIS)
    scores = dots * scale
    if masks.bias is not None:
        strides = Strides(masks.bias_batch, masks.bias_head, masks.bias_row, masks.bias_column)
        offsets = line_offsets(rows, strides, ROW_AXIS)
        offsets += tl.expand_dims(j, ROW_AXIS).to(tl.int64) * masks.bias_column
        bias = tl.load(masks.bias + offsets, mask=visible, other=-INFINITY).to(tl.float32)
        visible = visible & (bias != -INFINITY)
        scores += tl.where(bias < LOWEST_BIAS, LOWEST_BIAS, bias) * LOG2E
    return tl.where(visible, tl.where(scores == -INFINITY, LOWEST, scores), -INFINITY), visible


@triton.jit
def load_lse(lse, places, live):
    """Returns log-sum-exps in base 2; 0 for a row that sees nothing, whose scores are -inf."""
    x = tl.load(lse + places, mask=live, other=0.0) * LOG2E
    return tl.where(x == -INFINITY, 0.0, x)


# What is not finite. A NaN or inf must reach the rows that see it and no others, and 0 * NaN is NaN. So partial tiles
# multiply with zeros in place of what is not finite, and note that; where it happened, which is rare, a second pass
# adds back what each row sees. That pass comes last, so that the loops before it hold no registers for it.


@triton.jit
def finite_or_zero(x):
    """Returns x with 0 for NaN and inf."""
    return tl.where(tl.abs(x.to(tl.float32)) < INFINITY, x, 0.0).to(x.dtype)


@triton.jit
def rows_non_finite(x):
    """Returns 1 for each row of x that holds NaN or inf, else 0."""
    return tl.max(tl.where(tl.abs(x.to(tl.float32)) < INFINITY, 0, 1), 1)


@triton.jit
def zero_non_finite(x, DIM: tl.constexpr):
    """Returns the halves x with 0 for NaN and inf."""
    first = finite_or_zero(x.first)
    second = first
    if DIM.second > 0:
        second = finite_or_zero(x.second)
    halves = Halves(first, second)
    return halves


@triton.jit
def note_non_finite(noted, x, DIM: tl.constexpr):
    """Returns `noted`, with 1 for each row of the halves x that holds NaN or inf."""
    noted = tl.maximum(noted, rows_non_finite(x.first))
    if DIM.second > 0:
        noted = tl.maximum(noted, rows_non_finite(x.second))
    return noted


@triton.jit
def add_non_finite(total, x, visible):
    """Returns `total` plus the NaN and inf of x that are visible to each row."""
    wide = x.to(tl.float32)
    # One product counts what is visible to each row in each channel: +inf by 1, -inf by 2^-12, NaN by 2^12.
    kind = tl.where(wide == INFINITY, 1.0, tl.where(wide == -INFINITY, 1 / 4096, 0.0))
    counts = tl.dot(visible.to(x.dtype), tl.where(wide == wide, kind, 4096.0).to(x.dtype))
    above = tl.floor(counts)
    up = tl.where(above > 0, INFINITY, 0.0)
    return total + up + tl.where((counts > above) | (counts >= 4096.0), -INFINITY, 0.0)


@triton.jit
def restore_non_finite(total, x, visible, DIM: tl.constexpr):
    """Returns the halves `total` plus the NaN and inf of x that each row sees, which `zero_non_finite` removed."""
    first = add_non_finite(total.first, x.first, visible)
    second = total.second
    if DIM.second > 0:
        second = add_non_finite(second, x.second, visible)
    halves = Halves(first, second)
    return halves


@triton.jit
def opaque_zero(pointer):
    """Returns a 0 that the compiler cannot fold: what depends on it is computed again, not kept in registers."""
    byte = pointer.to(tl.pointer_type(tl.int8), bitcast=True)
    return tl.where(tl.load(byte, volatile=True) == tl.load(byte, volatile=True), 0, 1)


# Dropout and gate.


@triton.jit
def keep_pairs(dropout, rows, first, BLOCK: tl.constexpr):
    """Returns whether dropout keeps ``[rows, BLOCK]`` pairs from key `first` on, as in philox.py.

    first and BLOCK are multiples of 4.
    """
    quad = first // 4 + tl.arange(0, BLOCK // 4)
    zero = tl.zeros([rows.batch.shape[0], BLOCK // 4], tl.uint32)
    w0, w1, w2, w3 = tl.philox(
        tl.load(dropout.seed), zero + quad[None, :].to(tl.uint32), zero + rows.query[:, None].to(tl.uint32),
        zero + rows.head[:, None].to(tl.uint32), zero + rows.batch[:, None].to(tl.uint32),
    )  # fmt: skip
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    return words.to(tl.uint32, bitcast=True).to(tl.int64) >= dropout.threshold


@triton.jit
def tanh(x):
    """Returns the tanh, near 0 by its series: ``1 - 2 / (1 + exp(2 x))`` would cancel there."""
    y = x * x
    near = x * (1 + y * (-1 / 3 + y * (2 / 15 + y * (-17 / 315 + y * (62 / 2835)))))
    return tl.where(tl.abs(x) < 0.35, near, 1 - 2 / (1 + tl.exp2(x * (2 * LOG2E))))


@triton.jit
def load_gate(gate, rows):
    """Returns tanh(gate) of each row's head; 1 without a gate."""
    factor = rows.head * 0.0 + 1.0
    if gate is not None:
        factor = tanh(tl.load(gate.data + rows.head * gate.stride, mask=rows.live, other=0.0).to(tl.float32))
    return factor
