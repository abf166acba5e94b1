"""What a measurement ran on: hardware, versions, and what the hardware gives at best.

No host name, user name or path is ever recorded.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Iterable
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
    """Hardware, versions and commit, ready for JSON."""
    described: dict[str, Any] = {
        "cpu": cpu_name(),
        "cores": host.physical_cores(),
        "isa": host.isa(),
        "caches_bytes": host.cache_sizes(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "torch_threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions(),
        "commit": commit(),
    }
    if torch.device(device).type == "cuda":
        described["gpu"] = describe_gpu(device)
    return described


def versions() -> dict[str, str | None]:
    """Of mmkernels, Python and what it runs on; None: not installed."""
    found: dict[str, str | None] = {"mmkernels": mmkernels.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def cpu_name() -> str:
    """The CPU's name as its maker writes it."""
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return match[1].strip() if match else platform.processor() or platform.machine()


def describe_gpu(device: torch.device | str) -> dict[str, Any]:
    """Name, memory, compute capability and clocks of a CUDA device."""
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
    answer = _output_of(command)
    if answer:
        described |= {
            name.replace(".", "_"): value.strip() for name, value in zip(fields, answer.split(","), strict=False)
        }
    return described


def commit() -> str | None:
    """The checkout's commit, with "+" where files differ from it; None outside a checkout."""
    root = Path(mmkernels.__file__).parents[1]
    if not (root / ".git").exists():
        return None
    found = _output_of(["git", "-C", str(root), "rev-parse", "HEAD"])
    changed = _output_of(["git", "-C", str(root), "status", "--porcelain", "--untracked-files=no"])
    return found and found + ("+" if changed else "")


def device_name(device: torch.device | str = "cpu") -> str:
    """For people, such as "AMD EPYC, 2 cores" or "NVIDIA H200"."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    cores = host.physical_cores()
    return f"{cpu_name()}, {cores} core{'s' if cores != 1 else ''}"


def device_slug(device: torch.device | str = "cpu") -> str:
    """For folder names, such as "amd-epyc-2-cores"."""
    return re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")


def _output_of(command: list[str]) -> str | None:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


# What the machine gives at best.


def ceilings(device: torch.device | str = "cpu", dtypes: Iterable[str] = tuple(DTYPES)) -> dict[str, float]:
    """The measured rates, by name; of matrix products only those of `dtypes`."""
    return {
        "copy_bytes_per_second": copy_rate(device),
        "read_bytes_per_second": read_rate(device),
        **{f"{name}_flops_per_second": matmul_rate(DTYPES[name], device) for name in dtypes},
    }


@cache
def copy_rate(device: torch.device | str = "cpu") -> float:
    """Bytes a second, read and written, of copying a tensor much larger than the caches into memory already touched."""
    source = _large(device)
    target = torch.ones_like(source)
    return 2 * source.numel() * source.element_size() / _best(lambda: target.copy_(source), device)


@cache
def read_rate(device: torch.device | str = "cpu") -> float:
    """Bytes a second of adding up a tensor much larger than the caches."""
    source = _large(device)
    return source.numel() * source.element_size() / _best(source.sum, device)


def memory_rate(device: torch.device | str = "cpu") -> float:
    """Bytes a second of reading or of copying, whichever is more; on a GPU of copying, to which its field compares."""
    return copy_rate(device) if torch.device(device).type == "cuda" else max(copy_rate(device), read_rate(device))


def _large(device: torch.device | str) -> Tensor:
    return torch.ones(2**28 if torch.device(device).type == "cuda" else 2**26, device=device)


@cache
def matmul_rate(dtype: torch.dtype, device: torch.device | str = "cpu") -> float:
    """FLOP a second of a square matrix product, the best of the routes that PyTorch offers; on a CPU, if that is more,
    of threads that only multiply and add in registers.

    On a CPU PyTorch's route is the BLAS behind ``@`` or oneDNN, whichever is faster, and float16 may be computed in
    float32, as many CPUs have no fast float16 at all. The size is what ends within a fraction of a second.
    """
    rate = _matmul_rate(dtype, device)
    if torch.device(device).type != "cpu":
        return rate
    if dtype == torch.float16:
        rate = max(rate, matmul_rate(torch.float32, device))
    return max(rate, cpu.peak(dtype))


def _matmul_rate(dtype: torch.dtype, device: torch.device | str) -> float:
    size = 256
    while True:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        runs = _matmuls(a, b)
        seconds = min(_best(run, device) for run in runs)
        if seconds > 0.05 or size >= (8192 if torch.device(device).type == "cuda" else 2048):
            return 2 * size**3 / seconds
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


def _best(run: Run, device: torch.device | str, budget: float = 0.15) -> float:
    """The shortest of the calls that fit in about `budget` seconds, at least 2 after a warm-up."""
    times = [time_once(run, device)]
    while len(times) < 3 or (sum(times) < budget and len(times) < 100):
        times.append(time_once(run, device))
    return min(times[1:])
