"""Gradients that an op computes with its loss and keeps until what flows back to the loss multiplies them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_STRIP = 2**18  # numbers that are multiplied at a time


def kept_dtype(x: Tensor) -> torch.dtype:
    """Returns the dtype in which the gradient of x is kept between the forward and the backward pass.

    float16 has too little range: a loss scale in the upstream gradient multiplies the kept values only later.
    """
    return torch.float32 if x.dtype == torch.float16 else x.dtype


def kept(
    grads: Sequence[Tensor | None], inputs: Sequence[Tensor | None], wanted: Sequence[bool], like: Tensor
) -> list[Tensor]:
    """Returns the gradients of inputs as they are kept, an empty tensor where none is wanted.

    Args:
        like: a tensor on the device of the empty ones.
    """
    return [
        grad.to(kept_dtype(x)).reshape(x.shape) if keep and grad is not None and x is not None else like.new_empty(0)
        for x, grad, keep in zip(inputs, grads, wanted, strict=True)
    ]


def fake_kept(inputs: Sequence[Tensor | None], wanted: Sequence[bool], like: Tensor) -> list[Tensor]:
    """Returns what `kept` returns, with nothing in it."""
    return [
        x.new_empty(x.shape, dtype=kept_dtype(x)) if keep and x is not None else like.new_empty(0)
        for x, keep in zip(inputs, wanted, strict=True)
    ]


def scaled(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns ``x * factor`` in `dtype`. The factor is 0-D and keeps its dtype."""
    if x.device.type == "cpu":  # a 0-D factor is never rounded to x's dtype there
        if x.dtype == dtype or x.dim() == 0:
            return torch.mul(x, factor).to(dtype)
        found = x.new_empty(x.shape, dtype=dtype)  # not by way of a whole one in x's dtype
        rows = max(1, _STRIP * len(x) // max(1, x.numel()))
        for strip, to in zip(x.split(rows), found.split(rows), strict=True):
            to.copy_(strip * factor)
        return found
    return torch.mul(x, factor.reshape([1] * x.dim()), out=x.new_empty(x.shape, dtype=dtype))
