"""What the host CPU offers is plausible, and what Python reads of it agrees with what C++ finds."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest

import mmkernels
from mmkernels.runtime import cpu, host

ISAS = ["avx512_bf16", "avx512", "avx2", "neon", "plain"]
needs_extension = pytest.mark.skipif(cpu.why_not() is not None, reason=str(cpu.why_not()))


def test_isa_is_one_of_the_documented() -> None:
    assert host.isa() in ISAS
    assert host.isa_of_linux() in ISAS


def test_cache_sizes_are_bytes_that_grow_with_the_level() -> None:
    sizes = host.cache_sizes()
    assert list(sizes) == ["l1d", "l2", "l3"]
    known = [size for size in sizes.values() if size]
    assert known == sorted(known)
    assert all(size >= 4096 for size in known)


def test_physical_cores_fit_the_machine() -> None:
    assert 1 <= host.physical_cores() <= (os.cpu_count() or 1)


@pytest.mark.skipif(sys.platform != "linux", reason="Python reads Linux's /proc")
def test_python_and_the_extension_find_the_same_isa() -> None:
    assert host.isa_of_linux() == host.isa()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no CPU affinity on this platform")
def test_physical_cores_counts_only_those_it_may_run_on() -> None:
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert host.physical_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)


def test_compiler_is_named_where_there_is_one() -> None:
    assert (host.compiler() == "none") == (host.why_not is not None)


@pytest.mark.skipif(os.environ.get("MMKERNELS_REQUIRE_EXT") != "1", reason="the extension need not be built here")
def test_what_must_be_built_loads() -> None:
    assert host.why_not is None and cpu.why_not() is None


@needs_extension
def test_the_extension_reports_an_instruction_set_that_it_does_not_have() -> None:
    with pytest.raises(ValueError, match="no instruction set 'sse9'"):
        cpu.extension.choose_isa("sse9")


@needs_extension
def test_a_kernel_names_the_operator_and_the_argument_that_its_schema_lacks() -> None:
    """The extension alone, with a schema that is not made from the op's record."""
    library = os.environ.get("MMKERNELS_CPU_EXTENSION") or next(
        str(path) for path in Path(mmkernels.__file__).parent.glob("_cpu*") if path.name.endswith(EXTENSION_SUFFIXES[0])
    )
    code = f"""
import importlib.util, torch
spec = importlib.util.spec_from_file_location("_cpu", {library!r})
spec.loader.exec_module(importlib.util.module_from_spec(spec))
library = torch.library.Library("mmkernels", "FRAGMENT")
library.define("retrieval_ranks_cpu(Tensor target, Tensor items, Tensor query) -> Tensor")
x = torch.zeros(2, 4)
torch.ops.mmkernels.retrieval_ranks_cpu(x, x, x)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ran.returncode != 0
    assert "mmkernels::retrieval_ranks_cpu has no argument gallery" in ran.stderr
