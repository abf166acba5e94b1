"""Every CUDA C++ kernel compiles for every GPU that the build names, and what it takes of one."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmkernels.aot import cuda
from mmkernels.aot.resources import Resources

pytestmark = pytest.mark.skipif(cuda.why_not() is not None, reason=str(cuda.why_not()))

_LARGEST_BLOCK = 99 << 10  # of shared memory, on sm_86, sm_89 and sm_120


@pytest.mark.slow
def test_every_kernel_compiles_and_nothing_spills() -> None:
    found = cuda.compile_all()
    assert {x.target for x in found} == set(cuda.TARGETS)
    assert len({(x.kernel, x.variant) for x in found}) * len(cuda.TARGETS) == len(found) == 26 * len(cuda.TARGETS)
    assert [x for x in found if x.spilled_bytes] == []
    assert all(0 < x.code_bytes < 64 << 10 and x.shared_bytes <= _LARGEST_BLOCK for x in found)
    assert found == sorted(found)


def test_names_that_people_read() -> None:
    name = "_ZN9mmkernels13decode_kernelINS_{}ELi128ELi{}EEEvNS_13DecodeProblemE"
    assert cuda._readable(name.format("4Bf16", 1)) == ("decode_kernel", "bfloat16 D128 1 row tile")
    assert cuda._readable(name.format("3F16", 4)) == ("decode_kernel", "float16 D128 4 row tiles")
    assert cuda._readable("_ZN9mmkernels19decode_merge_kernelINS_3F16EEEvNS_13DecodeProblemEi")[1] == "float16"


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
        cuda._compile("sm_80", tmp_path / "out.cubin", {})


def test_resources_of_a_small_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "namespace mmkernels { __global__ void small(float* x) { __shared__ float y[4]; y[threadIdx.x] = *x; "
    (tmp_path / "cuda.cu").write_text(code + "__syncthreads(); *x = y[3 - threadIdx.x]; } }\n")
    monkeypatch.setattr(cuda, "_CSRC", tmp_path)
    (small,) = cuda._compile("sm_80", tmp_path / "out.cubin", {})
    assert small == Resources("small", "", "sm_80", small.registers, 0, 16, small.code_bytes)
    assert 0 < small.registers < 32 and 0 < small.code_bytes < 4096
