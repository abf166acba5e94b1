"""What the tests of cross-attention share: which backends, and inputs."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mmkernels.runtime import cpu
from mmkernels.runtime import triton as gpu

EXACT = ("chunked", "reference")  # those that compute in float64
BACKENDS = ("triton",) if gpu.INTERPRETED else EXACT if cpu.why_not() else ("cpu", *EXACT)
NAN, INF = math.nan, math.inf


def each_backend(test: Callable[..., None]) -> Callable[..., None]:
    return pytest.mark.interpreted(pytest.mark.parametrize("backend", BACKENDS)(test))


def qkv(
    *sizes: int, dtype: torch.dtype = torch.float64, grad: bool = False, k_len: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, q_len, dim = sizes or (2, 2, 5, 8)
    k_len = q_len + 2 if k_len is None else k_len
    shapes = ((batch, heads, q_len, dim), (batch, heads, k_len, dim), (batch, heads, k_len, dim))
    q, k, v = (torch.randn(s, dtype=dtype, requires_grad=grad) for s in shapes)
    return q, k, v


def dtype_of(backend: str) -> torch.dtype:
    """The widest dtype that a backend computes in."""
    return torch.float64 if backend in EXACT else torch.float32
