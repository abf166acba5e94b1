"""What a benchmark learns from a call's first run, such as how many matrix products it makes: counted, not derived."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from mmkernels.bench.gate import Call, flat
from mmkernels.meters import Run, peak_memory
from mmkernels.runtime import cpu
from mmkernels.runtime import triton as gpu

_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")


class Counted(NamedTuple):
    """A call's result, and the FLOP of its matrix products; None: none was seen."""

    result: Any
    flops: float | None


def count(run: Run, *, pytorch: bool = True) -> Counted:
    """Run once, counting the multiplications and additions of matrix products.

    PyTorch's are those that its profiler sees: in compiled code and inside the boundary of a custom op too, where
    ``torch.utils.flop_counter.FlopCounterMode`` counts nothing, or makes the compiled code run uncompiled. The CPU
    extension counts each of its own where it is made. What Triton's kernels multiply is not seen: with one of them,
    nothing is counted.

    Args:
        pytorch: look at PyTorch's too; the profiler takes time, and memory for each operator that runs.
    """
    before, launched = cpu.multiplied(), gpu.launches()
    if not pytorch:
        result = run()
        return Counted(result, _total(cpu.multiplied() - before, launched))
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, with_flops=True) as seen:
        result = run()
    flops = sum(event.flops or 0 for event in seen.events() or () if event.name in _PRODUCTS)
    return Counted(result, _total(cpu.multiplied() - before + flops, launched))


def _total(flops: float, launched: int) -> float | None:
    return flops if flops and gpu.launches() == launched else None


class FirstRun:
    """A candidate's first run: results, seconds, FLOP of its matrix products (None: not counted), peak memory.

    A long one is weighed while it runs; PyTorch's products in it go uncounted, as counting them takes memory.
    """

    def __init__(self, call: Call, device: torch.device, long: bool, counts_products: bool) -> None:
        self._call, self._device = call, device
        self._memory: list[int | None] = []
        self.results: list[Tensor]
        self.flops: float | None = None
        run = self._weighed if long else lambda: flat(call())
        begin = time.perf_counter()
        if counts_products:
            self.results, self.flops = count(run, pytorch=not long)
        else:
            self.results = run()
        self.seconds = time.perf_counter() - begin

    def _weighed(self) -> list[Tensor]:
        kept: list[Tensor] = []
        self._memory.append(peak_memory(lambda: kept.extend(flat(self._call())), self._device))
        return kept or flat(self._call())

    def memory(self) -> int | None:
        """Measured now, if it was not yet."""
        self.results = []
        return self._memory[0] if self._memory else peak_memory(self._call, self._device)
