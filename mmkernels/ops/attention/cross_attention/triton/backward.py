"""Cross-attention's backward pass in Triton, without atomics, so that gradients are the same each time.

One kernel goes over rows and one over keys; each makes the probabilities again from the log-sum-exp, so that together
they multiply 7 matrices where 5 would do with atomics. A bias that is not broadcast gets its gradient from the first,
one that is broadcast over batch, heads or queries from a third. Source: Dao, "FlashAttention-2", 2023, algorithm 2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmkernels.ops.attention.cross_attention.triton.grad_bias import GradBiasStrides, grad_bias_kernel
from mmkernels.ops.attention.cross_attention.triton.grad_key_value import GradKeyValueStrides, grad_key_value_kernel
from mmkernels.ops.attention.cross_attention.triton.grad_query import GradQueryStrides, grad_query_kernel
from mmkernels.ops.attention.triton.arguments import NO_STRIDES, Strides
from mmkernels.ops.attention.triton.attend import OP
from mmkernels.ops.attention.triton.bias import BiasSums, count_programs, like, split_strides, sum_of_parts
from mmkernels.ops.attention.triton.call import Call, dropout_of, gate_of, head_dim, strides_of, unit_of
from mmkernels.ops.common.results import or_empty
from mmkernels.ops.common.triton.launch import ceil_div
from mmkernels.runtime.triton import launch, multiprocessors
from mmkernels.runtime.tuning import Config, config


def backward(args: Any) -> tuple[Tensor, ...]:
    """Returns the gradients of query, key, value, bias, gate; an empty tensor where none is wanted."""
    return _Backward(args).run()


class _Backward:
    """One backward call: what its kernels share, and a method for each of them."""

    def __init__(self, args: Any) -> None:
        call, value, gate, seed, grad_out, out = Call(args), args.value, args.gate, args.seed, args.grad_out, args.out
        self.args, self.call, self.value, self.gate, self.seed, self.out = args, call, value, gate, seed, out
        self.grad_out, self.lse = grad_out, args.lse.contiguous()
        self.grad_lse = None if args.grad_lse is None else args.grad_lse.contiguous()
        self.delta = torch.empty_like(self.lse)
        self.gates, self.dropout = gate_of(gate), dropout_of(seed, args.dropout_p)
        self.value_dim = head_dim(value.shape[3])
        unit = unit_of(call.query, call.key, value, grad_out, out)
        self.constants: dict[str, Any] = call.constants | {"UNIT": unit, "VALUE_DIM": self.value_dim}
        self.strides = {
            name: strides_of(x, unit)
            for name, x in (("query", call.query), ("key", call.key), ("value", value), ("grad_out", grad_out))
        }
        self.out_strides = strides_of(out, unit)

    def run(self) -> tuple[Tensor, ...]:
        args, call, bias = self.args, self.call, self.args.bias
        need_query, need_key, need_value = args.need_query, args.need_key, args.need_value
        need_bias, need_gate = args.need_bias and bias is not None, args.need_gate and self.gate is not None
        grad_query = torch.empty_like(call.query) if need_query else None
        whole = (call.batch, call.heads, call.q_len, call.k_len)
        grad_bias = torch.zeros_like(bias) if need_bias and bias is not None and bias.shape == whole else None
        bias_sums = gate_sums = None
        if need_bias and bias is not None and grad_bias is None and bias.shape[3] == 1:
            bias_sums = torch.empty_like(self.delta)  # all keys share the bias: a row's sum is its gradient
        if need_gate:
            gate_sums = torch.empty_like(self.delta)
        if need_query or need_key or need_bias or need_gate:
            self._query(grad_query, grad_bias, gate_sums, bias_sums)
        grad_key, grad_value = self._key_value(need_key, need_value)
        if need_bias and bias is not None and grad_bias is None:
            grad_bias = self._shared_bias(bias) if bias_sums is None else like(bias_sums[..., None], bias)
        grad_gate = None
        if gate_sums is not None and self.gate is not None:
            slope = 1 - self.gate.float().tanh() ** 2
            grad_gate = like((slope * gate_sums.sum((0, 2))).sum_to_size(self.gate.shape or (1,)), self.gate)
        grads = (grad_query, grad_key, grad_value, grad_bias, grad_gate)
        return tuple(or_empty(grad, self.grad_out) for grad in grads)

    def _config(self, kernel: str) -> Config:
        query = self.call.query
        return config(OP, kernel, query.device, query.dtype, max(self.call.dim.size, self.value_dim.size))

    def _query(
        self, grad_query: Tensor | None, grad_bias: Tensor | None, gate_sums: Tensor | None, bias_sums: Tensor | None
    ) -> None:
        call, out = self.call, self.out
        plan = self._config("grad_query" if self.seed is None else "grad_query_dropout")
        launch(
            grad_query_kernel, (call.row_tiles(plan) * call.problems,), plan,
            call.query, call.key, self.value, self.grad_out, out, self.lse, self.grad_lse, self.delta, grad_query,
            grad_bias, gate_sums, bias_sums, call.masks, call.lists(plan, of_rows=True), self.gates, self.dropout,
            GradQueryStrides(
                **self.strides, out=self.out_strides,
                grad_query=NO_STRIDES if grad_query is None else Strides(*grad_query.stride()),
                grad_bias=NO_STRIDES if grad_bias is None else Strides(*grad_bias.stride()),
            ), call.sizes, call.scale_log2, call.scale,
            **self.constants, BLOCK_Q=plan.block_q, BLOCK_K=plan.block_k,
        )  # fmt: skip

    def _key_value(self, need_key: bool, need_value: bool) -> tuple[Tensor | None, Tensor | None]:
        if not (need_key or need_value):
            return None, None
        call = self.call
        plan = self._config(
            "grad_key_value" + ("_dropout" if self.seed is not None else "_masked" if call.hides else "")
        )
        programs = call.key_tiles(plan) * call.problems
        splits = max(1, min(multiprocessors(call.query.device) // max(1, programs), call.row_tiles(plan) // 4))
        inputs = (call.key if need_key else None, self.value if need_value else None)
        grad_key, grad_value = (
            None if x is None else
            torch.empty_like(x)[None] if splits == 1 else x.new_empty(splits, *x.shape, dtype=torch.float32)
            for x in inputs
        )  # fmt: skip
        launch(
            grad_key_value_kernel, (programs, splits), plan,
            call.query, call.key, self.value, self.grad_out, self.lse, self.delta, grad_key, grad_value,
            call.masks, call.lists(plan, of_rows=False), self.gates, self.dropout,
            GradKeyValueStrides(
                **self.strides, grad_key=split_strides(grad_key), grad_value=split_strides(grad_value)
            ), call.sizes, call.scale_log2, abs(call.scale), splits,
            **self.constants, BLOCK_Q=plan.block_q, BLOCK_K=plan.block_k, HIDES=call.hides,
        )  # fmt: skip
        of_key, of_value = (
            None if x is None or parts is None else sum_of_parts(parts, x)
            for x, parts in zip(inputs, (grad_key, grad_value), strict=True)
        )
        return of_key, of_value

    def _shared_bias(self, bias: Tensor) -> Tensor:
        call, plan = self.call, self._config("grad_bias")
        sums = BiasSums.of(bias, call.batch, call.heads, ceil_div(call.q_len, plan.block_q))
        programs = count_programs(bias, sums, call.k_len, plan.block_k)
        splits, parts = sums.parts(bias, programs)
        constants = {name: x for name, x in self.constants.items() if name not in ("LAYOUT", "ALL_PARTIAL")}
        launch(
            grad_bias_kernel, (programs, splits), plan,
            call.query, call.key, self.value, self.grad_out, self.lse, self.delta, parts, call.masks, self.gates,
            self.dropout, GradBiasStrides(**self.strides, grad_bias=split_strides(parts)), call.sizes, sums,
            call.scale_log2, splits, **constants, GROUP=call.layout.group, BLOCK_Q=plan.block_q, BLOCK_K=plan.block_k,
            SUM_ROWS=bias.shape[2] == 1,
        )  # fmt: skip
        return sum_of_parts(parts, bias)
