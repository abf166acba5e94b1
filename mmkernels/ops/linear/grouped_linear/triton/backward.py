"""Gradients of grouped products in Triton: of x the product with the transposed weight, of a weight its rows' sum.

Three products in a training step; each group's sum is made by one program a tile, in the order of the rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from mmkernels.ops.common.results import or_empty
from mmkernels.ops.common.triton.launch import ceil_div, precision
from mmkernels.ops.linear.grouped_linear.triton.forward import OP, product, step_of
from mmkernels.ops.linear.grouped_linear.triton.tiles import groups_of
from mmkernels.plan import Config
from mmkernels.runtime.triton import launch
from mmkernels.runtime.tuning import config

_BIAS = Config(16, 256, 4, 1)


class FlowStrides(NamedTuple):
    """In elements, of what flows back and of x: between rows, and between their outputs or channels."""

    flow_row: Any
    output: Any
    row: Any
    channel: Any


@triton.jit
def weight_gradient_kernel(
    flow, x, of_weight, bounds, strides, channels, outputs,
    PRECISION: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Store the gradient of each group's weight. Grid: (groups * tiles of outputs * tiles of channels,).

    bounds: int64, where each group begins, see `tiles.Groups`.
    of_weight: [G, outputs, channels].
    """
    across = tl.cdiv(channels, BLOCK_K)
    tiles = tl.cdiv(outputs, BLOCK_Q) * across
    group, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    o = tile // across * BLOCK_Q + tl.arange(0, BLOCK_Q)
    c = tile % across * BLOCK_K + tl.arange(0, BLOCK_K)
    begin, end = tl.load(bounds + group), tl.load(bounds + group + 1)
    columns = flow + o.to(tl.int64)[None, :] * strides.output
    of_x = x + c.to(tl.int64)[None, :] * strides.channel
    is_output, is_channel = (o < outputs)[None, :], (c < channels)[None, :]
    z = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    for row in range(begin, end, STEP):
        i = (row + tl.arange(0, STEP)).to(tl.int64)
        inside = (i < end)[:, None]
        a = tl.load(columns + i[:, None] * strides.flow_row, mask=inside & is_output, other=0.0)
        b = tl.load(of_x + i[:, None] * strides.row, mask=inside & is_channel, other=0.0)
        z = tl.dot(tl.trans(a), b, z, input_precision=PRECISION)
    at = of_weight + (group.to(tl.int64) * outputs + o)[:, None] * channels + c[None, :]
    tl.store(at, z.to(of_weight.dtype.element_ty), mask=(o < outputs)[:, None] & (c < channels)[None, :])


@triton.jit
def bias_gradient_kernel(flow, of_bias, bounds, strides, outputs, ROWS: tl.constexpr, OUTPUTS: tl.constexpr):
    """Store the sum of what flows back to each group's rows. Grid: (groups, tiles of outputs)."""
    group = tl.program_id(0).to(tl.int64)
    o = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    begin, end = tl.load(bounds + group), tl.load(bounds + group + 1)
    total = tl.zeros([OUTPUTS], tl.float32)
    for row in range(begin, end, ROWS):
        i = (row + tl.arange(0, ROWS)).to(tl.int64)
        at = flow + i[:, None] * strides.flow_row + o.to(tl.int64)[None, :] * strides.output
        inside = (i < end)[:, None] & (o < outputs)[None, :]
        total += tl.sum(tl.load(at, mask=inside, other=0.0).to(tl.float32), 0)
    tl.store(of_bias + group * outputs + o, total.to(of_bias.dtype.element_ty), mask=o < outputs)


def backward(args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of x, weight and bias, empty where none is wanted."""
    x, weight, flow, lengths = args.x, args.weight, args.grad_y, args.lengths
    of_x = of_weight = of_bias = None
    if args.need_x:
        of_x = product(flow, weight.mT, lengths, None)
    if args.need_weight or args.need_bias:
        bounds = groups_of(lengths, x.shape[0], _BIAS.block_q).bounds
        strides = FlowStrides(*flow.stride(), *x.stride())
    if args.need_weight:
        of_weight = _weight_gradient(flow, x, weight, bounds, strides)
    if args.need_bias:
        number, outputs, _ = weight.shape
        of_bias = weight.new_empty(number, outputs)
        launch(
            bias_gradient_kernel, (number, ceil_div(outputs, _BIAS.block_k)), _BIAS,
            flow, of_bias, bounds, strides, outputs, ROWS=_BIAS.block_q, OUTPUTS=_BIAS.block_k,
        )  # fmt: skip
    return or_empty(of_x, x), or_empty(of_weight, x), or_empty(of_bias, x)


def _weight_gradient(flow: Tensor, x: Tensor, weight: Tensor, bounds: Tensor, strides: FlowStrides) -> Tensor:
    number, outputs, channels = weight.shape
    of_weight = weight.new_empty(weight.shape)
    plan = config(OP, "weights", x.device, x.dtype, channels)
    launch(
        weight_gradient_kernel, (number * ceil_div(outputs, plan.block_q) * ceil_div(channels, plan.block_k),), plan,
        flow, x, of_weight, bounds, strides, channels, outputs,
        PRECISION=precision(x.dtype), BLOCK_Q=plan.block_q, BLOCK_K=plan.block_k, STEP=step_of(x, x.shape[0]),
    )  # fmt: skip
    return of_weight
