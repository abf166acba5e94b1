"""What the host CPU offers, read from Linux's /proc and /sys, and from the CPU extension where it is built."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

from mmkernels.runtime import cpu

__all__ = ["cache_sizes", "compiler", "isa", "physical_cores", "why_not"]

_CPUS = Path("/sys/devices/system/cpu")

why_not: str | None = cpu.why_not()
"""Why the extension can't be used; None: it can."""


def isa() -> str:
    """The widest instruction set of this CPU and OS: avx512_bf16, avx512, avx2, neon or plain."""
    return isa_of_linux() if cpu.extension is None else str(cpu.extension.detect_isa())


def isa_of_linux() -> str:
    """`isa` without the extension; "plain" where /proc does not say."""
    if platform.machine() in ("aarch64", "arm64"):
        return "neon"
    match = re.search(r"^flags\s*:(.*)$", _read(Path("/proc/cpuinfo")), re.MULTILINE)
    flags = set(match[1].split()) if match else set()
    if {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= flags:
        return "avx512_bf16" if "avx512_bf16" in flags else "avx512"
    return "avx2" if {"avx2", "fma"} <= flags else "plain"


def cache_sizes() -> dict[str, int]:
    """Bytes of the caches that one core has access to, by l1d, l2, l3; 0 where unknown.

    Read from sysfs and not by sysconf, whose third level can be ten times too large in a virtual machine.
    """
    sizes = {"l1d": 0, "l2": 0, "l3": 0}
    for index in _CPUS.glob("cpu0/cache/index*"):
        level = _read(index / "level")
        name = "l1d" if level == "1" else f"l{level}"
        if name in sizes and _read(index / "type") != "Instruction":
            sizes[name] = int(_read(index / "size").removesuffix("K") or 0) * 1024
    return sizes


def physical_cores() -> int:
    """Cores that this process may run on; the threads of one core count once."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    allowed = os.sched_getaffinity(0)
    return len({_read(_CPUS / f"cpu{number}/topology/thread_siblings_list") or str(number) for number in allowed})


def compiler() -> str:
    """Name and version of the compiler that built the extension; "none" without it."""
    return "none" if cpu.extension is None else str(cpu.extension.compiler)


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
