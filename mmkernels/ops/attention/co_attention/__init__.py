"""Attention of two sequences to each other by one score matrix, without the matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmkernels.masks import SpanMask
from mmkernels.ops.attention.co_attention import chunked
from mmkernels.ops.attention.co_attention.formula import reference, reference_backward
from mmkernels.ops.attention.co_attention.record import Arguments, Results
from mmkernels.ops.attention.inputs import (
    MaskTensors,
    Names,
    check_bias,
    check_scale,
    take_mask_apart,
)
from mmkernels.ops.common.dtypes import wide_dtype
from mmkernels.runtime.backends import cpu_kernel, triton_kernel
from mmkernels.runtime.checks import FINITE, autocast, broadcasts, check_floating, check_number, check_tensor, in_graph
from mmkernels.runtime.dispatch import Backend, define, resolve
from mmkernels.runtime.gradient import Gradient

__all__ = ["co_attention"]

_NAMES = Names(first="a", dims="[B, H, La, Lb]", rows="positions of a", columns="positions of b")
_SMALLEST = 2.0**-1022  # above 0


def co_attention(
    a: Tensor,
    b: Tensor,
    value_a: Tensor,
    value_b: Tensor,
    mask: SpanMask | Tensor | None = None,
    *,
    valid_a: Tensor | None = None,
    valid_b: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    clamp: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Two sequences attend to each other by one matrix of scores ``S = a b' * scale + bias``, which is never stored.

    ``out_a = softmax of S's rows times value_b`` and ``out_b = (softmax of S's columns)' times value_a``. Memory is
    linear in the inputs. Each score is computed once for both directions: three matrix products forward and seven
    backward, where two calls of `cross_attention` make four and ten (on "triton" as many: adding up both directions
    from one tile would take atomics, and gradients would differ from run to run).

    A position that sees nothing, because the mask hides all or the other side has length 0: output 0, gradients 0. An
    output depends only on what it sees, so that NaN or inf in what is hidden from it never reaches it.

    Gradients start from saved results. So one that is 0 in the formula, as where a position sees one other, is 0 up to
    the rounding of the output, which shows in 16 bits. And in float32 the probabilities of large scores are off in the
    backward pass by the rounding of their log-sum-exp: by 1e-5 where it is 500, by 1e-2 where it is 200,000, which only
    `clamp` is made for. (Outputs are not.)

    Args:
        a: ``[B, H, La, D]``, float16, bfloat16, float32 or float64. Any strides, here and below.
        b: ``[B, H, Lb, D]``, a's dtype and device, as the next two.
        value_a: ``[B, H, La, Dv_a]``, what b's positions gather.
        value_b: ``[B, H, Lb, Dv_b]``, what a's positions gather.
        mask: the pairs (i, j) that exist, for both directions: a `SpanMask` whose queries are a and whose keys are b;
            or a bool tensor, True = visible, broadcastable to ``[B, H, La, Lb]``; or None: all.
        valid_a: bool ``[B or 1, La]``: False hides a position of a from b; it still attends to b itself. None: all.
        valid_b: bool ``[B or 1, Lb]``: False hides a position of b from a.
        bias: added to the scaled scores; broadcastable to ``[B, H, La, Lb]``; a's dtype or float32. -inf hides a pair
            from both directions.
        scale: what the scores are multiplied by; None: ``1 / sqrt(D)``.
        dropout_p: the chance, 0 to 1, that a probability is dropped, drawn for each direction; the others are
            multiplied by ``1 / (1 - p)``. The same masks on every backend.
        clamp: above 0: a score that is more than this below the largest score of the whole call is raised to there, as
            GroundingDINO does with 50,000: ``max(S, max(S) - clamp)``, where the largest is taken over hidden pairs
            too, but not over scores that are not finite. It counts as a constant: no gradient flows through it, nor
            through a score that is raised. None: no score is raised. Where the lengths of a's and b's vectors show that
            no score can be that low, "cpu" and "triton" don't look for the largest.
        backend: None (``use_backend``'s choice, else the first that can), "triton" (GPUs), "cpu" (kernels for float32,
            bfloat16 and float16 on CPU tensors), "chunked" (any device, float64 too) or "reference", the naive formula,
            differentiated by PyTorch's own autograd outside ``torch.compile``.

    Returns:
        out_a ``[B, H, La, Dv_b]`` and out_b ``[B, H, Lb, Dv_a]`` in a's dtype, in memory ``[B, L, H, Dv]``. Both are
        differentiable with respect to a, b, value_a, value_b and bias. Second derivatives, and those in forward mode,
        are computed by the reference formula, at its memory cost.

    Under autocast a, b, value_a and value_b are cast to the autocast dtype.

    Raises:
        TypeError: a wrong dtype or type. ValueError: a wrong shape, device or range. Each names the argument, what it
            must be and what it got.
        BackendError: a forced backend can't run this call.

    Source: Li et al., "Grounded Language-Image Pre-training" (GLIP), 2022, eq. 4; Liu et al., "Grounding DINO", 2023,
    the feature enhancer's bi-directional attention, and its code for the clamp.

    Example:
        >>> import torch, mmkernels
        >>> image, text = torch.randn(2, 4, 100, 32), torch.randn(2, 4, 12, 32)
        >>> words = torch.arange(12) < torch.tensor([[12], [7]])  # the second text has 7 words
        >>> to_image, to_text = mmkernels.co_attention(image, text, image, text, valid_b=words)
        >>> to_image.shape, to_text.shape
        (torch.Size([2, 4, 100, 32]), torch.Size([2, 4, 12, 32]))
    """
    a, b, value_a, value_b = autocast(a, b, value_a, value_b)
    _check_sides(a, b, value_a, value_b)
    a_len, b_len = a.shape[2], b.shape[2]
    masks = MaskTensors() if mask is None else take_mask_apart(mask, a, b_len, _NAMES)
    if valid_a is not None:
        _check_valid("valid_a", valid_a, a, a_len)
    if valid_b is not None:
        _check_valid("valid_b", valid_b, a, b_len)
    if type(dropout_p) is not float or dropout_p != 0.0:
        dropout_p = check_number("dropout_p", dropout_p, "between 0 and 1", 0.0, 1.0)
    args = Arguments(
        a=a,
        b=b,
        value_a=value_a,
        value_b=value_b,
        start=masks.start,
        end=masks.end,
        key_valid=masks.key_valid,
        dense=masks.dense,
        valid_a=valid_a,
        valid_b=valid_b,
        bias=None if bias is None else check_bias(bias, a, b_len, _NAMES),
        seed=torch.randint(2**63 - 1, (2,), device=a.device) if dropout_p > 0.0 else None,
        scale=check_scale(scale, a),
        dropout_p=dropout_p,
        clamp=0.0 if clamp is None else check_number("clamp", clamp, "a finite number above 0", _SMALLEST, FINITE),
    )
    backend = resolve(backend)
    if backend == "reference" and not in_graph():
        out_a, out_b, *_ = reference(args, need_lse=False)
    else:
        out_a, out_b, *_ = OP(args, backend)
    return out_a, out_b


