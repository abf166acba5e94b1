"""How many matrix products a call makes: counted while it runs, not derived from what it should do."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from mmkernels.profiling.meters import Run

_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")


class Counted(NamedTuple):
    """A call's result, and the FLOP of its matrix products; None: none was seen."""

    result: Any
    flops: float | None


def count(run: Run, *, pytorch: bool = True) -> Counted:
    """Run once, counting the multiplications and additions of matrix products.

    PyTorch's are those that its profiler sees: in compiled code and inside the boundary of a custom op too, where
    ``torch.utils.flop_counter.FlopCounterMode`` counts nothing, or makes the compiled code run uncompiled. The CPU
    extension counts its own. What Triton's and CUDA kernels multiply is not seen.

    Args:
        pytorch: look at PyTorch's too; the profiler takes time, and memory for each operator that runs.
    """
    before = _by_extension()
    if not pytorch:
        return Counted(run(), (_by_extension() - before) or None)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, with_flops=True) as seen:
        result = run()
    flops = sum(event.flops or 0 for event in seen.events() or () if event.name in _PRODUCTS)
    return Counted(result, (_by_extension() - before + flops) or None)


def _by_extension() -> int:
    """FLOP of the CPU extension's matrix products since the process began."""
    counter = getattr(torch.ops.mmkernels, "cpu_multiplied", None)
    return 0 if counter is None else int(counter())
