"""Every CUDA C++ kernel compiles for every GPU that the build names, and what it takes of one."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmkernels.aot import cuda
from mmkernels.plan import CudaSource
from mmkernels.runtime import tuning

pytestmark = pytest.mark.skipif(cuda.why_not() is not None, reason=str(cuda.why_not()))

PLAN = tuning.plan("cross_attention")
assert PLAN is not None and PLAN.cuda is not None
SOURCE = PLAN.cuda
SMALL = CudaSource("cuda.cu", arguments=(), shared_bytes=("none.h", "none"))
_LARGEST_BLOCK = 99 << 10  # of shared memory, on sm_86, sm_89 and sm_120


@pytest.mark.slow
def test_every_kernel_compiles_and_nothing_spills() -> None:
    rows, _ = cuda.compile_all()
    assert {x.target for x in rows} == set(cuda.TARGETS)
    assert len({(x.kernel, x.variant) for x in rows}) * len(cuda.TARGETS) == len(rows) == 26 * len(cuda.TARGETS)
    assert [x for x in rows if x.usage.spilled_bytes] == []
    assert all(0 < x.usage.code_bytes < 64 << 10 and x.usage.shared_bytes <= _LARGEST_BLOCK for x in rows)
    assert rows == sorted(rows)
    assert cuda.compile_all() == (rows, 0)  # nothing is compiled twice


def test_names_that_people_read() -> None:
    name = "_ZN9mmkernels13decode_kernelINS_{}ELi128ELi{}EEEvNS_13DecodeProblemE"
    assert cuda.readable(name.format("4Bf16", 1), SOURCE) == ("decode_kernel", "bfloat16 D128 1 row tile")
    assert cuda.readable(name.format("3F16", 4), SOURCE) == ("decode_kernel", "float16 D128 4 row tiles")
    merge = "_ZN9mmkernels19decode_merge_kernelINS_3F16EEEvNS_13DecodeProblemEi"
    assert cuda.readable(merge, SOURCE)[1] == "float16"


def test_what_ptxas_says() -> None:
    log = (
        "ptxas info    : Compiling entry function 'one' for 'sm_80'\n"
        "    8 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads\n"
        "ptxas info    : Used 40 registers, used 1 barriers, 512 bytes smem, 584 bytes cmem[0]\n"
        "ptxas info    : Compiling entry function 'two' for 'sm_80'\n"
        "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
        "ptxas info    : Used 24 registers, used 0 barriers\n"
    )
    assert list(cuda._parse(log)) == [("one", 40, 20, 512), ("two", 24, 0, 0)]


def test_an_error_is_nvccs_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cuda.cu").write_text("__global__ void kernel() { not_there(); }\n")
    monkeypatch.setattr(cuda, "_CSRC", tmp_path)
    with pytest.raises(RuntimeError, match=r"cuda.cu\(1\): error: identifier \"not_there\" is undefined"):
        cuda.compile_source("op", SMALL, "sm_80")


def test_resources_of_a_small_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "namespace mmkernels { __global__ void small(float* x) { __shared__ float y[4]; y[threadIdx.x] = *x; "
    (tmp_path / "cuda.cu").write_text(code + "__syncthreads(); *x = y[3 - threadIdx.x]; } }\n")
    monkeypatch.setattr(cuda, "_CSRC", tmp_path)
    (small,) = cuda.compile_source("op", SMALL, "sm_80")
    assert (small.op, small.kernel, small.variant, small.target) == ("op", "small", "", "sm_80")
    assert (small.usage.spilled_bytes, small.usage.shared_bytes) == (0, 16)
    assert 0 < small.usage.registers < 32 and 0 < small.usage.code_bytes < 4096
