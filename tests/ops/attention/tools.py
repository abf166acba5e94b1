"""What the tests of the attention ops share: which backends, and inputs."""

from __future__ import annotations

import math

import harness
import torch
from torch import Tensor

OP = "cross_attention"
EXACT = ("chunked", "reference")
"""The backends that compute in float64."""
BACKENDS = tuple(harness.backends(harness.SPECS[OP]))
NAN, INF = math.nan, math.inf

each_backend = harness.each_backend(OP)


def dtype_of(backend: str) -> torch.dtype:
    """The widest dtype that a backend computes in."""
    return harness.dtype_of(OP, backend)


def qkv(
    *sizes: int, dtype: torch.dtype = torch.float64, grad: bool = False, k_len: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, q_len, dim = sizes or (2, 2, 5, 8)
    k_len = q_len + 2 if k_len is None else k_len
    shapes = ((batch, heads, q_len, dim), (batch, heads, k_len, dim), (batch, heads, k_len, dim))
    q, k, v = (torch.randn(s, dtype=dtype, requires_grad=grad) for s in shapes)
    return q, k, v
