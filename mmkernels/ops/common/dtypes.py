"""The dtypes that ops compute in."""

from __future__ import annotations

import torch
from torch import Tensor


def wide_dtype(x: Tensor) -> torch.dtype:
    """Returns the dtype of sums over elements of x, of log-sum-exps and of losses."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
