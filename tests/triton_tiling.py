"""What the tests of the Triton kernels share: where they run, and tiles of a given size. Imports Triton."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
import torch

from mmkernels.ops.attention.triton import call
from mmkernels.runtime import triton as gpu
from mmkernels.runtime import tuning
from mmkernels.runtime.tuning import Config

DEVICE = "cpu" if gpu.INTERPRETED or not torch.cuda.is_available() else "cuda"


@contextmanager
def tiled(queries: int, keys: int, listed: int = call.LISTED) -> Iterator[None]:
    """All kernels with tiles of this size; masks of `listed` scores or more with lists of tiles."""
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        for op, plan in tuning.plans().items():
            for kernel in plan.kernels:
                if kernel != "decode":
                    stack.enter_context(tuning.use_config(op, kernel, Config(queries, keys, 4, 1)))
        patch.setattr(call, "LISTED", listed)
        yield
