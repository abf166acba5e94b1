"""The CPU extension: loads the kernels of ``csrc/``, chooses their instruction set, says why a call can't use them.

Environment:
    MMKERNELS_CPU_ISA: the widest instruction set that the kernels may use: ``avx512_bf16``, ``avx512``, ``avx2`` or
        ``plain``. Unset: the widest that the CPU has.
    MMKERNELS_CPU_EXTENSION: a file to load instead of the extension that was installed, such as one with sanitizers.

Both are read once, on import.
"""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mmkernels.runtime.arguments import leading

__all__ = ["isas", "op", "peak", "release", "use_isa", "why_not"]

_ISA, _EXTENSION = "MMKERNELS_CPU_ISA", "MMKERNELS_CPU_EXTENSION"
_ASK = "?"  # changes nothing
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _load() -> str | None:
    """Why the extension can't be used, or None."""
    folder = Path(__file__).parents[1]
    reason = folder / "_cpu_why_not.txt"  # left by setup.py
    named = os.environ.get(_EXTENSION)
    library = Path(named) if named else folder / f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"
    if named and not library.is_file():
        raise ValueError(f"{_EXTENSION} must name a file, got {named!r}")
    if not library.exists():
        why = reason.read_text().strip() if reason.exists() else "there is no such file"
        return f"the CPU extension is not built: {why}; install again with a C++ compiler and --no-build-isolation"
    try:
        torch.ops.load_library(str(library))
        built_for = str(torch.ops.mmkernels.cpu_torch())
    except (OSError, RuntimeError, AttributeError) as error:
        return f"the CPU extension does not load: {error}; install again to build it for torch {torch.__version__}"
    if built_for != torch.__version__.partition("+")[0]:
        return f"the CPU extension is built for torch {built_for}; install again to build it for {torch.__version__}"
    wanted = os.environ.get(_ISA, "")
    try:
        torch.ops.mmkernels.cpu_isa(wanted)
    except (ValueError, RuntimeError):
        raise ValueError(f"{_ISA} must be one of {', '.join(isas())}, got {wanted!r}") from None
    return None


def isas() -> list[str]:
    """The instruction sets that the kernels can use here, the one in use first; empty without the extension."""
    return [] if _unusable else str(torch.ops.mmkernels.cpu_isa(_ASK)).split()


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Make the kernels use a narrower instruction set than they could; for the whole process, for tests and timings.

    Args:
        name: one of `isas()`.

    Raises:
        ValueError: the CPU has no such instruction set, or the extension is not there.

    Example:
        >>> import torch
        >>> from mmkernels import cross_attention
        >>> from mmkernels.runtime import cpu
        >>> q = torch.randn(1, 2, 3, 8)
        >>> for isa in cpu.isas():
        ...     with cpu.use_isa(isa):
        ...         assert cross_attention(q, q, q).shape == q.shape
    """
    offered = isas()
    if name not in offered:
        raise ValueError(f"name must be one of {', '.join(offered) or 'nothing'}, got {name!r}")
    torch.ops.mmkernels.cpu_isa(name)
    try:
        yield
    finally:
        torch.ops.mmkernels.cpu_isa(offered[0])


def peak(dtype: torch.dtype, seconds: float) -> float:
    """Returns FLOP a second of all of torch's threads when they only multiply and add in registers, all at once.

    They do so for some `seconds`. Without the extension it is 0.
    """
    return 0.0 if _unusable else float(torch.ops.mmkernels.cpu_peak(dtype == torch.bfloat16, seconds))


def release() -> None:
    """Give back the memory that the kernels keep from one call to the next, up to 5 MiB a thread: for measurements."""
    if _unusable is None:
        torch.ops.mmkernels.cpu_release()


def op(name: str) -> Callable[[Any], Any]:
    """Returns a function from an op's record to what the kernel ``torch.ops.mmkernels.<name>`` makes of its fields."""
    if _unusable is None:
        overload = getattr(torch.ops.mmkernels, name).default
        kernel = getattr(overload, "_op", overload)  # what the overload calls, without a Python function between
        names = [x.name for x in overload._schema.arguments]  # TEMPORARY
        return lambda args: kernel(*(_value(args, n) for n in names))

    def unusable(args: Any) -> Any:
        raise RuntimeError(_unusable)

    return unusable


def _value(args: Any, n: str) -> Any:  # TEMPORARY
    if n == "needs":
        return [getattr(args, f) for f in args._fields if f.startswith(("need_", "keep_"))]
    return getattr(args, n)


def why_not(args: Any = None) -> str | None:
    """Returns why a call with this record can't run on the CPU kernels, or None; without one, why no call can."""
    if _unusable is not None or args is None:
        return _unusable
    x = leading(args)
    if x.device.type != "cpu":
        return f"the tensors are on {x.device}"
    if x.dtype not in _DTYPES:
        return f"{x.dtype} is not computed: sums are kept in float32"
    return None


_unusable: str | None = None
_unusable = _load()
