"""Attention of queries to keys and values, masked by spans, without the scores' matrix."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from mmkernels.masks import SpanMask
from mmkernels.ops.attention.cross_attention import chunked, cuda
from mmkernels.ops.attention.cross_attention.spec import Arguments, Results, reference, reference_backward
from mmkernels.ops.attention.inputs import prepare
from mmkernels.ops.common.dtypes import wide_dtype
from mmkernels.runtime.backends import cpu_kernel, triton_kernel
from mmkernels.runtime.checks import broadcasts, check_number, check_tensor, in_graph
from mmkernels.runtime.dispatch import Backend, define, resolve
from mmkernels.runtime.gradient import Gradient

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
        value, bias and gate. Second derivatives, and those in forward mode, are computed by the reference formula, at
        its memory cost.

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
    given = prepare(query, key, value, mask, bias, scale)
    query = given.query
    if gate is not None:
        _check_gate(gate, query)
    if type(dropout_p) is not float or dropout_p != 0.0:
        dropout_p = check_number("dropout_p", dropout_p, "between 0 and 1", 0.0, 1.0)
    args = Arguments(
        query=query,
        key=given.key,
        value=given.value,
        start=given.mask.start,
        end=given.mask.end,
        key_valid=given.mask.key_valid,
        dense=given.mask.dense,
        bias=given.bias,
        gate=gate,
        seed=torch.randint(2**63 - 1, (1,), device=query.device) if dropout_p > 0.0 else None,
        scale=given.scale,
        dropout_p=dropout_p,
    )
    backend = resolve(backend)
    if backend == "reference" and not in_graph():
        out, lse = reference(args, need_lse=return_lse)
    else:
        out, lse = OP(args, backend)
    return (out, lse) if return_lse else out


def _check_gate(gate: Tensor, query: Tensor) -> None:
    check_tensor("gate", gate)
    heads = query.shape[1]
    if gate.dtype not in (query.dtype, torch.float32):
        raise TypeError(f"gate must be {query.dtype} or float32, got {gate.dtype}")
    if gate.device != query.device:
        raise ValueError(f"gate must be on query's device {query.device}, got {gate.device}")
    if gate.dim() > 1 or not broadcasts(gate.numel(), heads):
        raise ValueError(f"gate must be a scalar or [Hq] = [{heads}], got shape {tuple(gate.shape)}")


def _fake(args: Arguments) -> tuple[Tensor, Tensor]:
    query = args.query
    batch, heads, q_len, _ = query.shape
    out = query.new_empty(batch, q_len, heads, args.value.shape[3]).transpose(1, 2)
    return out, query.new_empty(batch, heads, q_len, dtype=wide_dtype(query))


def _formula(args: Any) -> tuple[Tensor, Tensor]:
    return reference(args)


OP = define(
    "cross_attention",
    Arguments,
    Results,
    fake=_fake,
    backends=[
        Backend("cuda", cuda.forward, cuda.why_not),
        triton_kernel(f"{__name__}.triton.forward", "forward"),
        cpu_kernel("cross_attention_cpu"),
        Backend("chunked", chunked.forward),
        Backend("reference", reference),
    ],
    gradient=Gradient(
        saves=("out", "lse"),
        zeros_for=("out",),
        formula=_formula,
        backends=[
            triton_kernel(f"{__name__}.triton.backward", "backward"),
            cpu_kernel("cross_attention_backward_cpu"),
            Backend("chunked", chunked.backward),
            Backend("reference", reference_backward),
        ],
    ),
)
