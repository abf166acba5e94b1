"""Two attention results over different keys merged into the result over all of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmkernels.ops.attention.merge_attention import chunked
from mmkernels.ops.attention.merge_attention.spec import Arguments, Results, reference
from mmkernels.ops.common.dtypes import wide_dtype
from mmkernels.runtime.checks import DTYPES, check_floating, check_tensor
from mmkernels.runtime.dispatch import Backend, define, resolve
from mmkernels.runtime.gradient import Gradient

__all__ = ["merge_attention"]


def merge_attention(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Merge what ``cross_attention(..., return_lse=True)`` gave for two disjoint sets of keys.

    The result is that of one call over both sets, without a concatenated copy of keys and values: cached and new keys,
    media and latents, keys that lie on several devices. A row whose log-sum-exp is -inf saw nothing and weighs nothing.

    Args:
        out_a, out_b: ``[B, H, Lq, Dv]``, one shape, dtype (float16, bfloat16, float32, float64) and device; computed
            without `gate` and with the same `scale`.
        lse_a, lse_b: ``[B, H, Lq]``, float32, or float64 beside float64 outputs.
        backend: None, "chunked" or "reference".

    Returns:
        The merged output, ``[B, H, Lq, Dv]`` in out_a's dtype, in memory ``[B, Lq, H, Dv]``, and its log-sum-exp
        ``[B, H, Lq]``. Both are differentiable with respect to all four inputs.

    Raises:
        TypeError: a wrong dtype or type. ValueError: a wrong shape or device.

    Source: Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018, theorem 1.

    Example:
        >>> import torch, mmkernels
        >>> q, k, v = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8)
        >>> first = mmkernels.cross_attention(q, k[:, :, :4], v[:, :, :4], return_lse=True)
        >>> second = mmkernels.cross_attention(q, k[:, :, 4:], v[:, :, 4:], return_lse=True)
        >>> out, lse = mmkernels.merge_attention(*first, *second)
        >>> torch.allclose(out, mmkernels.cross_attention(q, k, v), atol=1e-6)
        True
    """
    args = Arguments(out_a=out_a, lse_a=lse_a, out_b=out_b, lse_b=lse_b)
    _check(args)
    out, lse = OP(args, resolve(backend))
    return out, lse


def _check(args: Arguments) -> None:
    tensors, out_a, out_b = args._asdict(), args.out_a, args.out_b
    for name, x in tensors.items():
        check_tensor(name, x)
        if not (x.is_cpu and out_a.is_cpu) and x.device != out_a.device:
            raise ValueError(f"{name} must be on out_a's device {out_a.device}, got {x.device}")
    if out_a.dim() != 4:
        raise ValueError(f"out_a must be 4-D [B, H, Lq, Dv], got shape {tuple(out_a.shape)}")
    if out_a.dtype not in DTYPES:
        check_floating("out_a", out_a)
    if out_b.dtype != out_a.dtype:
        raise TypeError(f"out_b must have out_a's dtype {out_a.dtype}, got {out_b.dtype}")
    if out_b.shape != out_a.shape:
        raise ValueError(f"out_b must be {list(out_a.shape)} as out_a is, got shape {tuple(out_b.shape)}")
    wide = wide_dtype(out_a)
    for name in ("lse_a", "lse_b"):
        x = tensors[name]
        if x.dtype != wide:
            raise TypeError(f"{name} must be {wide}, got {x.dtype}")
        if x.shape != out_a.shape[:3]:
            raise ValueError(f"{name} must be [B, H, Lq] = {list(out_a.shape[:3])}, got shape {tuple(x.shape)}")


def _fake(args: Arguments) -> tuple[Tensor, Tensor]:
    batch, heads, q_len, dim = args.out_a.shape
    return args.out_a.new_empty(batch, q_len, heads, dim).transpose(1, 2), args.lse_a.new_empty(batch, heads, q_len)


def _backward(args: Any) -> list[Tensor | None]:
    """d out_x = w_x d out; d lse_x = w_x (d lse + d out . (out_x - out)). Plain operators, so differentiable again."""
    out, lse, grad_out, grad_lse = args.out, args.lse, args.grad_out, args.grad_lse
    base = lse.masked_fill(lse == -torch.inf, 0.0)
    result: list[Tensor | None] = []
    for part, part_lse in ((args.out_a, args.lse_a), (args.out_b, args.lse_b)):
        weight = (part_lse - base).exp()
        of_lse = torch.zeros_like(lse) if grad_lse is None else grad_lse
        of_part = None
        if grad_out is not None:
            of_part = (grad_out * weight[..., None]).to(part.dtype)
            of_lse = of_lse + (grad_out.to(lse.dtype) * (part.to(lse.dtype) - out.to(lse.dtype))).sum(-1)
        result += [of_part, weight * of_lse]
    return result


OP = define(
    "merge_attention",
    Arguments,
    Results,
    fake=_fake,
    backends=[Backend("chunked", chunked.forward), Backend("reference", reference)],
    gradient=Gradient(saves=("out", "lse"), formula_backward=_backward),
)
