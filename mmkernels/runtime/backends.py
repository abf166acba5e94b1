"""The entries of an op's table for each kind of kernel."""

from __future__ import annotations

from mmkernels.runtime import cpu, triton
from mmkernels.runtime.dispatch import Backend

__all__ = ["cpu_kernel", "triton_kernel"]


def cpu_kernel(name: str, results: int | None = None) -> Backend:
    """Returns the backend "cpu": a kernel that ``csrc`` registers as ``torch.ops.mmkernels.<name>``.

    Args:
        results: how many tensors it returns; None: as many as the op.
    """
    kernel = cpu.Kernel(name, results)
    return Backend("cpu", kernel, kernel.why_not)


def triton_kernel(module: str, launcher: str) -> Backend:
    """Returns the backend "triton": a launcher, a function of a module in an op's folder, imported when first called.

    Args:
        module: ``mmkernels.ops.<family>.<op>.triton...``; the plan of that op says what its kernels can't run.
    """
    _package, _ops, _family, op, *_ = module.split(".")
    return Backend("triton", triton.op(module, launcher), triton.why_not_of(op))
