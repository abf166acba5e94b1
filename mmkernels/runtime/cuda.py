"""The CUDA extension: loads the kernels of ``csrc/*/*.cu``. Untested on a GPU."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable
from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch

__all__ = ["op", "why_not", "why_not_device"]

_CAPABILITY = (8, 0)


def _load() -> str | None:
    """Returns why the extension can't be used, or None."""
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    folder = Path(__file__).parents[1]
    library = folder / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not library.exists():
        reason = folder / "_cuda_why_not.txt"  # left by setup.py
        why = reason.read_text().strip() if reason.exists() else "there is no such file"
        return f"the CUDA extension is not built: {why}; install again with nvcc and --no-build-isolation"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return f"the CUDA extension does not load: {error}; install again to build it for torch {torch.__version__}"
    return None


def op(name: str) -> Callable[[Any], Any]:
    """Returns the kernel ``torch.ops.mmkernels.<name>`` as a function of an op's record.

    The stable ABI passes arguments by position. The operator's schema, which stands in C++ beside the kernel, says
    which fields of the record the kernel takes.
    """
    global _unusable
    overload: Any = None
    try:
        if _unusable is None:
            overload = getattr(torch.ops.mmkernels, name).default
    except AttributeError:  # an extension that was built from older sources
        _unusable = f"the CUDA extension has no {name}; install again to build it"
    if _unusable is not None:

        def unusable(args: Any) -> Any:
            raise RuntimeError(_unusable)

        return unusable

    take = attrgetter(*(argument.name for argument in overload._schema.arguments))
    kernel = getattr(overload, "_op", overload)  # what the overload calls, without a Python function between
    return lambda args: kernel(*take(args))


def why_not() -> str | None:
    """Returns why no call can run on the CUDA kernels, or None."""
    return _unusable or (None if torch.cuda.is_available() else "there is no NVIDIA GPU")


@cache
def why_not_device(device: torch.device) -> str | None:
    """Returns why the kernels can't run on a GPU, or None."""
    if _unusable is not None:
        return _unusable
    if torch.cuda.get_device_capability(device) < _CAPABILITY:
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    return None


_unusable: str | None = _load()
