"""A candidate's first run: its results, its peak memory, and the FLOP of its matrix products, counted as they run."""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from mmkernels.bench.gate import flat
from mmkernels.bench.peers import Call
from mmkernels.meters import Run, peak_memory
from mmkernels.runtime import cpu, triton

_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")


class Counted(NamedTuple):
    """A call's result, and the FLOP of its matrix products; None: they were not counted."""

    result: Any
    flops: float | None


def count(run: Run, *, pytorch: bool = True) -> Counted:
    """Runs once, and counts the multiplications and additions of matrix products.

    PyTorch's are those that its profiler records, also in compiled code and inside a custom op, where
    ``torch.utils.flop_counter.FlopCounterMode`` counts nothing, or makes the compiled code run uncompiled. The CPU
    extension counts its products itself. Those of Triton's kernels can't be counted: if one runs, the count is None.

    Args:
        pytorch: count PyTorch's too; the profiler takes time, and memory for each operator that runs.
    """
    before, launched = cpu.multiplied(), triton.launches()
    recorder = profile(activities=[ProfilerActivity.CPU], record_shapes=True, with_flops=True) if pytorch else None
    with recorder or nullcontext():
        result = run()
    events = (recorder and recorder.events()) or ()
    flops = cpu.multiplied() - before + sum(event.flops or 0 for event in events if event.name in _PRODUCTS)
    return Counted(result, flops if flops and triton.launches() == launched else None)


class FirstRun:
    """A candidate's first run: results, seconds, FLOP of its matrix products (None: not counted), peak memory.

    The memory of a `long` run is measured during it; then PyTorch's products are not counted, as that takes memory.
    """

    def __init__(self, call: Call, device: torch.device, long: bool, counts_products: bool) -> None:
        self._call, self._device = call, device
        self._memory: list[int | None] = []
        self.results: list[Tensor]
        self.flops: float | None = None
        run = self._measured if long else lambda: flat(call())
        begin = time.perf_counter()
        if counts_products:
            self.results, self.flops = count(run, pytorch=not long)
        else:
            self.results = run()
        self.seconds = time.perf_counter() - begin

    def _measured(self) -> list[Tensor]:
        kept: list[Tensor] = []
        self._memory.append(peak_memory(lambda: kept.extend(flat(self._call())), self._device))
        return kept or flat(self._call())

    def memory(self) -> int | None:
        """Returns the peak memory in bytes, by a further run unless this one was long; None: it can't be measured."""
        self.results = []
        return self._memory[0] if self._memory else peak_memory(self._call, self._device)
