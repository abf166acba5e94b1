"""Argument checks and autocast, shared by every op. None of them waits for a device."""

from __future__ import annotations

import sys
from functools import reduce

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import Parameter

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""What every op takes."""
PLAIN = frozenset((Tensor, Parameter))
"""The types of tensors that are nothing else; a look at the type is the cheapest check."""
_NO_MEMORY = {
    "CausalBias": "it stands for a mask, which for causal_lower_right is SpanMask.causal(q_len, k_len), and for "
    "causal_upper_left SpanMask.causal(q_len, q_len)",
    "NestedTensor": "pad it, and pass the lengths as SpanMask.key_padding; or pack its rows into one sequence, with "
    "SpanMask.packed",
    "DTensor": "pass what this rank holds, x.to_local(), or all of it, x.full_tensor()",
    "MaskedTensor": "pass its data, x.get_data(), and for attention its mask as the argument mask",
    "UninitializedTensorMixin": "call its module once, which gives it a shape",
}
"""Classes of PyTorch whose memory is not what they stand for -> what to pass instead."""
_STRIDED, _FLOATING = torch.strided, frozenset(DTYPES)
FINITE = sys.float_info.max
"""The largest float: less than inf."""
_NUMBERS = (int, float, np.floating, np.integer, torch.SymInt, torch.SymFloat)


def check_tensor(name: str, x: object) -> None:
    """Raise TypeError unless x is a tensor whose values its strides find, or of a class that knows what an op is.

    A class of its own may hold its values elsewhere, and its memory may say nothing: `CausalBias` never writes it. One
    that overrides ``__torch_dispatch__`` or ``__torch_function__`` is asked by PyTorch, at the op's boundary.
    """
    if type(x) in PLAIN and x.layout is _STRIDED and not x.is_nested:  # type: ignore[attr-defined]
        return
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if (must := _wrong_class(x) or _wrong_layout(x)) is not None:
        raise TypeError(f"{name} must be {must}")


def check_floating(name: str, x: object) -> None:
    """Raise TypeError unless x is a tensor as in `check_tensor`, of one of `DTYPES`."""
    if type(x) in PLAIN and x.layout is _STRIDED and x.dtype in _FLOATING and not x.is_nested:  # type: ignore[attr-defined]
        return
    check_tensor(name, x)
    if isinstance(x, Tensor) and x.dtype not in _FLOATING:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")


def _wrong_class(x: Tensor) -> str | None:
    """Returns what a tensor must be and is not, by its class."""
    if type(x) in PLAIN or isinstance(x, FakeTensor):
        return None
    for base in type(x).__mro__:
        if base.__name__ in _NO_MEMORY and base.__module__.startswith("torch."):
            return f"a dense tensor, got {type(x).__name__}: {_NO_MEMORY[base.__name__]}"
    try:
        x.detach().dim()
    except (TypeError, NotImplementedError) as error:
        why = str(error).partition("\n")[0]
        return f"a tensor that operators take, got {type(x).__name__}: {why}"
    return None


def _wrong_layout(x: Tensor) -> str | None:
    """Returns what a tensor must be and is not, by its layout in memory."""
    if x.is_nested:
        return f"a dense tensor, got a nested one: {_NO_MEMORY['NestedTensor']}"
    return None if x.layout == _STRIDED else f"a dense tensor, got one of layout {x.layout}"


def check_bool(name: str, x: object) -> None:
    """Raise TypeError unless x is a bool: of a string such as "no" Python would make True."""
    if not isinstance(x, bool):
        raise TypeError(f"{name} must be a bool, got {type(x).__name__}")


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the dtype that autocast asks for on their device; as they are outside autocast, float64 always."""
    dtype = autocast_dtype(tensors[0])
    return tensors if dtype is None else tuple(_cast(x, dtype) for x in tensors)


