"""What the launchers of the Triton kernels share."""

from __future__ import annotations

import torch


def ceil_div(a: int, b: int) -> int:
    """Returns a / b, rounded up. ``triton.cdiv`` is for kernels to call too, and costs 4 us on the host."""
    return -(-a // b)


def precision(dtype: torch.dtype) -> str:
    """How float32 tiles are multiplied: TF32 only where the user's PyTorch setting allows it."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"
