"""Occupancy and tensor-pipe use of the kernels by Nsight Compute: a part of `make gpu`.

Run as a script it makes one call for each kernel that the ops' plans tune, between ``cudaProfilerStart`` and ``Stop``,
which is what ncu looks at.
"""

from __future__ import annotations

import csv
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from gpu_parts import Result, run_command

_SECTIONS = ("SpeedOfLight", "Occupancy", "LaunchStats", "ComputeWorkloadAnalysis")
_KEEP = re.compile(
    r"^(Kernel Name|Grid Size|Block Size)$|duration|warps_active|maximum_warps|registers_per_thread|occupancy_limit"
    r"|shared_mem_per_block|pipe_tensor|pipe_.*mma|throughput.avg.pct"
)
_FOREIGN = re.compile(r"\bat::|cutlass|cublas|elementwise|distribution|Memcpy|Memset", re.IGNORECASE)
_LEAST_SHARE = 0.01  # of all kernels' time, below which a kernel is no main one


def profile_kernels(log: Path, seconds: float) -> Result:
    """Returns what ncu says about each kernel; nothing where there is no ncu, or it may not read the counters."""
    program = shutil.which("ncu")
    if program is None:
        return {"summary": "not run: there is no ncu here"}
    command = [program, "--clock-control", "none", "--profile-from-start", "off", "--csv", "--page", "raw"]
    command += [word for section in _SECTIONS for word in ("--section", section)]
    code = run_command([*command, "--log-file", str(log), sys.executable, __file__], seconds)
    text = log.read_text(errors="replace") if log.exists() else ""
    kernels = parse(text.splitlines())
    if not kernels:
        said = [line for line in text.splitlines() if "==ERROR==" in line or "==WARNING==" in line]
        ended = "took too long" if code is None else f"ended with exit code {code}"
        return {"summary": f"not measured: ncu {ended}; {said[-1] if said else 'no kernel seen'}"}
    return {"summary": f"{len(kernels)} kernels", "lines": list(map(describe, kernels)), "kernels": kernels}


def parse(lines: Iterable[str]) -> list[dict[str, str]]:
    """Returns the main kernels of ncu's raw page as CSV: after messages a line of names, one of units, one a kernel."""
    table = list(csv.reader(line for line in lines if line.startswith('"')))
    if len(table) < 3:
        return []
    names, units, *rows = table
    kernels = [
        {
            f"{name} [{unit}]" if unit else name: value
            for name, unit, value in zip(names, units, row, strict=False)
            if _KEEP.search(name)
        }
        for row in rows
    ]
    ours = [kernel for kernel in kernels if not _FOREIGN.search(kernel.get("Kernel Name", ""))]
    total = sum(_number(kernel, "duration") or 0.0 for kernel in ours)
    return [kernel for kernel in ours if (_number(kernel, "duration") or 0.0) >= _LEAST_SHARE * total]


def _number(kernel: dict[str, str], *words: str) -> float | None:
    """Returns the largest of the figures whose name has all the words."""
    values = (value.replace(",", "") for name, value in kernel.items() if all(word in name for word in words))
    return max((float(value) for value in values if re.fullmatch(r"-?[\d.]+(e[-+]?\d+)?", value)), default=None)


def describe(kernel: dict[str, str]) -> str:
    """Returns a line about a kernel for people."""

    def percent(*words: str) -> str:
        value = _number(kernel, *words)
        return "n/a" if value is None else f"{value:.0f} %"

    name = kernel.get("Kernel Name", "?").partition("(")[0]
    registers = _number(kernel, "registers_per_thread")
    tensor = percent("tensor", "pct") if _number(kernel, "tensor", "pct") is not None else percent("mma", "pct")
    return (
        f"{name}: tensor pipe {tensor}, warps active {percent('warps_active', 'pct')}, "
        f"registers {'n/a' if registers is None else f'{registers:.0f}'}"
    )


def launch(device: str = "cuda", backend: str = "triton") -> Iterator[str]:
    """Makes one call for each kernel that is tuned, and returns the kernels' names."""
    import torch
    from tune import Timed

    from mmkernels.runtime import tuning

    for op, plan in tuning.plans().items():
        for kernel, search in plan.searches.items():
            timed = Timed(op, search.problems[0], torch.bfloat16, 128, torch.device(device), backend)
            timed.call()  # what is compiled and allocated once is not looked at
            if device == "cuda":
                torch.cuda.synchronize()
                torch.cuda.profiler.start()
                timed.call()
                torch.cuda.synchronize()
                torch.cuda.profiler.stop()
            yield kernel


if __name__ == "__main__":
    print(", ".join(launch()))
