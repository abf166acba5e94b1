"""Grouped products in Triton.

The least time on an H200: of 16 tokens that each go through 6 of 64 experts, some 50 experts are chosen; their weights,
2816 x 2048 in bfloat16, are 577 MB, read in 120 us at 4.8 TB/s. Of 4,096 tokens the product takes 283 GFLOP, or 359 us
at 790 TFLOP/s.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from mmkernels.ops.common.triton.launch import ceil_div, precision
from mmkernels.ops.linear.grouped_linear.spec import Arguments
from mmkernels.ops.linear.grouped_linear.triton.tiles import groups_of, place_of_tile, search_steps, tiles_of
from mmkernels.ops.linear.triton.call import STEP_BYTES
from mmkernels.plan import Config
from mmkernels.runtime.triton import launch
from mmkernels.runtime.tuning import config

OP = "grouped_linear"
_FEW, _SOME = 16, 64  # rows a group on average, up to which its tiles are so high


class Strides(NamedTuple):
    """In elements: between rows and channels of x, and between groups, outputs and channels of the weight."""

    row: Any
    channel: Any
    group: Any
    output: Any
    weight_channel: Any


@triton.jit
def product_kernel(
    x, weight, bias, y, groups, strides, channels, outputs,
    EVEN: tl.constexpr, PRECISION: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, STEP: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    """Store each group's rows times its weight, 0 in rows behind. Grid: (most tiles down * tiles across,).

    Tiles across are neighbours: the next tile down is of the same group, whose weight is in the cache by then.

    bias: [G, outputs], contiguous; None: no bias.
    y: [rows, outputs].
    EVEN: whether STEP divides the channels.
    """
    across = tl.cdiv(outputs, BLOCK_K)
    place = place_of_tile(tl.program_id(0) // across, groups, BLOCK_Q, STEPS)
    if place.group <= groups.number:
        i = place.row + tl.arange(0, BLOCK_Q)
        j = tl.program_id(0) % across * BLOCK_K + tl.arange(0, BLOCK_K)
        z = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
        if place.group < groups.number:
            # Past the end the last row is read again, and not stored. Outputs are masked: a weight may be contiguous in
            # them, which the compiler does not see behind a minimum.
            rows = x + tl.minimum(i, place.end - 1)[:, None] * strides.row
            group = place.group.to(tl.int64)
            columns = weight + group * strides.group + j.to(tl.int64)[None, :] * strides.output
            is_output = (j < outputs)[None, :]
            for channel in range(0, channels, STEP):
                c = channel + tl.arange(0, STEP)
                at = rows + c.to(tl.int64)[None, :] * strides.channel
                weight_at = columns + c.to(tl.int64)[:, None] * strides.weight_channel
                if EVEN:
                    a, b = tl.load(at), tl.load(weight_at, mask=is_output, other=0.0)
                else:
                    inside = c < channels
                    a = tl.load(at, mask=inside[None, :], other=0.0)
                    b = tl.load(weight_at, mask=is_output & inside[:, None], other=0.0)
                z = tl.dot(a, b, z, input_precision=PRECISION)
            if bias is not None:
                z += tl.load(bias + group * outputs + j, mask=j < outputs, other=0.0).to(tl.float32)[None, :]
        inside = (i < place.end)[:, None] & (j < outputs)[None, :]
        tl.store(y + i[:, None] * outputs + j[None, :], z.to(y.dtype.element_ty), mask=inside)


def forward(args: Arguments) -> Tensor:
    """Returns [R, O]."""
    return product(args.x, args.weight, args.lengths, args.bias)


def product(x: Tensor, weight: Tensor, lengths: Tensor, bias: Tensor | None) -> Tensor:
    """Returns each group's rows [R, C] times its weight [G, O, C]; both strided as they like."""
    (rows, channels), (number, outputs, _) = x.shape, weight.shape
    y = x.new_empty(rows, outputs)
    if rows == 0:
        return y
    plan = _config(x, number)
    step = step_of(x, channels)
    launch(
        product_kernel, (tiles_of(rows, number, plan.block_q) * ceil_div(outputs, plan.block_k),), plan,
        x, weight, None if bias is None else bias.contiguous(), y, groups_of(lengths, rows, plan.block_q),
        Strides(*x.stride(), *weight.stride()), channels, outputs,
        EVEN=channels % step == 0, PRECISION=precision(x.dtype), BLOCK_Q=plan.block_q, BLOCK_K=plan.block_k, STEP=step,
        STEPS=search_steps(number),
    )  # fmt: skip
    return y


def step_of(x: Tensor, size: int) -> int:
    """Returns how much of what is summed over, of which there is so much, one step of a product takes."""
    return min(STEP_BYTES // x.element_size(), max(16, triton.next_power_of_2(size)))


def _config(x: Tensor, number: int) -> Config:
    """By the rows of a group on average: how they are divided, only the device knows."""
    rows, channels = x.shape
    name = "few" if rows <= _FEW * number else "some" if rows <= _SOME * number else "many"
    return config(OP, name, x.device, x.dtype, channels)
