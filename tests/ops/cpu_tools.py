"""What the tests of the CPU kernels share: every instruction set and dtype, and a Python of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from mmkernels.runtime import cpu

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ISAS = cpu.isas()

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
each_isa = pytest.mark.parametrize("isa", ISAS)
needs_kernels = pytest.mark.skipif(cpu.why_not() is not None, reason=str(cpu.why_not()))


def python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run code in a new process, with `env` beside the environment of this one."""
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | env, capture_output=True, text=True, timeout=120
    )
