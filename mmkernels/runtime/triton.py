"""Launches the Triton kernels, and says why they can't run a call.

Triton is imported by the first call that needs it: it is optional, and slow to import. On a CPU its kernels run only
under its interpreter (``TRITON_INTERPRET=1``, set before Triton is imported), which is for tests.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mmkernels.plan import Config
from mmkernels.runtime import tuning
from mmkernels.runtime.arguments import leading

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


def op(module: str, name: str) -> Callable[..., Any]:
    """Returns the launcher `name` of a module that is imported by its first call; for a table of backends."""

    @cache
    def load() -> Callable[..., Any]:
        launcher: Callable[..., Any] = getattr(importlib.import_module(module), name)
        return launcher

    return lambda args: load()(_resolved(args))


def _resolved(args: Any) -> Any:
    """Returns a record whose tensors lie in memory as they are: one that is negated lazily is written out.

    PyTorch's dispatcher does so for its own operators; a launcher hands the memory itself to a kernel.
    """
    if any(isinstance(x, Tensor) and x.is_neg() for x in args):
        return args._make(x.resolve_neg() if isinstance(x, Tensor) else x for x in args)
    return args


@cache
def _machine_why_not() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return 'Triton is not installed: pip install "mmkernels[gpu]"'
    if INTERPRETED:
        return None
    return None if torch.cuda.is_available() else "there is no GPU"


@cache
def _device_why_not(device: torch.device) -> str | None:
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    return None


def why_not(args: Any = None) -> str | None:
    """Returns why a call with this record can't run on the Triton kernels, or None; without one, why no call can.

    While launches are recorded, tensors may be on any device.
    """
    reason = None if _recorded is not None else _machine_why_not()
    if reason is not None or args is None:
        return reason
    x = leading(args)
    if _recorded is None and x.device.type != ("cpu" if INTERPRETED else "cuda"):
        return f"the tensors are on {x.device}"
    if x.dtype not in _DTYPES:
        return f"{x.dtype} is not computed: sums are kept in float32"
    if INTERPRETED and any(isinstance(part, torch.Tensor) and part.dtype == torch.bfloat16 for part in args):
        return "the interpreter multiplies no bfloat16"
    return _device_why_not(x.device)


def why_not_of(op: str) -> Callable[..., str | None]:
    """Returns the `why_not` of one op: the reasons above, then those of the op's plan."""

    def reason(args: Any = None) -> str | None:
        found = why_not(args)
        if found is not None or args is None:
            return found
        plan = tuning.plan(op)
        return None if plan is None else plan.why_not(args)

    return reason


@dataclass(frozen=True)
class Launch:
    """A launch that was recorded instead of made.

    Args:
        kernel: the ``@triton.jit`` function.
        args: tensors, numbers, None, descriptors, and tuples of them.
        constants: the constexpr arguments by name.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: dict[str, Any]
    config: Config


_interpreter = threading.Lock()  # the interpreter rewrites Triton's own functions while a kernel runs
_recorded: list[Launch] | None = None
_launches = 0


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Record launches instead of making them: for compiling ahead of time and for tests of the launchers.

    No machine and no device is refused meanwhile, so that ``backend="triton"`` can be asked for on CPU tensors.
    """
    global _recorded
    _recorded = []
    try:
        yield _recorded
    finally:
        _recorded = None


def launches() -> int:
    """Returns how many launches were made since the process began."""
    return _launches


def launch(kernel: Any, grid: tuple[int, ...], config: Config, *args: Any, **constants: Any) -> None:
    """Launch `kernel` on the device of the first tensor among `args`."""
    if 0 in grid:
        return
    if _recorded is not None:
        _recorded.append(Launch(kernel, grid, args, constants, config))
        return
    global _launches
    _launches += 1
    first = next(x for x in args if isinstance(x, Tensor))
    options = launch_options(config)
    if first.is_cuda and first.device.index != torch.cuda.current_device():
        with torch.cuda.device(first.device):
            kernel[grid](*args, **constants, **options)
    elif INTERPRETED:
        with _interpreting():
            kernel[grid](*args, **constants, **options)
    else:
        kernel[grid](*args, **constants, **options)


@contextmanager
def _interpreting() -> Iterator[None]:
    """Lets one thread interpret a kernel, and the language be patched once for each module whose functions it calls.

    The interpreter by itself patches it at each call of a function, which takes more time than the kernel.
    """
    from triton.runtime import interpreter

    patch, patched = interpreter._patch_lang, set()

    def patch_once(function: Any) -> Any:
        if function.__module__ in patched:
            return None  # which only the first call's caller, the one that restores the language, would use
        patched.add(function.__module__)
        return patch(function)

    with _interpreter:
        interpreter._patch_lang = patch_once
        try:
            yield
        finally:
            interpreter._patch_lang = patch


def launch_options(config: Config) -> dict[str, Any]:
    """Returns the options of Triton's compiler."""
    return {"num_warps": config.warps, "num_stages": config.stages, "enable_fp_fusion": True}


@cache
def multiprocessors(device: torch.device) -> int:
    """Returns how many programs run side by side at least; 4 where there is no GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
