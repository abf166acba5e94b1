"""Features of all ranks in each one's memory, for the subclasses of `ClipLoss` and `SigLipLoss` that build logits."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _DividedGradient(torch.autograd.Function):
    """Returns x; its gradient is divided by a number."""

    @staticmethod
    def forward(x: Tensor, divisor: int) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
        ctx.divisor = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad / ctx.divisor, None


class _Gather(torch.autograd.Function):
    """Gathers a tensor of each rank; the gradient is the sum of those of all ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, ...]:
        ctx.group = group
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(group.size())]
        dist.all_gather(parts, x, group=group)
        return tuple(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = torch.stack(grads)
        dist.all_reduce(grad, group=ctx.group)
        return grad[ctx.group.rank()], None


def divided_gradient(x: Tensor, divisor: int) -> Tensor:
    """Returns x; its gradient is divided by `divisor`."""
    y: Tensor = _DividedGradient.apply(x, divisor)
    return y


def gather(x: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, ...]:
    """Returns the features of every rank of a group.

    Raises:
        ValueError: ranks differ in rows.
    """
    rows = torch.tensor([x.shape[0]], device=x.device)
    counts = [torch.empty_like(rows) for _ in range(group.size())]
    dist.all_gather(counts, rows, group=group)
    counts = torch.cat(counts).tolist()
    if len(set(counts)) > 1:
        raise ValueError(f"ranks must hold as many pairs where logits are built, got {counts}")
    parts: tuple[Tensor, ...] = _Gather.apply(x, group)
    return parts