def without_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors of an op that autocast must not round.

    They are as they are, or if autocast made some of them narrower than others, in the dtype that holds all values.
    """
    if autocast_dtype(tensors[0]) is None:
        return tensors
    dtypes = [x.dtype for x in tensors if isinstance(x, Tensor) and x.dtype in DTYPES]
    if len(set(dtypes)) < 2:
        return tensors
    dtype = reduce(torch.promote_types, dtypes)
    return tuple(_cast(x, dtype) for x in tensors)


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns x in `dtype`, but for float64, which stays, and for what the op's checks will refuse."""
    narrow = isinstance(x, Tensor) and x.dtype in (torch.float32, torch.float16, torch.bfloat16)
    return x.to(dtype) if narrow and _wrong_class(x) is None and _wrong_layout(x) is None else x


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast asks for on x's device; None outside autocast."""
    if not torch._C._is_any_autocast_enabled():
        return None
    if not isinstance(x, Tensor) or not torch.amp.is_autocast_available(x.device.type):
        return None
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else None


def can_look(x: Tensor) -> bool:
    """Whether Python may branch on a tensor's values: not in a trace, nor without values, nor within ``torch.vmap``."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None or x.is_meta:
        return False
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        if torch._C._functorch.is_batchedtensor(x):  # by `torch.vmap`, which runs once for all of its slices
            return False
        x = torch._C._functorch.get_unwrapped(x)
    return not isinstance(x, FakeTensor)


def is_traced() -> bool:
    """Whether `torch.export` or `torch.jit.trace` records a program, which must serve inputs of other sizes too."""
    return torch.compiler.is_exporting() or torch._C._get_tracing_state() is not None


def in_graph() -> bool:
    """Whether a graph is recorded now: by `torch.compile`, `torch.export` or `torch.jit.trace`."""
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None


def broadcasts(n: int, size: int) -> bool:
    """Whether a dim of n fits one of `size`.

    Sizes that depend on a graph's values are taken to fit: the graph compares them when it runs.

    Not ``n in (1, size)``: TorchDynamo takes that for False if n is a constant of the graph and `size` a symbol.
    """
    return is_known(n == 1) or not is_known(n != size)


def is_known(condition: bool | torch.SymBool | Tensor) -> bool:
    """Whether a condition on sizes is true; False in a graph where it depends on values, as of `nonzero`'s length.

    Args:
        condition: a tensor in `torch.jit.trace`.
    """
    if isinstance(condition, torch.SymBool) or torch.compiler.is_compiling():
        from torch.fx.experimental.symbolic_shapes import guard_or_false  # imports sympy, which takes half a second

        return guard_or_false(condition)  # type: ignore[arg-type]
    return bool(condition)


def requires_grad(x: Tensor) -> bool:
    """Whether autograd records what is done with x, at any level of ``torch.func``'s transforms."""
    if not torch.compiler.is_compiling():
        while not x.requires_grad and torch._C._functorch.is_functorch_wrapped_tensor(x):
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
    if isinstance(x, Tensor) and x.dim() == 0 and torch._C._get_tracing_state() is not None:
        return float(x)  # `torch.jit.trace` makes tensors of sizes and of what is computed from them
    if isinstance(x, bool) or not isinstance(x, _NUMBERS):
        raise TypeError(f"{name} must be {must}, got {type(x).__name__}")
    if isinstance(x, int) and abs(x) >= 2**1023:
        raise ValueError(f"{name} must be a number that a float can hold, got an integer of {x.bit_length()} bits")
    number: float = torch.sym_float(x)
    return number


def check_number(name: str, x: object, must: str, least: float = -FINITE, most: float = FINITE) -> float:
    """Returns x as a float, see `as_float`; raises ValueError if it is not finite, or not from `least` to `most`."""
    number = x if type(x) is float else as_float(name, x, must)
    if not least <= number <= most:
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
    if x.device.type != "cpu" or not can_look(x) or x.numel() == 0:
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
