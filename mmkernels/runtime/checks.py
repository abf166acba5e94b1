"""Argument checks and autocast, shared by every op. None of them waits for a device."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""What every op takes."""
_NUMBERS = (int, float, np.floating, np.integer, torch.SymInt, torch.SymFloat)


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


def without_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors of an op that autocast must not round: as they are, or if autocast made some of them narrower than
    others, in the dtype that holds the values of all."""
    if autocast_dtype(tensors[0]) is None:
        return tensors
    dtype = tensors[0].dtype
    for x in tensors[1:]:
        if isinstance(x, Tensor) and x.dtype in DTYPES and dtype in DTYPES:
            dtype = torch.promote_types(dtype, x.dtype)
    return tuple(x.to(dtype) if isinstance(x, Tensor) and x.dtype in DTYPES else x for x in tensors)


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


def requires_grad(x: Tensor) -> bool:
    """Whether autograd records what is done with x, inside of ``torch.vmap`` too, where x itself doesn't say."""
    if not (x.requires_grad or torch.compiler.is_compiling()):
        while torch._C._functorch.is_functorch_wrapped_tensor(x):
            x = torch._C._functorch.get_unwrapped(x)
    return x.requires_grad


def as_float(name: str, x: object, must: str) -> float:
    """Returns x as a float. One that a graph computes stays symbolic: `float` would make a constant of it.

    Args:
        must: what it must be, for the error.

    Raises:
        TypeError: x is not a number.
    """
    if type(x) is float:
        return x
    if isinstance(x, bool) or not isinstance(x, _NUMBERS):
        raise TypeError(f"{name} must be {must}, got {type(x).__name__}")
    if isinstance(x, int) and abs(x) >= 2**1023:
        raise ValueError(f"{name} must be a number that a float can hold, got an integer of {x.bit_length()} bits")
    number: float = torch.sym_float(x)
    return number


def check_number(name: str, x: object, must: str, least: float = -math.inf, most: float = math.inf) -> float:
    """Returns x as a float, see `as_float`; raises ValueError if it is not finite, or not from `least` to `most`."""
    number = as_float(name, x, must)
    if not (-math.inf < number < math.inf and least <= number <= most):
        raise ValueError(f"{name} must be {must}, got {x!r}")
    return number


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
