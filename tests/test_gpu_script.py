"""`make gpu` as far as it goes without a GPU: plan, time, results, and each part on the CPU at tiny sizes."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import attention_peers
import gpu
import gpu_checks
import gpu_kernels
import gpu_parts
import pytest
import torch

from mmkernels import meters
from mmkernels.bench.rows import rows
from mmkernels.ops.attention.cross_attention.spec import SPEC

ROOT = Path(__file__).parents[1]

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def run_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@no_gpu
def test_without_a_gpu_it_says_so_and_what_it_would_run() -> None:
    ended = run_script()
    assert ended.returncode == 2
    first, *plan = ended.stdout.splitlines()
    assert first.startswith("make gpu: nothing was run: ") and "GPU" in first
    assert [line.split()[0] for line in plan] == [part.name for part in gpu.parts()]


@no_gpu
def test_chosen_parts(capsys: Any) -> None:
    assert gpu.main(["attention, nan"]) == 2
    plan = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[0] for line in plan] == ["nan", "cross_attention"]
    assert gpu.main(["nosuch"]) == 2
    assert "no part is called nosuch" in capsys.readouterr().err
    assert gpu.main(["help"]) == 0
    assert "cross_attention (attention)" in capsys.readouterr().out


def test_every_bench_file_is_a_part_and_each_part_can_run() -> None:
    names = {part.name for part in gpu.parts()}
    benches = {path.stem.removeprefix("bench_") for path in (ROOT / "benchmarks").glob("bench_*.py")}
    benches -= {"transformers"}  # whole models, no op
    assert benches < names
    assert names - benches == set(gpu_parts.PARTS) - {"describe"}
    assert set(gpu._ALIASES.values()) <= names


def test_time_that_a_part_does_not_use_goes_to_the_next() -> None:
    a, b = gpu.Part("a", "", 30), gpu.Part("b", "", 10)
    assert gpu.allowance([a, b], 20) == 15
    assert gpu.allowance([b], 20) == 20
    assert gpu.allowance([a, b], -1) == 0


MACHINE = {"device": "NVIDIA H000", "slug": "nvidia-h000", "machine": {"commit": None, "gpu": {"clocks_sm": "1980"}}}
TARGET = {"what": "no mask, forward", "than": "tflops", "least": 450.0, "found": 460.0}


def fake(results: dict[str, Any]) -> Any:
    def run_part(name: str, seconds: float) -> dict[str, Any]:
        return dict(MACHINE if name == "describe" else results.get(name, {"summary": "fine"}))

    return run_part


def test_a_failing_part_loses_nothing_of_the_others(tmp_path: Path) -> None:
    results = {
        "tests": {"problems": ["test_a: broken"]},
        "cross_attention": {"summary": "1 rows", "targets": [TARGET], "left_out": ["the last row"]},
    }
    run = gpu.Run(gpu.parts(), 480, tmp_path, fake(results), commit="abc")
    run.all()
    assert run.code == 1
    (path,) = tmp_path.iterdir()
    report = json.loads(path.read_text())
    assert path.stem == report["created"][:10]
    assert set(report["parts"]) == {part.name for part in gpu.parts()}
    assert report["machine"]["commit"] == "abc" and report["gpu_at_the_end"]["clocks_sm"] == "1980"
    table = run.table()
    assert "FAILED test_a: broken" in table and "left out for time: 1, such as the last row" in table
    assert table.count("met") == 1 and "460" in table


def test_a_missed_target_is_no_failure_and_parts_have_files_of_their_own(tmp_path: Path) -> None:
    chosen = [part for part in gpu.parts() if part.name in ("ceilings", "cross_attention")]
    run = gpu.Run(chosen, 480, tmp_path, fake({"cross_attention": {"targets": [TARGET | {"found": 44.0}]}}))
    run.all()
    assert run.code == 0 and "missed" in run.table()
    for found, verdict in ((8.0, "met"), (44.0, "missed")):
        line = gpu._target({"what": "a step", "than": "extra MB", "most": 10.0, "found": found})
        assert "<= 10.00" in line and line.endswith(verdict)
    assert [path.name.partition("-c")[2] for path in tmp_path.iterdir()] == ["eilings-cross-attention.json"]


def test_what_has_no_time_left_is_listed(tmp_path: Path) -> None:
    run = gpu.Run(gpu.parts(), 0, tmp_path, fake({}))
    run.all()
    assert run.code == 1 and run.report["left_out"] == [part.name for part in gpu.parts()]
    assert run.table().count("left out: the time was up") == len(gpu.parts())


def test_a_part_that_hangs_is_ended() -> None:
    begin = time.monotonic()
    assert gpu.run_command([sys.executable, "-c", "import time; time.sleep(60)"], 0.5) is None
    assert time.monotonic() - begin < 30


def test_a_part_that_crashes_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "FOLDER", ROOT / "nowhere")
    (problem,) = gpu.child("nan", 30)["problems"]
    assert "nan: ended with exit code 2" in problem


def test_an_error_inside_a_part_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(seconds: float, device: str) -> Any:
        raise ValueError("no such thing")

    monkeypatch.setitem(gpu_parts.PARTS, "nan", broken)
    assert gpu_parts.run_part("nan", 1, "cpu") == {"problems": ["nan: ValueError: no such thing"]}


# The parts themselves, on the CPU.


def test_nan_part() -> None:
    lengths = ((64, 64),)
    found = gpu_checks.check_all(time.monotonic() + 600, "cpu", lengths, longest=64)
    assert found["problems"] == [] and found["left_out"] == []
    assert found["checks"] == len(gpu_checks.KINDS) + 3 * len(gpu_checks._FEW) + 3
    late = gpu_checks.check_all(0.0, "cpu", lengths, longest=64, processes=2)
    assert late["checks"] == 0 and len(late["left_out"]) == found["checks"]


def test_nan_part_sees_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    right = gpu_checks.cross_attention
    monkeypatch.setattr(gpu_checks, "cross_attention", lambda **inputs: right(**inputs) * torch.nan)
    problem = gpu_checks._check("key padding", 64, 64, 64, torch.bfloat16, "cpu", exact=True)
    assert problem is not None and "not finite" in problem


def test_host_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda call, **options: call)
    monkeypatch.setattr(attention_peers, "flex", attention_peers.flash_attn)  # nothing to compile
    found = gpu_checks.host_times(time.monotonic() + 600, "cpu", calls=1)
    assert found["problems"] == [] and len(found["host"]) == 6
    assert all(row["microseconds"]["ours"] > 0 and row["microseconds"]["sdpa"] > 0 for row in found["host"])
    assert "CantRunError" in found["host"][0]["why_not"]["flex"]


def test_main_kernels_can_be_called() -> None:
    for call in gpu_kernels.calls("cpu", scale=128):
        call()


def test_ncu_output_is_read() -> None:
    names = ["ID", "Kernel Name", "gpu__time_duration.sum", "sm__warps_active.avg.pct_of_peak_sustained_active"]
    names += ["sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active", "launch__registers_per_thread"]
    lines = ['==PROF== Connected to process 1, "python3"', ",".join(f'"{name}"' for name in names)]
    lines += ['"","","ns","%","%","register/thread"']
    lines += ['"0","forward_kernel","5,000","24.5","71.2","168"', '"1","void at::native::fill()","9,000","90","0","16"']
    lines += ['"2","merge_splits","3","10","0","32"']
    (kernel,) = gpu_kernels.parse(lines)
    assert gpu_kernels._line(kernel) == "forward_kernel: tensor pipe 71 %, warps active 24 %, registers 168"
    assert gpu_kernels.parse(["==ERROR== no permission"]) == []


@pytest.mark.slow
def test_bench_part() -> None:
    options = ("--filter", "16x64 D64 none, bf16, forward + backward")
    found = gpu_parts.measure_op("cross_attention")(120, "cpu", *options)
    assert found["problems"] == [] and found["left_out"] == [] and len(found["rows"]) == 1
    assert found["targets"][0]["than"] == "sdpa" and "16x64" in found["targets"][0]["what"]
    assert "fwd+bwd" in found["lines"][0]
    compiled = gpu_parts.measure_op("cross_attention")(120, "cpu", *options, "--compile-only")
    assert compiled["rows"] == [] and compiled["problems"] == []
    late = gpu_parts.measure_op("cross_attention")(0.0, "cpu", *options)
    assert late["rows"] == [] and late["problems"] == [] and len(late["left_out"]) == 1


@pytest.mark.slow
def test_flamingo_part() -> None:
    found = gpu_parts.measure_flamingo(1, "cpu", size="tiny", tokens=(4,), text_length=12, dtype="fp32")
    assert [(target["than"], target["least"]) for target in found["targets"]] == [("cap", 0.85), ("naive", 3.0)] * 2


# What the harness does on a GPU alone.


def test_the_issue_s_configurations_are_rows_of_a_gpu() -> None:
    on_gpu = rows(SPEC, ["bf16"], device="cuda")
    ids = {row.config.id for row in on_gpu}
    assert ids.isdisjoint({"B2 H16 256x2048 D64 none", "decode"}) and "B1 H4 16x64 D64 none" in ids
    targets = {(str(row).replace(", bf16", ""), target.name): target.limit for row in on_gpu for target in row.targets}
    assert targets["B1 H16 16384x16384 D128 none, forward", "tflops"] == 450
    assert targets["B1 H16 16384x16384 D128 none, forward + backward", "tflops"] == 260
    assert targets["B1 H16 16384x16384 D72 none, forward", "yardstick"] == pytest.approx(0.8 * 72 / 80)
    assert targets["B4 H16 2048x16384 D128 media, forward", "sdpa"] == 10
    assert targets["decode B32, forward", "bandwidth"] == 0.8
    assert {row.config.id for row in rows(SPEC, ["bf16"])}.isdisjoint({"decode B32"})


def test_device_times_are_those_between_events(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = clock[0]

        def elapsed_time(self, other: Any) -> float:
            return other.at - self.at

    overwrite = torch.ones(1)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(meters, "_larger_than_l2", lambda device: overwrite)

    def call() -> None:
        assert overwrite.item() == 0
        overwrite.fill_(1)
        clock[0] += 3.0

    assert meters.time_calls(call, 4, "cuda") == pytest.approx(3e-3)
    assert len(meters.host_seconds(lambda: None, "cuda", calls=2, rounds=3).samples) == 3


@pytest.mark.gpu
def test_meters_on_a_gpu() -> None:
    x = torch.randn(2048, 2048, device="cuda")
    assert 0 < meters.time_calls(lambda: x @ x, 5, "cuda") < 0.1
    assert 0 < meters.host_seconds(lambda: x.add(1), "cuda", calls=10).seconds < 0.1
