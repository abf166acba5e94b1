"""Occupancy and tensor-pipe use of the main kernels by Nsight Compute: a part of `make gpu`.

Run as a script it launches each kernel once between ``cudaProfilerStart`` and ``Stop``, which is what ncu looks at.
"""

from __future__ import annotations

import csv
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from gpu import run_command

Result = dict[str, Any]  # as in gpu.py

_SECTIONS = ("SpeedOfLight", "Occupancy", "LaunchStats", "ComputeWorkloadAnalysis")
_KEEP = re.compile(
    r"^(Kernel Name|Grid Size|Block Size)$|duration|warps_active|maximum_warps|registers_per_thread|occupancy_limit"
    r"|shared_mem_per_block|pipe_tensor|pipe_.*mma|throughput.avg.pct"
)
_FOREIGN = re.compile(r"\bat::|cutlass|cublas|elementwise|distribution|Memcpy|Memset", re.IGNORECASE)
_LEAST_SHARE = 0.01  # of all kernels' time, below which a kernel is no main one


def profile_kernels(seconds: float) -> Result:
    """What ncu says about each kernel; nothing where there is no ncu, or where it may not read the counters."""
    program = shutil.which("ncu")
    if program is None:
        return {"summary": "not run: there is no ncu here"}
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "ncu.csv"
        command = [program, "--clock-control", "none", "--profile-from-start", "off", "--csv", "--page", "raw"]
        command += [word for section in _SECTIONS for word in ("--section", section)]
        command += ["--log-file", str(log), sys.executable, __file__]
        code = run_command(command, seconds)
        text = log.read_text(errors="replace") if log.exists() else ""
    kernels = parse(text.splitlines())
    if not kernels:
        said = [line for line in text.splitlines() if "==ERROR==" in line or "==WARNING==" in line]
        ended = "took too long" if code is None else f"ended with exit code {code}"
        return {"summary": f"not measured: ncu {ended}; {said[-1] if said else 'no kernel seen'}"}
    return {"summary": f"{len(kernels)} kernels", "lines": [_line(kernel) for kernel in kernels], "kernels": kernels}


def parse(lines: Iterable[str]) -> list[dict[str, str]]:
    """The kernels of ncu's raw page as CSV: after its own messages a line of names, one of units, and one a kernel."""
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
    own = [kernel for kernel in kernels if not _FOREIGN.search(kernel.get("Kernel Name", ""))]
    total = sum(_number(kernel, "duration") or 0.0 for kernel in own)
    return [kernel for kernel in own if (_number(kernel, "duration") or 0.0) >= _LEAST_SHARE * total]


def _number(kernel: dict[str, str], *words: str) -> float | None:
    """The largest of the figures whose name has all the words."""
    found = []
    for name, value in kernel.items():
        if all(word in name for word in words):
            try:
                found.append(float(value.replace(",", "")))
            except ValueError:
                continue
    return max(found, default=None)


def _line(kernel: dict[str, str]) -> str:
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


def calls(device: str, scale: int = 1) -> list[Callable[[], Any]]:
    """One call for each main kernel, at the benchmark's shapes; `scale` divides lengths, for tests."""
    import torch

    from mmkernels import SpanMask, attention_received, cross_attention
    from mmkernels.bench.gate import draw_cotangents, flat, with_gradients

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.bfloat16, device=device)

    def attention(heads: int, q_len: int, k_len: int, **more: Any) -> Callable[[], Any]:
        inputs = {"query": normal(1, heads, q_len, 128), "key": normal(1, heads, k_len, 128)}
        inputs |= {"value": normal(1, heads, k_len, 128)} | more
        inputs = {
            name: x.requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
            for name, x in inputs.items()
        }
        call = partial(cross_attention, **inputs)
        leaves = [x for x in inputs.values() if isinstance(x, torch.Tensor) and x.requires_grad]
        return with_gradients(call, leaves, draw_cotangents(flat(call())))

    long, text, image = 16384 // scale, 2048 // scale, 16384 // scale
    media = SpanMask.media((torch.arange(text, device=device) * 8 // text)[None], image // 8)
    keys = [normal(32 // scale or 1, 8, 4096 // scale, 128) for _ in range(2)]
    return [
        attention(16, long, long),
        attention(16, text, image, mask=media),
        attention(16, text, 2 * text, bias=normal(1, 16, text, 2 * text)),
        partial(cross_attention, normal(keys[0].shape[0], 32, 1, 128), *keys),
        partial(attention_received, normal(1, 16, text, 64), normal(1, 16, 2 * text, 64)),
    ]


def launch() -> None:
    import torch

    for call in calls("cuda"):
        call()  # what is compiled and allocated once is not looked at
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        call()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


if __name__ == "__main__":
    launch()
