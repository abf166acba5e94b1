"""The CPU extension: loads the kernels of ``csrc/``, chooses their instruction set, says why a call can't use them.

Environment:
    MMKERNELS_CPU_ISA: the widest instruction set that the kernels may use: ``avx512_bf16``, ``avx512``, ``avx2`` or
        ``plain``. Unset: the widest that the CPU has.
    MMKERNELS_CPU_EXTENSION: a file to load instead of the extension that was installed, such as one with sanitizers.

Both are read once, on import.
"""

from __future__ import annotations

import importlib.util
import os
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mmkernels.runtime.arguments import leading, result_types

__all__ = ["Kernel", "extension", "isas", "multiplied", "peak", "release", "use_isa", "why_not"]

_ISA, _EXTENSION = "MMKERNELS_CPU_ISA", "MMKERNELS_CPU_EXTENSION"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LIBRARY = torch.library.Library("mmkernels", "FRAGMENT")


def _load() -> tuple[Any, str | None]:
    """The extension's functions, or None and why it can't be used."""
    folder = Path(__file__).parents[1]
    reason = folder / "_cpu_why_not.txt"  # left by setup.py
    named = os.environ.get(_EXTENSION)
    library = Path(named) if named else folder / f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"
    if named and not library.is_file():
        raise ValueError(f"{_EXTENSION} must name a file, got {named!r}")
    if not library.exists():
        why = reason.read_text().strip() if reason.exists() else "there is no such file"
        return (
            None,
            f"the CPU extension is not built: {why}; install again with a C++ compiler and --no-build-isolation",
        )
    try:
        spec = importlib.util.spec_from_file_location("mmkernels._cpu", library)
        assert spec is not None and spec.loader is not None
        module: Any = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        built_for = module.torch_version
    except (OSError, ImportError, AttributeError) as error:
        return (
            None,
            f"the CPU extension does not load: {error}; install again to build it for torch {torch.__version__}",
        )
    if built_for != torch.__version__.partition("+")[0]:
        return None, (
            f"the CPU extension is built for torch {built_for}; install again to build it for {torch.__version__}"
        )
    wanted = os.environ.get(_ISA)
    if wanted and wanted not in module.isas():
        raise ValueError(f"{_ISA} must be one of {', '.join(module.isas())}, got {wanted!r}")
    if wanted:
        module.choose_isa(wanted)
    return module, None


extension, _unusable = _load()


def isas() -> list[str]:
    """The instruction sets that the kernels can use here, the one in use first; empty without the extension."""
    return [] if extension is None else list(extension.isas())


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Make the kernels use a narrower instruction set than they could; for the whole process, for tests and timings.

    Args:
        name: one of `isas()`.

    Raises:
        ValueError: the CPU has no such instruction set, or the extension can't be used.

    Example:
        >>> import torch
        >>> from mmkernels import cross_attention
        >>> from mmkernels.runtime import cpu
        >>> q = torch.randn(1, 2, 3, 8)
        >>> for isa in cpu.isas():
        ...     with cpu.use_isa(isa):
        ...         assert cross_attention(q, q, q).shape == q.shape
    """
    available = isas()
    if name not in available:
        raise ValueError(f"name must be one of {', '.join(available) or 'nothing'}, got {name!r}")
    extension.choose_isa(name)
    try:
        yield
    finally:
        extension.choose_isa(available[0])


def peak(dtype: torch.dtype, seconds: float) -> float:
    """Returns FLOP a second of all of torch's threads when they only multiply and add in registers, all at once.

    They do so for some `seconds`. Without the extension it is 0.
    """
    return 0.0 if extension is None else float(extension.peak(dtype == torch.bfloat16, seconds))


def multiplied() -> int:
    """FLOP of the contrastive and linear ops' matrix products since the process began; 0 without the extension."""
    return 0 if extension is None else int(extension.multiplied())


def release() -> None:
    """Free the memory that the kernels keep from one call to the next, up to 5 MiB a thread: for measurements."""
    if extension is not None:
        extension.release()


class Kernel:
    """A kernel of the extension, which reads the fields of an op's record by name.

    Args:
        name: of ``torch.ops.mmkernels.<name>``, which exists once `bind` has given it the record's schema.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._missing: str | None = None
        if extension is not None and not _is_registered(f"mmkernels::{name}"):
            self._missing = f"the CPU extension has no kernel {name}; build it again: make setup"

    @property
    def why_not(self) -> Callable[..., str | None]:
        """`why_not` of calls of this kernel, which an extension that is older than the sources does not have."""
        return why_not if self._missing is None else lambda args=None: self._missing

    def bind(self, schema: str, results: int) -> Callable[[Any], Any]:
        """Returns a function from records of this schema to the kernel's results, which are so many tensors."""
        if extension is None or self._missing is not None:
            return self
        _LIBRARY.define(f"{self._name}({schema}) -> {result_types(results)}")
        overload = getattr(torch.ops.mmkernels, self._name).default
        kernel = getattr(overload, "_op", overload)  # what the overload calls, without a Python function between
        return lambda args: kernel(*args)

    def __call__(self, args: Any) -> Any:
        raise RuntimeError(_unusable or self._missing or f"{self._name} has no schema yet")


def _is_registered(qualified: str) -> bool:
    found: bool = torch._C._dispatch_has_kernel(qualified) and torch._C._dispatch_has_kernel_for_dispatch_key(
        qualified, "CPU"
    )
    return found


def why_not(args: Any = None) -> str | None:
    """Returns why a call with this record can't run on the CPU kernels, or None; without one, why no call can."""
    if _unusable is not None or args is None:
        return _unusable
    x = leading(args)
    if not x.is_cpu:
        return f"the tensors are on {x.device}"
    if x.dtype not in _DTYPES:
        return f"{x.dtype} is not computed: sums are kept in float32"
    return None
