"""The entries of an op's table for each kind of kernel."""

from __future__ import annotations

from collections.abc import Callable

from mmkernels.runtime import cpu, triton
from mmkernels.runtime.dispatch import Backend, Run

__all__ = ["cpu_kernel", "triton_kernel"]


def cpu_kernel(name: str) -> Backend:
    """Returns the backend "cpu": a kernel that ``csrc`` registers as ``torch.ops.mmkernels.<name>``."""
    kernel = cpu.Kernel(name)
    return Backend("cpu", kernel, kernel.why_not)


def triton_kernel(module: str, launcher: str, around: Callable[[Run], Run] = lambda run: run) -> Backend:
    """Returns the backend "triton": a launcher, a function of a module in an op's folder, imported when first called.

    Args:
        module: ``mmkernels.ops.<family>.<op>.triton...``; the plan of that op says what its kernels can't run.
        around: makes what computes all outputs of a launcher that computes a part of them.
    """
    _package, _ops, _family, op, *_ = module.split(".")
    return Backend("triton", around(triton.op(module, launcher)), triton.why_not_of(op))
