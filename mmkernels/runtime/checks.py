"""Argument checks and autocast, shared by every op. None of them waits for a device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""What every op takes."""


def check_tensor(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got one of layout {x.layout}")


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the dtype that autocast asks for on their device; as they are outside autocast, float64 always."""
    dtype = autocast_dtype(tensors[0])
    if dtype is None:
        return tensors
    narrow = (torch.float32, torch.float16, torch.bfloat16)
    return tuple(x.to(dtype) if isinstance(x, Tensor) and x.dtype in narrow else x for x in tensors)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast asks for on x's device; None outside autocast."""
    if not torch._C._is_any_autocast_enabled():
        return None
    if not isinstance(x, Tensor) or not torch.amp.is_autocast_available(x.device.type):
        return None
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else None


def can_look(x: Tensor) -> bool:
    """Whether Python may branch on a tensor's values: not where a graph is traced, and not without values."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None or x.is_meta:
        return False
    return not isinstance(x, FakeTensor) and not torch._C._functorch.is_functorch_wrapped_tensor(x)


def is_traced() -> bool:
    """Whether `torch.export` or `torch.jit.trace` records a program, which must serve inputs of other sizes too."""
    return torch.compiler.is_exporting() or torch._C._get_tracing_state() is not None


def in_graph() -> bool:
    """Whether a graph is recorded now: by `torch.compile`, `torch.export` or `torch.jit.trace`."""
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None


def requires_grad(x: Tensor) -> bool:
    """Whether autograd records what is done with x, inside of ``torch.vmap`` too, where x itself doesn't say."""
    if not (x.requires_grad or torch.compiler.is_compiling()):
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
    if x.device.type != "cpu" or torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return
    if x.numel() == 0:
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
