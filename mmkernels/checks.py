"""Checks of values that never wait for a device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def can_look(x: Tensor) -> bool:
    """Whether Python may branch on a tensor's values: not where a graph is traced, and not without values."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None or x.is_meta:
        return False
    return not isinstance(x, FakeTensor) and not torch._C._functorch.is_functorch_wrapped_tensor(x)


def requires_grad(x: Tensor) -> bool:
    """Whether autograd records what is done with x, inside of ``torch.vmap`` too, where x itself doesn't say."""
    if not torch.compiler.is_compiling():
        while torch._C._functorch.is_functorch_wrapped_tensor(x):
            x = torch._C._functorch.get_unwrapped(x)
    return x.requires_grad


def check_range(
    name: str,
    x: Tensor,
    least: int | None = None,
    most: int | None = None,
    *,
    note: str = "",
    error: type[Exception] = ValueError,
) -> None:
    """Raise where an integer is out of range, if that can be seen without a device sync or a graph break.

    Args:
        note: said of the least value.
    """
    if x.device.type != "cpu" or x.numel() == 0 or torch.compiler.is_compiling():
        return
    if torch._C._functorch.is_batchedtensor(x):
        return
    low, high = (int(value) for value in x.aminmax())
    if (least is not None and low < least) or (most is not None and high > most):
        if most is None:
            must, got = f">= {least}{note}", f"{low}"
        elif least is None:
            must, got = f"<= {most}", f"{high}"
        else:
            must, got = f"from {least}{note} to {most}", f"{low}" if low == high else f"{low} to {high}"
        raise error(f"{name} must be {must}, got {got}")
