"""What a measurement says about its machine."""

import getpass
import json
import platform
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mmkernels import machine


def test_description_is_json_without_names_of_people_or_machines() -> None:
    text = json.dumps(machine.describe_machine())
    assert json.loads(text)["versions"]["torch"] == torch.__version__
    assert str(Path.home()) not in text or str(Path.home()) == "/"
    assert platform.node() not in text or len(platform.node()) < 3
    assert f'"{getpass.getuser()}"' not in text


def test_device_names() -> None:
    assert machine.device_name() and machine.device_slug()
    assert set(machine.device_slug()) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")


@pytest.fixture
def bursts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every call takes half of a burst, and a burst of multiplications in registers has 1e12 FLOP a second."""
    cached = (machine.copy_rate, machine.read_rate, machine._fastest, machine._copy, machine._read)
    monkeypatch.setattr(machine, "time_once", lambda run, device: (run(), 0.01)[1])
    monkeypatch.setattr(machine, "_large", lambda device: torch.ones(1000))
    monkeypatch.setattr(machine, "_LARGEST", {"cpu": 256})
    monkeypatch.setattr(machine.cpu, "why_not", lambda: None)
    monkeypatch.setattr(machine.cpu, "peak", lambda dtype, seconds: {torch.bfloat16: 2e12}.get(dtype, 1e12))
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


def test_rates_are_work_over_time(bursts: None) -> None:
    """Two calls in a burst, which together take 10 ms here."""
    rates = machine.ceilings(dtypes=["fp32", "bf16"])
    assert rates["copy_bytes_per_second"] == pytest.approx(2 * 2 * 4000 / 0.01)
    assert rates["read_bytes_per_second"] == pytest.approx(2 * 4000 / 0.01)
    assert machine.memory_rate() == rates["copy_bytes_per_second"] == machine.memory()()
    assert rates["fp32_flops_per_second"] == 1e12 == machine.arithmetic(torch.float32)()
    assert rates["bf16_flops_per_second"] == 2e12


def test_the_fastest_route_counts(bursts: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.cpu, "peak", lambda dtype, seconds: 1.0)
    for dtype in (torch.float32, torch.float16):
        assert machine.matmul_rate(dtype) == pytest.approx(2 * 2 * 256**3 / 0.01)


def test_float16_may_be_computed_in_float32(bursts: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.cpu, "peak", lambda dtype, seconds: 3e12 if dtype == torch.float32 else 1e12)
    assert machine.matmul_rate(torch.float16) == 3e12


def test_without_the_extension_matrix_products_tell(bursts: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.cpu, "why_not", lambda: "not built")
    assert machine.matmul_rate(torch.float32) == pytest.approx(2 * 2 * 256**3 / 0.01)


def test_a_burst_is_sustained() -> None:
    """All threads multiply for as long as they are told to, whatever else the machine does."""
    if machine.cpu.why_not() is not None:
        pytest.skip(str(machine.cpu.why_not()))
    begin = time.perf_counter()
    assert machine.cpu.peak(torch.float32, 0.03) > 1e8
    assert time.perf_counter() - begin >= 0.03
