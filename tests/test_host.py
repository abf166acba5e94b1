"""The host extension's answers are sane, and the Python fallback gives the same ones."""

from __future__ import annotations

import os
import sys
from types import ModuleType

import pytest

from mmkernels.runtime import cpu, host, host_fallback

ISAS = ["avx512_bf16", "avx512", "avx2", "neon", "plain"]
both = pytest.mark.parametrize("module", [host, host_fallback], ids=["host", "fallback"])


@both
def test_isa_is_one_of_the_documented(module: ModuleType) -> None:
    assert module.isa() in ISAS


@both
def test_cache_sizes_are_bytes_that_grow_with_the_level(module: ModuleType) -> None:
    sizes = module.cache_sizes()
    assert list(sizes) == ["l1d", "l2", "l3"]
    known = [size for size in sizes.values() if size]
    assert known == sorted(known)
    assert all(size >= 4096 for size in known)


@both
def test_physical_cores_fit_the_machine(module: ModuleType) -> None:
    assert 1 <= module.physical_cores() <= (os.cpu_count() or 1)


@pytest.mark.skipif(sys.platform != "linux", reason="the fallback reads Linux's /proc and /sys")
@pytest.mark.parametrize("question", ["isa", "cache_sizes", "physical_cores"])
def test_fallback_agrees_with_the_extension(question: str) -> None:
    assert getattr(host_fallback, question)() == getattr(host, question)()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no CPU affinity on this platform")
@both
def test_physical_cores_counts_only_those_it_may_run_on(module: ModuleType) -> None:
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert module.physical_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)


def test_compiler_is_named_where_there_is_one() -> None:
    assert (host.compiler() == "none") == (host.why_not is not None)
    assert host_fallback.compiler() == "none"


@pytest.mark.skipif(os.environ.get("MMKERNELS_REQUIRE_EXT") != "1", reason="the extensions need not be built here")
def test_what_must_be_built_loads() -> None:
    assert host.why_not is None and cpu.why_not() is None
