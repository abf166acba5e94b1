"""The floor of co-attention's scores: the largest score of a call less the clamp, if some score may be below it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.ops.attention.co_attention.record import Arguments
from mmkernels.ops.attention.co_attention.triton.calls import CoCall
from mmkernels.ops.attention.co_attention.triton.sides import part_at, rows_of
from mmkernels.ops.attention.triton.scores import LOWEST_BIAS
from mmkernels.ops.attention.triton.tiles import dot_keys, load_halves, row_offsets
from mmkernels.ops.common.triton.constants import INFINITY
from mmkernels.runtime.triton import launch


@triton.jit
def largest_score_kernel(
    a, b, masks, spread, largest, strides_a, strides_b, sizes, scale, clamp,
    DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Stores the largest finite score of one tile of a's rows, hidden pairs too; -inf if `spread` is within the clamp.

    Grid: (row tiles x problems,).
    """
    part = part_at(tl.program_id(0), sizes, 1, BLOCK_Q)
    rows = rows_of(part.tile * BLOCK_Q + tl.arange(0, BLOCK_Q), part.problem, sizes.q_len)
    top = tl.full([BLOCK_Q], -INFINITY, tl.float32)
    tiles = tl.cdiv(sizes.k_len, BLOCK_K)
    if tl.load(spread) <= clamp:
        tiles = tiles * 0
    q = load_halves(a, row_offsets(rows, strides_a.x, UNIT), rows.live, strides_a.x.column, DIM)
    for m in range(0, tiles):
        first = m * BLOCK_K
        dots, _ = dot_keys(
            q, b, part.problem, first, strides_b.x, sizes.k_len, DIM, UNIT, BLOCK_K, False, False, PRECISION
        )
        j = first + tl.arange(0, BLOCK_K)
        inside = rows.live[:, None] & (j < sizes.k_len)[None, :]
        scores = dots * scale
        if masks.bias is not None:
            places = masks.bias + part.problem.batch.to(tl.int64) * masks.bias_batch
            places += part.problem.head.to(tl.int64) * masks.bias_head
            places += rows.query.to(tl.int64)[:, None] * masks.bias_row + j.to(tl.int64)[None, :] * masks.bias_column
            bias = tl.load(places, mask=inside, other=0.0).to(tl.float32)
            scores += bias
            inside = inside & (bias >= LOWEST_BIAS)
        counts = inside & (tl.abs(scores) < INFINITY)
        top = tl.maximum(top, tl.max(tl.where(counts, scores, -INFINITY), 1))
    tl.store(largest + tl.program_id(0), tl.max(top, 0))


def find_floor(call: CoCall, args: Arguments) -> Tensor:
    """Returns what lower scores are raised to, float32 without a dim; -inf where no score can be lower.

    No value is read by the host: the kernel's programs end at once where the scores' spread is within the clamp.
    """
    if not args.clamp or args.a.numel() == 0 or args.b.numel() == 0:
        return args.a.new_full((), -torch.inf, dtype=torch.float32)
    plan, (a, b) = call.config(call.forward_kernel), call.sides
    spread = _spread(args)
    largest = spread.new_empty(a.programs(plan))
    launch(
        largest_score_kernel, (a.programs(plan),), plan,
        args.a, args.b, call.masks, spread, largest, a.strides, b.strides, a.sizes, args.scale, args.clamp,
        DIM=call.dim, BLOCK_Q=plan.block_q, BLOCK_K=plan.block_k, PRECISION=call.constants["PRECISION"], UNIT=call.unit,
    )  # fmt: skip
    return largest.amax() - args.clamp


def _spread(args: Arguments) -> Tensor:
    """Returns what the difference of two scores does not exceed, by the inequality of Cauchy and Schwarz."""
    norms = [torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).amax() for x in (args.a, args.b)]
    spread = 2 * abs(args.scale) * norms[0] * norms[1]
    if args.bias is not None and args.bias.numel() > 0:
        own = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in args.bias.stride())
        low, high = torch.aminmax(args.bias[own])  # of what it has in memory, without a copy
        spread = spread + (high.float() - low.float())
    return spread
