"""The door to the Triton kernels: why they can't run a call, and how one of them is launched.

Triton is imported by the first call that needs it: it is no requirement, and takes a while. On a CPU its kernels run
only under its interpreter (``TRITON_INTERPRET=1``, set before Triton is imported), which is for tests.
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

from mmkernels.runtime.arguments import leading
from mmkernels.runtime.tuning import Config

_MOST_CHANNELS = 256
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


def op(module: str, name: str) -> Callable[..., Any]:
    """The launcher `name` of a module that is imported when it is first called; for a table of backends."""

    @cache
    def found() -> Callable[..., Any]:
        launcher: Callable[..., Any] = getattr(importlib.import_module(module), name)
        return launcher

    return lambda args: found()(args)


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
    """Returns why a call with this record can't run on the Triton kernels, or None; without one, why no call can."""
    reason = _machine_why_not()
    if reason is not None or args is None:
        return reason
    x = leading(args)
    if x.device.type != ("cpu" if INTERPRETED else "cuda"):
        return f"the tensors are on {x.device}"
    if x.dtype not in _DTYPES:
        return f"{x.dtype} is not computed: sums are kept in float32"
    if INTERPRETED and x.dtype == torch.bfloat16:
        return "the interpreter multiplies no bfloat16"
    heads = (getattr(args, name, None) for name in ("query", "value"))
    widest = max((t.shape[3] for t in heads if t is not None and t.dim() == 4), default=0)
    if widest > _MOST_CHANNELS:
        return f"head dims above {_MOST_CHANNELS} do not fit into a multiprocessor, got {widest}"
    return _device_why_not(x.device)


@dataclass(frozen=True)
class Launch:
    """A launch as it was recorded instead of made.

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


_interpreter = threading.Lock()  # which rewrites Triton's own functions while a kernel runs
_recorded: list[Launch] | None = None
_launches = 0


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Note what would be launched, and launch nothing: for compiling ahead of time and for tests of the launchers."""
    global _recorded
    _recorded = []
    try:
        yield _recorded
    finally:
        _recorded = None


def launches() -> int:
    """How many launches were made since the process began."""
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
        with _interpreter:
            kernel[grid](*args, **constants, **options)
    else:
        kernel[grid](*args, **constants, **options)


def launch_options(config: Config) -> dict[str, Any]:
    """Options of Triton's compiler."""
    return {"num_warps": config.warps, "num_stages": config.stages, "enable_fp_fusion": True}


@cache
def multiprocessors(device: torch.device) -> int:
    """How many programs run side by side at least; 4 where the interpreter stands for a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
