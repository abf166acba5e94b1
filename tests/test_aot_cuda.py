"""Every CUDA C++ kernel compiles for every GPU that the build names, and what it takes of one."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmkernels.aot import cache, cuda
from mmkernels.aot.resources import Row, Usage
from mmkernels.plan import CudaSource
from mmkernels.runtime import tuning

pytestmark = pytest.mark.skipif(cuda.why_not() is not None, reason=str(cuda.why_not()))

_LARGEST_BLOCK = 99 << 10  # of shared memory, on sm_86, sm_89 and sm_120


SMALL = CudaSource("small.cu", (), ("shared.h", "shared_bytes"))


@pytest.mark.slow
def test_every_kernel_compiles_and_nothing_spills() -> None:
    rows, _ = cuda.compile_all()
    assert {row.target for row in rows} == set(cuda.TARGETS)
    assert len({row[:3] for row in rows}) * len(cuda.TARGETS) == len(rows) == 26 * len(cuda.TARGETS)
    assert [row for row in rows if row.usage.spilled_bytes] == []
    assert all(0 < row.usage.code_bytes < 64 << 10 and row.usage.shared_bytes <= _LARGEST_BLOCK for row in rows)
    assert rows == sorted(rows)
    assert cuda.compile_all() == (rows, 0)


def test_names_that_people_read() -> None:
    plan = tuning.plan("cross_attention")
    assert plan is not None and plan.cuda is not None
    source = plan.cuda
    name = "_ZN9mmkernels13decode_kernelINS_{}ELi128ELi{}EEEvNS_13DecodeProblemE"
    assert cuda.readable(name.format("4Bf16", 1), source) == ("decode_kernel", "bfloat16 D128 1 row tile")
    assert cuda.readable(name.format("3F16", 4), source) == ("decode_kernel", "float16 D128 4 row tiles")
    merge = "_ZN9mmkernels19decode_merge_kernelINS_3F16EEEvNS_13DecodeProblemEi"
    assert cuda.readable(merge, source) == ("decode_merge_kernel", "float16")


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
    (tmp_path / "small.cu").write_text("__global__ void kernel() { not_there(); }\n")
    monkeypatch.setattr(cuda, "_CSRC", tmp_path)
    with pytest.raises(RuntimeError, match=r"small.cu\(1\): error: identifier \"not_there\" is undefined"):
        cuda.compile_source("op", SMALL, "sm_80")


def test_resources_of_small_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Static shared memory, and dynamic by the header's function of the first template argument."""
    body = "{ __shared__ float y[4]; y[threadIdx.x] = *x; __syncthreads(); *x = y[3 - threadIdx.x]; }\n"
    code = "namespace mmkernels {\n__global__ void small(float* x) " + body
    code += "template <int N> __global__ void wide(float* x) " + body + "template __global__ void wide<5>(float*);\n}\n"
    (tmp_path / "small.cu").write_text(code)
    (tmp_path / "shared.h").write_text("inline int shared_bytes(int n) { return 100 * n; }\n")
    monkeypatch.setattr(cuda, "_CSRC", tmp_path)
    small, wide = sorted(cuda.compile_source("op", SMALL, "sm_80"))
    assert small == Row("op", "small", "", "sm_80", Usage(small.usage.registers, 0, 16, small.usage.code_bytes))
    assert (wide.kernel, wide.usage.shared_bytes) == ("wide", 516)
    assert 0 < small.usage.registers < 32 and 0 < small.usage.code_bytes < 4096


def test_a_result_is_kept_until_a_file_that_it_includes_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in (("small.cu", '#include "a.h"\n#include <cmath>\n'), ("a.h", '#  include "deep/b.h"\n')):
        (tmp_path / name).write_text(text)
    (tmp_path / "deep").mkdir()
    for name in ("deep/b.h", "shared.h", "other.h"):
        (tmp_path / name).write_text("")
    rows = [Row("op", "small", "", "sm_80", Usage(1, 2, 3, 4))]
    monkeypatch.setattr(cuda, "_CSRC", tmp_path)
    monkeypatch.setattr(cache, "FOLDER", tmp_path / "kept")
    monkeypatch.setattr(cuda, "compile_source", lambda op, source, target: rows)
    for changed, compiled in (("small.cu", True), ("other.h", False), ("a.h", True), ("deep/b.h", True)):
        (tmp_path / changed).open("a").write("// more\n")
        assert cuda._compile_once("op", SMALL, "sm_80") == (rows, compiled), changed
        assert cuda._compile_once("op", SMALL, "sm_80") == (rows, False)
