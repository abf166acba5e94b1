"""What a measurement ran on: hardware, versions, and the rates that the hardware sustains.

No host name, user name or path is ever recorded.
"""

from __future__ import annotations

import math
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Callable, Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import mmkernels
from mmkernels.meters import Run, time_once
from mmkernels.options import DTYPES
from mmkernels.runtime import cpu, host

PACKAGES = ("torch", "triton", "transformers", "numpy")


def describe_machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Returns hardware, versions and commit, ready for JSON."""
    described: dict[str, Any] = {
        "cpu": cpu_name(),
        "cores": host.physical_cores(),
        "isa": host.isa(),
        "caches_bytes": host.cache_sizes(),
        "memory_bytes": memory_of("cpu"),
        "torch_threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions(),
        "commit": commit(),
    }
    if torch.device(device).type == "cuda":
        described["gpu"] = describe_gpu(device)
    return described


def memory_of(device: torch.device | str) -> int:
    """Returns the bytes of memory that the device has."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def versions() -> dict[str, str | None]:
    """Returns the versions of mmkernels, Python and the packages that matter; None: not installed."""
    installed: dict[str, str | None] = {"mmkernels": mmkernels.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            installed[package] = None
    return installed


def cpu_name() -> str:
    """Returns the CPU's name as its maker writes it."""
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return match[1].strip() if match else platform.processor() or platform.machine()


def describe_gpu(device: torch.device | str) -> dict[str, Any]:
    """Returns name, memory, compute capability and clocks of a CUDA device."""
    properties = torch.cuda.get_device_properties(device)
    described = {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
    }
    fields = ("clocks.sm", "clocks.max.sm", "clocks.mem", "driver_version")
    index = torch.device(device).index or 0
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits", f"--id={index}"]
    values = _output_of(command)
    if values:
        described |= {
            name.replace(".", "_"): value.strip() for name, value in zip(fields, values.split(","), strict=False)
        }
    return described


def commit() -> str | None:
    """Returns the checkout's commit, with "+" where files differ from it; None outside a checkout."""
    root = Path(mmkernels.__file__).parents[1]
    if not (root / ".git").exists():
        return None
    head = _output_of(["git", "-C", str(root), "rev-parse", "HEAD"])
    changed = _output_of(["git", "-C", str(root), "status", "--porcelain", "--untracked-files=no"])
    return head and head + ("+" if changed else "")


def device_name(device: torch.device | str = "cpu") -> str:
    """Returns a name for people, such as "AMD EPYC, 2 cores" or "NVIDIA H200"."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    cores = host.physical_cores()
    return f"{cpu_name()}, {cores} core{'s' if cores != 1 else ''}"


def device_slug(device: torch.device | str = "cpu") -> str:
    """Returns a name for folders, such as "amd-epyc-2-cores"."""
    return re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")


def _output_of(command: list[str]) -> str | None:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


# The rates that the machine sustains. Each is that of bursts of some `BURST` seconds in which all threads work at once,
# and their median. No kernel of milliseconds reaches what shorter bursts show on a shared machine, or where two virtual
# cores are one.

BURST = 0.02  # seconds
_BURSTS = 3  # of which a rate is the median
_LARGEST = {"cpu": 2048, "cuda": 8192}  # rows of the square products

Burst = Callable[[], float]
"""Works for some `BURST` seconds; returns FLOP or bytes a second."""


def ceilings(device: torch.device | str = "cpu", dtypes: Iterable[str] = tuple(DTYPES)) -> dict[str, float]:
    """Returns the rates by name; of matrix products only those of `dtypes`."""
    return {
        "copy_bytes_per_second": copy_rate(device),
        "read_bytes_per_second": read_rate(device),
        **{f"{name}_flops_per_second": matmul_rate(DTYPES[name], device) for name in dtypes},
    }


@cache
def copy_rate(device: torch.device | str = "cpu") -> float:
    """Returns bytes a second, read and written, of copying a tensor much larger than the caches."""
    return _median(_copy(device))


@cache
def read_rate(device: torch.device | str = "cpu") -> float:
    """Returns bytes a second of adding up a tensor much larger than the caches."""
    return _median(_read(device))


def memory_rate(device: torch.device | str = "cpu") -> float:
    """Returns bytes a second of reading or of copying, whichever is more; on a GPU of copying, as GPU papers do."""
    return copy_rate(device) if torch.device(device).type == "cuda" else max(copy_rate(device), read_rate(device))


def matmul_rate(dtype: torch.dtype, device: torch.device | str = "cpu") -> float:
    """Returns FLOP a second of the fastest arithmetic that is known here, as `arithmetic` chooses it."""
    return _fastest(dtype, device)[0]


def arithmetic(dtype: torch.dtype, device: torch.device | str = "cpu") -> Burst:
    """Returns a burst of the fastest arithmetic: a square matrix product by the best of PyTorch's routes, or threads
    that only multiply and add in registers.

    On a CPU PyTorch's routes are the BLAS behind ``@`` and oneDNN. There float16 may be computed in float32, as many
    CPUs have no fast float16.
    """
    return _fastest(dtype, device)[1]


def memory(device: torch.device | str = "cpu") -> Burst:
    """Returns a burst of whatever `memory_rate` is the rate of."""
    return _copy(device) if memory_rate(device) == copy_rate(device) else _read(device)


@cache
def _fastest(dtype: torch.dtype, device: torch.device | str) -> tuple[float, Burst]:
    measured = [(_median(route), route) for route in _routes(dtype, device)]
    if torch.device(device).type == "cpu" and dtype == torch.float16:
        measured.append(_fastest(torch.float32, device))
    return max(measured, key=lambda pair: pair[0])


def _routes(dtype: torch.dtype, device: torch.device | str) -> list[Burst]:
    routes: list[Burst] = [_repeated(run, flops, device) for run, flops in _products(dtype, device)]
    if torch.device(device).type == "cpu" and cpu.why_not() is None:
        routes.append(lambda: cpu.peak(dtype, BURST))
    return routes


def _products(dtype: torch.dtype, device: torch.device | str) -> list[tuple[Run, float]]:
    """Returns each route to a square matrix product that takes about `BURST` seconds, or is as large as it may be."""
    size = 256
    while True:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        runs = _matmuls(a, b)
        if min(_warm_seconds(run, device) for run in runs) > BURST or size >= _LARGEST[torch.device(device).type]:
            return [(run, 2.0 * size**3) for run in runs]
        size *= 2


def _matmuls(a: Tensor, b: Tensor) -> list[Run]:
    runs: list[Run] = [lambda: a @ b]
    if a.device.type == "cpu" and torch.backends.mkldnn.is_available():
        try:
            packed = a.to_mkldnn(), b.to_mkldnn()
            F.linear(*packed)
        except RuntimeError:  # oneDNN has no kernel of this dtype for this CPU
            return runs
        runs.append(lambda: F.linear(*packed))
    return runs


@cache
def _copy(device: torch.device | str) -> Burst:
    source = _large(device)
    target = torch.ones_like(source)
    return _repeated(lambda: target.copy_(source), 2.0 * source.nbytes, device)


@cache
def _read(device: torch.device | str) -> Burst:
    source = _large(device)
    return _repeated(source.sum, float(source.nbytes), device)


@cache
def _large(device: torch.device | str) -> Tensor:
    return torch.ones(2**28 if torch.device(device).type == "cuda" else 2**26, device=device)


def _repeated(run: Run, work: float, device: torch.device | str) -> Burst:
    """Returns a burst of as many calls of `run` as take `BURST` seconds, each of which does some `work`."""
    calls = max(1, math.ceil(BURST / _warm_seconds(run, device)))

    def repeat() -> None:
        for _ in range(calls):
            run()

    return lambda: calls * work / time_once(repeat, device)


def _warm_seconds(run: Run, device: torch.device | str) -> float:
    """Returns the seconds of one call after another that is not counted."""
    time_once(run, device)
    return time_once(run, device)


def _median(burst: Burst) -> float:
    return statistics.median(burst() for _ in range(_BURSTS))
