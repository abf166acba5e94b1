"""How a call reaches a kernel: `dispatch` chooses, `cpu`, `triton` and `cuda` load and launch each kind of kernel."""

from mmkernels.runtime import cpu, cuda, triton

__all__ = ["cpu", "cuda", "triton"]
