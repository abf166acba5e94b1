"""What the launchers of the Triton kernels share."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.runtime.tuning import architecture

_UNIT = 8


def ceil_div(a: int, b: int) -> int:
    """Returns a / b, rounded up. ``triton.cdiv`` serves kernels too, and costs 4 us on the host."""
    return -(-a // b)


def precision(dtype: torch.dtype) -> str:
    """Returns how float32 tiles are multiplied: as TF32 only where the user's PyTorch setting allows it."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def stride_unit(*strides: int) -> int:
    """Returns the unit in which a kernel takes these strides: 8 elements where all are multiples of 8, else 1.

    Triton sees that a stride is aligned only where it is a multiple of 16. A kernel that multiplies a stride of 72
    given as 9 by a constant 8 reads rows of 16-bit numbers in vectors of 16 bytes all the same.
    """
    return _UNIT if all(n % _UNIT == 0 for n in strides) else 1


def has_tma_layout(*tensors: Tensor) -> bool:
    """Returns whether the copy engine (TMA) of Hopper and later can fetch tiles of all these tensors.

    It takes contiguous channels, and starts and strides that are multiples of 16 bytes; no dimension may be broadcast.
    """
    if architecture(tensors[0].device) not in ("sm_90", "sm_100"):
        return False
    for x in tensors:
        *outer, last = x.stride()
        aligned = all(n * x.element_size() % 16 == 0 for n in outer) and x.data_ptr() % 16 == 0
        if last != 1 or 0 in outer or not aligned:
            return False
    return True
