"""Makes the rows of every bench file, and keeps what identifies a person or a machine out of the JSON."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from mmkernels.bench.rows import rows
from mmkernels.machine import ceilings, describe_machine, device_name


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("mmkernels benchmarks")
    group.addoption("--dtypes", default="fp32,bf16", help="of fp32, bf16, fp16")
    group.addoption("--device", default="cpu", help="cpu, cuda, ...")
    group.addoption("--compile-only", action="store_true", help="run everything once and measure nothing")
    group.addoption("--quick", action="store_true", help="only headline rows, in few rounds, beside the quick peers")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "rows_of(spec): run once for each row of an op's benchmarks")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marker = metafunc.definition.get_closest_marker("rows_of")
    if marker is not None:
        option = metafunc.config.getoption
        made = rows(marker.args[0], option("dtypes").split(","), option("device"), quick=option("quick"))
        compile_only = option("compile_only")
        metafunc.parametrize("row", [replace(row, compile_only=compile_only) for row in made], ids=str)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    device = config.getoption("device")
    machine_info.clear()
    rates = ceilings(device, config.getoption("dtypes").split(","))
    machine_info.update(describe_machine(device) | {"device": device_name(device), "ceilings": rates})


def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict[str, Any]) -> None:
    for name in commit_info.keys() - {"id", "dirty"}:
        del commit_info[name]
