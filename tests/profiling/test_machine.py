"""What a measurement says about its machine."""

import getpass
import json
import platform
from pathlib import Path

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


def test_ceilings_are_positive(monkeypatch) -> None:
    monkeypatch.setattr(machine, "_best", lambda run, device: (run(), 0.1)[1])
    monkeypatch.setattr(machine.cpu, "peak", lambda dtype: 1.0)
    monkeypatch.setattr(machine, "_large", lambda device: torch.ones(1000))
    for measure in (machine.matmul_rate, machine.copy_rate, machine.read_rate):
        measure.cache_clear()
    try:
        rates = machine.ceilings()
    finally:
        for measure in (machine.matmul_rate, machine.copy_rate, machine.read_rate):
            measure.cache_clear()
    assert rates["copy_bytes_per_second"] == 2 * rates["read_bytes_per_second"] == 2 * 4000 / 0.1
    assert rates["fp32_flops_per_second"] == rates["fp16_flops_per_second"] == 2 * 256**3 / 0.1


def test_a_cpus_peak_is_at_least_that_of_its_arithmetic(monkeypatch) -> None:
    monkeypatch.setattr(machine, "_best", lambda run, device: (run(), 0.1)[1])
    monkeypatch.setattr(machine.cpu, "peak", lambda dtype: 1e15 if dtype == torch.bfloat16 else 2e14)
    machine.matmul_rate.cache_clear()
    try:
        assert machine.matmul_rate(torch.bfloat16) == 1e15 and machine.matmul_rate(torch.float16) == 2e14
    finally:
        machine.matmul_rate.cache_clear()
