"""Where tensors lie in memory, for tests of kernels: between NaN, with other strides, far apart."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

_GUARD = 512  # elements on either side


def embedded(x: Tensor) -> Tensor:
    """Returns x as a view into a buffer of NaN, of integers of their least value, with other strides."""
    whole = not x.is_floating_point() and x.dtype != torch.bool
    other = torch.iinfo(x.dtype).min if whole else math.nan
    buffer = torch.full([n + 3 for n in x.shape], other, dtype=x.dtype, device=x.device)
    return buffer[tuple(slice(1, 1 + n) for n in x.shape)].copy_(x)


def far_apart(x: Tensor, dim: int) -> Tensor:
    """Returns x with its first and last slice along `dim` more than 2^31 elements apart.

    The memory between is reserved, but never touched.
    """
    strides = list(x.stride())
    strides[dim] = 2**31 // (x.shape[dim] - 1) // 64 * 64 + 64
    last = sum((n - 1) * stride for n, stride in zip(x.shape, strides, strict=True))
    return torch.empty(last + 1, dtype=x.dtype, device=x.device).as_strided(x.shape, strides).copy_(x)


class Guarded(NamedTuple):
    """A tensor that was made between guards: NaN, or -77 for integers.

    Args:
        whole: [512 + n + 512].
    """

    whole: Tensor

    def intact(self) -> bool:
        """Returns whether nothing was written outside."""
        guards = torch.cat([self.whole[:_GUARD], self.whole[-_GUARD:]])
        return bool((guards.isnan() if guards.is_floating_point() else guards == -77).all())


@contextmanager
def guarded() -> Iterator[list[Guarded]]:
    """Every tensor that launchers make inside lies, full of NaN, between guards."""
    made: list[Guarded] = []
    plain = Tensor.new_empty

    def make(*size: int, dtype: torch.dtype, device: Any) -> Tensor:
        fill = math.nan if dtype.is_floating_point else -77
        made.append(Guarded(torch.full((math.prod(size) + 2 * _GUARD,), fill, dtype=dtype, device=device)))
        return made[-1].whole[_GUARD:-_GUARD].view(size)

    def new_empty(x: Tensor, *size: Any, dtype: torch.dtype | None = None, **more: Any) -> Tensor:
        if more.keys() - {"device"}:  # the interpreter's
            return plain(x, *size, dtype=dtype, **more)
        size = tuple(size[0]) if size and not isinstance(size[0], int) else size
        return make(*size, dtype=dtype or x.dtype, device=more.get("device", x.device))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "new_empty", new_empty)
        patch.setattr(torch, "empty", lambda *size, dtype, device: make(*size, dtype=dtype, device=device))
        patch.setattr(torch, "empty_like", lambda x: make(*x.shape, dtype=x.dtype, device=x.device))
        yield made