def _check_sides(a: Tensor, b: Tensor, value_a: Tensor, value_b: Tensor) -> None:
    """Raise unless the four tensors fit together."""
    tensors = {"a": a, "b": b, "value_a": value_a, "value_b": value_b}
    for name, x in tensors.items():
        check_floating(name, x)
        if x.dim() != 4:
            raise ValueError(f"{name} must be 4-D [B, H, L, D], got shape {tuple(x.shape)}")
        if x.dtype != a.dtype:
            raise TypeError(f"{name} must have a's dtype {a.dtype}, got {x.dtype}")
        if x.device != a.device:
            raise ValueError(f"{name} must be on a's device {a.device}, got {x.device}")
    batch, heads, _, dim = a.shape
    if heads < 1 or dim < 1:
        raise ValueError(f"a must have at least one head and one channel, got shape {tuple(a.shape)}")
    for name, x in tensors.items():
        if x.shape[0] != batch:
            raise ValueError(f"{name} must have a's batch {batch}, got shape {tuple(x.shape)}")
        if x.shape[1] != heads:
            raise ValueError(f"{name} must have a's {heads} heads, got {x.shape[1]}")
    if b.shape[3] != dim:
        raise ValueError(f"b must have a's head dim {dim}, got shape {tuple(b.shape)}")
    for name, value, side in (("a", value_a, a), ("b", value_b, b)):
        if value.shape[2] != side.shape[2]:
            raise ValueError(f"value_{name} must have {name}'s length {side.shape[2]}, got shape {tuple(value.shape)}")
        if value.shape[3] < 1:
            raise ValueError(f"value_{name} must have at least one channel, got shape {tuple(value.shape)}")


def _check_valid(name: str, valid: Tensor, a: Tensor, length: int) -> None:
    check_tensor(name, valid)
    if valid.dtype != torch.bool:
        raise TypeError(f"{name} must be bool (False = hidden), got {valid.dtype}")
    if valid.device != a.device:
        raise ValueError(f"{name} must be on a's device {a.device}, got {valid.device}")
    if valid.dim() != 2 or not broadcasts(valid.shape[0], a.shape[0]) or valid.shape[1] != length:
        raise ValueError(f"{name} must be [{a.shape[0]} or 1, {length}], got shape {tuple(valid.shape)}")


def _fake(args: Arguments) -> tuple[Tensor, ...]:
    a, b, wide = args.a, args.b, wide_dtype(args.a)
    batch, heads, a_len, _ = a.shape
    b_len = b.shape[2]
    return (
        a.new_empty(batch, a_len, heads, args.value_b.shape[3]).transpose(1, 2),
        a.new_empty(batch, b_len, heads, args.value_a.shape[3]).transpose(1, 2),
        a.new_empty(batch, heads, a_len, dtype=wide),
        a.new_empty(batch, heads, b_len, dtype=wide),
        a.new_empty((), dtype=wide),
    )


def _formula(args: Any) -> tuple[Tensor, ...]:
    return reference(args, need_lse=False)[:2]


OP = define(
    "co_attention",
    Arguments,
    Results,
    fake=_fake,
    backends=[
        triton_kernel(f"{__name__}.triton.forward", "forward"),
        cpu_kernel("co_attention_cpu"),
        Backend("chunked", chunked.forward),
        Backend("reference", reference),
    ],
    gradient=Gradient(
        saves=("out_a", "out_b", "lse_a", "lse_b", "floor"),
        zeros_for=("out_a", "out_b"),
        formula=_formula,
        backends=[
            triton_kernel(f"{__name__}.triton.backward", "backward"),
            cpu_kernel("co_attention_backward_cpu"),
            Backend("chunked", chunked.backward),
            Backend("reference", reference_backward),
        ],
    ),
)
