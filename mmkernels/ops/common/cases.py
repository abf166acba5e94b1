"""Random inputs of correctness cases and benchmarks."""

from __future__ import annotations

import torch
from torch import Generator, Tensor


def normal(generator: Generator, *shape: int) -> Tensor:
    """Standard normal float64 on the CPU."""
    return torch.randn(shape, generator=generator, dtype=torch.float64)
