"""Attention of queries to keys and values, masked by spans, without the scores' matrix."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from mmkernels.masks import SpanMask
from mmkernels.ops.attention.cross_attention import chunked, cuda
from mmkernels.ops.attention.cross_attention.spec import reference, reference_backward
from mmkernels.ops.attention.inputs import check_attention, check_bias, check_scale, take_mask_apart
from mmkernels.ops.common.second import second_derivatives
from mmkernels.runtime import cpu
from mmkernels.runtime import triton as gpu
from mmkernels.runtime.checks import autocast, check_tensor
from mmkernels.runtime.dispatch import Backend, register, resolve

__all__ = ["cross_attention"]


@overload
def cross_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: SpanMask | Tensor | None = ...,
    *,
    bias: Tensor | None = ...,
    gate: Tensor | None = ...,
    scale: float | None = ...,
    dropout_p: float = ...,
    return_lse: Literal[False] = ...,
    backend: str | None = ...,
) -> Tensor: ...
@overload
def cross_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: SpanMask | Tensor | None = ...,
    *,
    bias: Tensor | None = ...,
    gate: Tensor | None = ...,
    scale: float | None = ...,
    dropout_p: float = ...,
    return_lse: Literal[True],
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...
def cross_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: SpanMask | Tensor | None = None,
    *,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``tanh(gate) * softmax(query key' * scale + bias + mask) value``, in memory linear in its inputs.

    Each query sees the keys that `mask` shows. A query that sees nothing: output 0, log-sum-exp -inf, gradients 0. An
    output row depends only on what it sees, so that NaN or inf in a hidden key or value never reaches it.
    Self-attention is the case of query, key and value from one sequence.

    Args:
        query: ``[B, Hq, Lq, D]``, float16, bfloat16, float32 or float64. Any strides, here and below.
        key: ``[B or 1, Hkv, Lk, D]``, query's dtype and device. Hkv divides Hq (grouped-query attention: query head h
            attends to key head ``h // (Hq / Hkv)``); a batch of 1 is shared by all queries. Neither is copied.
        value: ``[B or 1, Hkv, Lk, Dv]``, as key.
        mask: a `SpanMask`; or a bool tensor, True = visible, broadcastable to ``[B, Hq, Lq, Lk]``, as in
            ``F.scaled_dot_product_attention``; or None: every query sees every key.
        bias: added to the scaled scores; broadcastable to ``[B, Hq, Lq, Lk]``; query's dtype or float32. -inf hides.
        gate: the output is multiplied by ``tanh(gate)`` (Flamingo); a scalar or ``[Hq]``; query's dtype or float32.
        scale: what the scores are multiplied by; None: ``1 / sqrt(D)``.
        dropout_p: the chance, 0 to 1, that a probability is dropped; the others are multiplied by ``1 / (1 - p)``.
            Drawn from PyTorch's generator of query's device, the same mask on every backend.
        return_lse: also return the log-sum-exp of each query's scores (before dropout and gate).
        backend: None (``use_backend``'s choice, else the first that can), "cuda" (decoding: 1 to 8 queries in a 16-bit
            dtype), "triton" (GPUs), "cpu" (kernels for float32, bfloat16 and float16 on CPU tensors), "chunked" or
            "reference". "reference" is the naive formula in PyTorch's own
            operators; outside ``torch.compile`` it is differentiated by PyTorch's own autograd, so that it takes the
            memory that a naive model takes. With a mask it waits for the device.

    Returns:
        ``[B, Hq, Lq, Dv]`` in query's dtype, in memory laid out as ``[B, Lq, Hq, Dv]``; with `return_lse` also
        ``[B, Hq, Lq]`` in float32 (float64 for float64 inputs). Both are differentiable with respect to query, key,
        value, bias and gate. Second derivatives are computed by the reference formula, at its memory cost.

    Under autocast query, key and value are cast to the autocast dtype.

    Raises:
        TypeError: a wrong dtype or type. ValueError: a wrong shape, device or range. Each names the argument, what it
            must be and what it got.
        BackendError: a forced backend can't run this call.

    Source: Vaswani et al., "Attention Is All You Need", 2017, eq. 1; tiles by Dao et al., "FlashAttention", 2022; the
    gate by Alayrac et al., "Flamingo", 2022, section 2.2.

    Example:
        >>> import torch, mmkernels
        >>> text = torch.randn(2, 8, 5, 64)     # 2 prompts of 5 tokens, 8 heads
        >>> image = torch.randn(2, 2, 12, 64)   # 3 images of 4 tokens each, 2 heads
        >>> sees = torch.tensor([[-1, 0, 0, 1, 1], [0, 0, 1, 1, 2]])  # which image each token sees; -1: none
        >>> mask = mmkernels.SpanMask.media(sees, tokens_per_media=4)
        >>> mmkernels.cross_attention(text, image, image, mask).shape
        torch.Size([2, 8, 5, 64])
    """
    query, key, value = autocast(query, key, value)
    check_attention(query, key, value)
    start, end, key_valid, dense = take_mask_apart(mask, query, key.shape[2])
    bias = None if bias is None else check_bias(bias, query, key.shape[2])
    if gate is not None:
        _check_gate(gate, query)
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p must be between 0 and 1, got {dropout_p}")
    seed = torch.randint(2**63 - 1, (1,), device=query.device) if dropout_p > 0.0 else None
    tensors = (query, key, value, start, end, key_valid, dense, bias, gate, seed)
    scale, dropout_p, backend = check_scale(scale, query), float(dropout_p), resolve(backend)
    if backend == "reference" and not torch.compiler.is_compiling():
        out, lse = reference(*tensors, scale, dropout_p, need_lse=return_lse)
    else:
        out, lse = _op(*tensors, scale, dropout_p, backend)
    return (out, lse) if return_lse else out


