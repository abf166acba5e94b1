"""Co-attention's backward pass in Triton, without atomics, so that gradients are the same each time.

A launch for a's rows and one for b's each make both directions' probabilities again from the log-sum-exps: together ten
matrix products, where seven would do with atomics. The parts of a split side are added up
afterwards. A bias that something shares gets its gradient from a kernel of its own.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.ops.attention.co_attention.triton.calls import CoCall, Side
from mmkernels.ops.attention.co_attention.triton.grad_bias import co_grad_bias_kernel
from mmkernels.ops.attention.co_attention.triton.gradients import (
    FlowStrides,
    co_gradients_kernel,
)
from mmkernels.ops.attention.co_attention.triton.sides import part_at, rows_of
from mmkernels.ops.attention.triton.arguments import NO_STRIDES, Strides
from mmkernels.ops.attention.triton.bias import BiasSums, count_programs, like, split_strides, sum_of_parts
from mmkernels.ops.attention.triton.call import strides_of
from mmkernels.ops.attention.triton.tiles import load_halves, row_offsets, row_places, sum_of_products
from mmkernels.ops.common.results import or_empty
from mmkernels.ops.common.triton.launch import ceil_div
from mmkernels.runtime.triton import launch
from mmkernels.runtime.tuning import Config

_DELTA = Config(32, 1, 4, 1)


def backward(args: Any) -> tuple[Tensor, ...]:
    """Returns the gradients of a, b, value_a, value_b and bias; an empty tensor where none is wanted."""
    return _Backward(args).run()


@triton.jit
def co_delta_kernel(
    out, grad_out, delta, out_strides, strides, sizes,
    DIM: tl.constexpr, BLOCK: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Stores each row's inner product of its output and what flows back to it, the sum of its P dP.

    Grid: (row tiles x problems,).
    """
    part = part_at(tl.program_id(0), sizes, 1, BLOCK)
    rows = rows_of(part.tile * BLOCK + tl.arange(0, BLOCK), part.problem, sizes.q_len)
    x = load_halves(out, row_offsets(rows, out_strides, UNIT), rows.live, out_strides.column, DIM)
    y = load_halves(grad_out, row_offsets(rows, strides, UNIT), rows.live, strides.column, DIM)
    tl.store(delta + row_places(rows, sizes), sum_of_products(x, y, DIM), mask=rows.live)


class _Flow:
    """One side of a backward call: its inputs, what flows back, its gradients in parts."""

    def __init__(
        self,
        call: CoCall,
        side: Side,
        lse: Tensor,
        out: Tensor,
        grad_out: Tensor,
        needs: tuple[bool, bool],
        splits: int,
    ) -> None:
        self.side, self.splits, self.grad_out = side, splits, grad_out
        self.inputs = side.x, side.value
        self.lse = lse.contiguous()
        self.delta = torch.empty_like(self.lse)
        self.grads = [
            None if not need else
            torch.empty_like(x)[None] if splits == 1 else x.new_empty(splits, *x.shape, dtype=torch.float32)
            for x, need in zip(self.inputs, needs, strict=True)
        ]  # fmt: skip
        unit, channels = call.unit, call.other(side).value_dim
        of_out = strides_of(grad_out, unit)
        self.strides = FlowStrides(side.strides, of_out, *(split_strides(grad) for grad in self.grads))
        launch(
            co_delta_kernel, (side.programs(_DELTA),), _DELTA,
            out, grad_out, self.delta, strides_of(out, unit), of_out, side.sizes,
            DIM=channels, BLOCK=_DELTA.block_q, UNIT=unit,
        )  # fmt: skip

    def gradients(self) -> list[Tensor | None]:
        """Returns the gradients of x and value."""
        return [
            None if grad is None else sum_of_parts(grad, x) for x, grad in zip(self.inputs, self.grads, strict=True)
        ]


