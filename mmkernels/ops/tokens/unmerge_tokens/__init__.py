"""Merged tokens back at the places of all tokens that they stand for."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.ops.tokens.unmerge_tokens.spec import Arguments, Results, formula, reference, reference_backward
from mmkernels.runtime.backends import cpu_kernel, triton_kernel
from mmkernels.runtime.checks import check_floating, check_tensor, without_autocast
from mmkernels.runtime.dispatch import Backend, define, resolve
from mmkernels.runtime.gradient import Gradient

__all__ = ["unmerge_tokens"]


def unmerge_tokens(x: Tensor, assignment: Tensor, *, backend: str | None = None) -> Tensor:
    """Give each token the row that it was merged into: what follows `merge_tokens` where every place needs a token.

    Args:
        x: ``[tokens', C]`` or ``[images, tokens', C]``: merged tokens, or what a model made of them. float16, bfloat16,
            float32 or float64.
        assignment: int64, as `merge_tokens` returned it: ``[tokens]``, or ``[images, tokens]`` for batched x, each
            token's row among all rows of x. Values are checked on a CPU, by the backends; on a GPU, where that would
            wait for the device, they must be right.
        backend: None (``use_backend``'s choice, else the first that can), "triton" (GPUs, untested on one), "cpu"
            (float32, bfloat16 and float16), "chunked" or "reference" (any device, float64 too).

    Returns:
        ``[tokens, C]`` or ``[images, tokens, C]`` in x's dtype. The gradient of a row is the sum over its tokens, in
        float32 (float64 for float64 x) and in their order. Autocast rounds nothing here.

    Raises:
        TypeError: a wrong dtype or type. ValueError: a wrong shape, device or row. Each names the argument, what it
            must be and what it got.
        BackendError: a forced backend can't run this call.

    Source: Bolya & Hoffman, "Token Merging for Fast Stable Diffusion", 2023, section 3.1, "Unmerging".

    Example:
        >>> import torch, mmkernels
        >>> x = torch.randn(16, 8)
        >>> merged, lengths, sizes, assignment = mmkernels.merge_tokens(x, [16], 10)
        >>> mmkernels.unmerge_tokens(merged, assignment).shape
        torch.Size([16, 8])
    """
    (x,) = without_autocast(x)
    check_floating("x", x)
    if x.dim() not in (2, 3):
        raise ValueError(f"x must be [tokens, C] or [images, tokens, C], got shape {tuple(x.shape)}")
    check_tensor("assignment", assignment)
    if assignment.dtype != torch.int64:
        raise TypeError(f"assignment must be int64, got {assignment.dtype}")
    if assignment.dim() != x.dim() - 1 or (x.dim() == 3 and assignment.shape[0] != x.shape[0]):
        shape = "[tokens]" if x.dim() == 2 else f"[{x.shape[0]}, tokens]"
        raise ValueError(f"assignment must be {shape} beside x, got shape {tuple(assignment.shape)}")
    if not (assignment.is_cpu and x.is_cpu) and assignment.device != x.device:
        raise ValueError(f"assignment must be on x's device {x.device}, got {assignment.device}")
    backend = resolve(backend)
    if x.dim() == 2:
        packed: Tensor = OP(Arguments(x=x, assignment=assignment), backend)
        return packed
    tokens: Tensor = OP(Arguments(x=x.flatten(0, 1), assignment=assignment.flatten()), backend)
    return tokens.view(*assignment.shape, x.shape[-1])


def _fake(args: Arguments) -> Tensor:
    return args.x.new_empty(args.assignment.shape[0], args.x.shape[1])


OP = define(
    "unmerge_tokens",
    Arguments,
    Results,
    fake=_fake,
    backends=[
        triton_kernel(f"{__name__}.triton", "forward"),
        cpu_kernel("unmerge_tokens_cpu"),
        Backend("chunked", reference),  # whose memory is linear already
        Backend("reference", reference),
    ],
    gradient=Gradient(
        saves=(),
        formula=formula,
        backends=[
            triton_kernel(f"{__name__}.triton", "backward"),
            cpu_kernel("unmerge_tokens_backward_cpu"),
            Backend("reference", reference_backward),
        ],
        contiguous=True,
        linear=("x",),
    ),
)