def _check_gate(gate: Tensor, query: Tensor) -> None:
    check_tensor("gate", gate)
    heads = query.shape[1]
    if gate.dtype not in (query.dtype, torch.float32):
        raise TypeError(f"gate must be {query.dtype} or float32, got {gate.dtype}")
    if gate.device != query.device:
        raise ValueError(f"gate must be on query's device {query.device}, got {gate.device}")
    if gate.dim() > 1 or gate.numel() not in (1, heads):
        raise ValueError(f"gate must be a scalar or [Hq] = [{heads}], got shape {tuple(gate.shape)}")


# The op boundary, forward.

_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? start, Tensor? end, Tensor? key_valid, Tensor? dense, "
    "Tensor? bias, Tensor? gate, Tensor? seed"
)


def _fake(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    batch, heads, q_len, _ = query.shape
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    out = query.new_empty(batch, q_len, heads, value.shape[3]).transpose(1, 2)
    return out, query.new_empty(batch, heads, q_len, dtype=wide)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale, ctx.dropout_p, ctx.backend = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(saved[-2])
    wanted = ctx.needs_input_grad
    needs = [wanted[0], wanted[1], wanted[2], wanted[7], wanted[8]]  # _DIFFERENTIABLE, as below
    query, key, value, bias, gate = (
        grad if need else None
        for grad, need in zip(
            _op_backward(grad_out, grad_lse, *saved, ctx.scale, ctx.dropout_p, needs, ctx.backend), needs, strict=True
        )
    )
    return query, key, value, None, None, None, None, bias, gate, None, None, None, None


_DIFFERENTIABLE = (0, 1, 2, 7, 8)  # query, key, value, bias, gate among the inputs

# The op boundary, backward.


def _fake_backward(grad_out: Tensor, grad_lse: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    *inputs, _scale, _dropout_p, needs, _backend = rest
    tensors = (inputs[place] for place in _DIFFERENTIABLE)
    return tuple(
        torch.empty_like(x) if need and x is not None else grad_out.new_empty(0)
        for x, need in zip(tensors, needs, strict=True)
    )


def _setup_context_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.scale, ctx.dropout_p, ctx.needs, _ = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _backward_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """Second derivatives. out and lse are functions of the inputs."""
    grad_out, grad_lse, *tensors, _out, _lse = ctx.saved_tensors

    def formula(given: list[Any]) -> tuple[Tensor, ...]:
        return reference(*(*given, ctx.scale, ctx.dropout_p))

    of_cotangents, found = second_derivatives(formula, tensors, _DIFFERENTIABLE, (grad_out, grad_lse), grads)
    of_tensors: list[Tensor | None] = [None] * len(tensors)
    for place, grad in zip(_DIFFERENTIABLE, found, strict=True):
        of_tensors[place] = grad
    return (*of_cotangents, *of_tensors, *([None] * 6))


_op_backward = register(
    f"cross_attention_backward(Tensor grad_out, Tensor? grad_lse, {_INPUTS}, Tensor out, Tensor lse, float scale, "
    "float dropout_p, bool[] needs, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    [
        Backend("triton", gpu.op("mmkernels.ops.attention.cross_attention.triton.backward", "backward"), gpu.why_not),
        Backend("cpu", cpu.op("cross_attention_backward_cpu"), cpu.why_not),
        Backend("chunked", chunked.backward),
        Backend("reference", reference_backward),
    ],
    _fake_backward,
    setup_context=_setup_context_backward,
    backward=_backward_backward,
    is_backward=True,
)
_op = register(
    f"cross_attention({_INPUTS}, float scale, float dropout_p, str backend) -> (Tensor, Tensor)",
    [
        Backend("cuda", cuda.decode, cuda.why_not_decode),
        Backend("triton", gpu.op("mmkernels.ops.attention.cross_attention.triton.forward", "forward"), gpu.why_not),
        Backend("cpu", cpu.op("cross_attention_cpu"), cpu.why_not),
        Backend("chunked", chunked.forward),
        Backend("reference", reference),
    ],
    _fake,
    setup_context=_setup_context,
    backward=_backward,
)
