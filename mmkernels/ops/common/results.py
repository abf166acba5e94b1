"""What ops return in place of results that nobody wants."""

from __future__ import annotations

import torch
from torch import Tensor


def or_empty(x: Tensor | None, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Returns x, or an empty tensor of its own: PyTorch refuses an op whose outputs share memory, if only none.

    Args:
        like: a tensor on the device of the result.
        dtype: of an empty one; None: like's.
    """
    return like.new_empty(0, dtype=dtype) if x is None else x
