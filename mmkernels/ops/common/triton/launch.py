"""What the launchers of the Triton kernels share."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from mmkernels.runtime.tuning import architecture


def ceil_div(a: int, b: int) -> int:
    """Returns a / b, rounded up. ``triton.cdiv`` serves kernels too, and costs 4 us on the host."""
    return -(-a // b)


def precision(dtype: torch.dtype) -> str:
    """Returns how float32 tiles are multiplied: as TF32 only where the user's PyTorch setting allows it."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def loss_scale_of(dtype: torch.dtype) -> float:
    """Returns the largest upstream gradient in strips of `dtype`: float16 has range to spare above 1, and needs it."""
    return 1024.0 if dtype == torch.float16 else 1.0


def stride_unit(strides: Iterable[int]) -> int:
    """Returns how many elements one unit of a kernel's strides stands for: 8 if 8 divides all strides, else 1.

    Triton recognises an aligned stride only if 16 divides it, so a stride of 72 elements would prevent loads of 16
    bytes. A kernel that multiplies the stride 9 by the constant 8 gets them.
    """
    return 8 if all(n % 8 == 0 for n in strides) else 1


def has_tma_layout(x: Tensor) -> bool:
    """Returns whether the copy engine (TMA) of Hopper and later can fetch tiles of x.

    It takes contiguous channels, and starts and strides that are multiples of 16 bytes; no dimension may be broadcast.
    """
    if architecture(x.device) not in ("sm_90", "sm_100"):
        return False
    *outer, last = x.stride()
    aligned = all(n * x.element_size() % 16 == 0 for n in outer) and x.data_ptr() % 16 == 0
    return last == 1 and aligned and 0 not in outer
