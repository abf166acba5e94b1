"""Settings that all tests share."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Generator, Iterator
from functools import cache
from pathlib import Path
from typing import Any

# Read when torch is loaded: OpenMP's threads sleep where they wait. Else two processes' threads, on two cores, take the
# cores from each other in each parallel region, which then lasts ten times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import hypothesis
import pytest
import torch
from harness import reseed, settings
from op_runs import OpRuns

from mmkernels.runtime import triton as gpu


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("mmkernels")
    group.addoption("--seed", type=int, help="draw all inputs with this number, and ten times as many by Hypothesis")
    group.addoption("--times", type=Path, help="write seconds of each file and seconds and runs of each op, as JSON")


@pytest.hookimpl(tryfirst=True)  # before Hypothesis reads its option
def pytest_configure(config: pytest.Config) -> None:
    seed = config.getoption("--seed")
    if seed is not None:
        settings.seed, settings.thorough = seed, True
        if config.getoption("--hypothesis-seed") is None:
            config.option.hypothesis_seed = seed
    hypothesis.settings.register_profile(
        "mmkernels",
        deadline=None,
        derandomize=not settings.thorough,
        database=None,
        print_blob=True,
        max_examples=1000 if settings.thorough else 100,
    )
    hypothesis.settings.load_profile("mmkernels")
    judged = "not slow" in config.getoption("markexpr")
    config.pluginmanager.register(
        OpRuns(config.getoption("--times"), interpreted=gpu.INTERPRETED, judged=judged), "op_runs"
    )


def pytest_report_header(config: pytest.Config) -> str | None:
    return f"--seed {settings.seed}" if settings.thorough else None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    report = yield
    if report.failed and settings.thorough:
        report.sections.append(("seed", f"--seed {settings.seed} draws the same"))
    return report


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    no_gpu = not torch.cuda.is_available()
    for item in items:
        if no_gpu and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
        missing = [x for mark in item.iter_markers("integration") for x in mark.args if not _is_installed(x)]
        if missing:
            reason = f"needs {', '.join(sorted(set(missing)))}, which `make test-integrations` installs"
            item.add_marker(pytest.mark.skip(reason=reason))


@cache
def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


@pytest.fixture(autouse=True)
def _seed() -> None:
    reseed()


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Most tensors here are so small that a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