class _Backward:
    """One backward call: what its kernels share, and a method for each of them."""

    def __init__(self, args: Any) -> None:
        self.args = args
        self.call = call = CoCall(args, (args.grad_out_a, args.grad_out_b, args.out_a, args.out_b))
        self.plan = call.config("backward" if args.seed is None else "backward_dropout")
        (a, b), splits = call.sides, [call.splits(side, self.plan) for side in call.sides]
        needs_a, needs_b = (args.need_a, args.need_value_a), (args.need_b, args.need_value_b)
        self.a = _Flow(call, a, args.lse_a, args.out_a, args.grad_out_a, needs_a, splits[0])
        self.b = _Flow(call, b, args.lse_b, args.out_b, args.grad_out_b, needs_b, splits[1])
        self.floor = args.floor if args.clamp else None

    def run(self) -> tuple[Tensor, ...]:
        args, bias, a, b = self.args, self.args.bias, self.a, self.b
        need_bias = bias is not None and args.need_bias
        whole = (self.call.batch, self.call.heads, self.call.q_len, self.call.k_len)
        grad_bias = sums = None
        if need_bias and bias.shape == whole:
            grad_bias = torch.zeros_like(bias)
        elif need_bias and bias.shape[3] == 1:  # all of b shares the bias: a row's sum is its gradient
            sums = a.lse.new_empty(a.splits, *a.lse.shape)
        self._side(a, b, grad_bias, sums)
        self._side(b, a, None, None)
        if sums is not None:
            grad_bias = like(sums.sum(0)[..., None], bias)
        elif need_bias and grad_bias is None:
            grad_bias = self._shared_bias(bias)
        (grad_a, grad_value_a), (grad_b, grad_value_b) = a.gradients(), b.gradients()
        grads = (grad_a, grad_b, grad_value_a, grad_value_b, grad_bias)
        return tuple(or_empty(grad, args.grad_out_a) for grad in grads)

    def _side(self, own: _Flow, other: _Flow, grad_bias: Tensor | None, sums: Tensor | None) -> None:
        """Compute the gradients of one side, and with a's side those of the bias."""
        call, plan = self.call, self.plan
        if grad_bias is None and sums is None and all(x is None for x in own.grads):
            return
        of_bias = NO_STRIDES if grad_bias is None else Strides(*grad_bias.stride())
        launch(
            co_gradients_kernel, (own.side.programs(plan) * own.splits,), plan,
            *_tensors(own, other), *own.grads, grad_bias, sums,
            call.masks, call.lists_of(own.side, plan), own.side.dropout, other.side.dropout, self.floor,
            own.strides, other.strides, of_bias, own.side.sizes, other.side.sizes, call.scale_log2, call.scale,
            own.splits,
            **call.constants, SIDE=own.side.number, OWN_DIM=own.side.value_dim, OTHER_DIM=other.side.value_dim,
            BLOCK_Q=plan.block_q, BLOCK_K=plan.block_k,
        )  # fmt: skip

    def _shared_bias(self, bias: Tensor) -> Tensor:
        call, plan, a, b = self.call, self.call.config("grad_bias"), self.a, self.b
        sums = BiasSums.of(bias, call.batch, call.heads, ceil_div(call.q_len, plan.block_q))
        programs = count_programs(bias, sums, call.k_len, plan.block_k)
        splits, parts = sums.parts(bias, programs)
        constants = {name: x for name, x in call.constants.items() if name not in ("HIDES", "ALL_PARTIAL")}
        launch(
            co_grad_bias_kernel, (programs, splits), plan,
            *_tensors(a, b), parts, call.masks, a.side.dropout, b.side.dropout, self.floor, a.strides, b.strides,
            split_strides(parts), a.side.sizes, b.side.sizes, sums, call.scale_log2, splits,
            **constants, DIM_A=a.side.value_dim, DIM_B=b.side.value_dim,
            BLOCK_Q=plan.block_q, BLOCK_K=plan.block_k, SUM_ROWS=bias.shape[2] == 1,
        )  # fmt: skip
        return sum_of_parts(parts, bias)


def _tensors(own: _Flow, other: _Flow) -> tuple[Tensor | None, ...]:
    """Returns what the kernels read of both sides."""
    return (
        own.side.x, other.side.x, own.side.value, other.side.value, own.side.valid, other.side.valid,
        own.grad_out, other.grad_out, own.lse, other.lse, own.delta, other.delta,
    )  # fmt: skip
