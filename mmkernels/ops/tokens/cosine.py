"""Cosines between tokens in plain PyTorch: rows of length 1, whatever the size of their values."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.ops.common.dtypes import wide_dtype

__all__ = ["near_one", "unit_rows"]


def near_one(x: Tensor) -> Tensor:
    """Returns the rows in the wide dtype, each divided by its largest value; one that is not finite is NaN.

    Squares of what lies far from 1 would be infinite, or 0. A row of zeros stays.

    Args:
        x: [..., C].
    """
    rows = x.to(wide_dtype(x)).contiguous()
    if not rows.shape[-1]:
        return rows
    largest = rows.abs().amax(-1, keepdim=True)
    return torch.where(largest.isfinite(), rows / torch.where(largest > 0, largest, 1.0), torch.nan)


def unit_rows(x: Tensor) -> Tensor:
    """Returns the rows at length 1 in the wide dtype; a row of zeros stays, one that is not finite is NaN."""
    rows = near_one(x)
    length = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return rows / torch.where(length == 0, 1.0, length)
