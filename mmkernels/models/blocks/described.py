"""How errors name what was given for a tensor."""

from __future__ import annotations

from torch import Tensor


def described(x: object) -> str:
    """A tensor's dtype, another object's type."""
    return str(x.dtype) if isinstance(x, Tensor) else type(x).__name__
