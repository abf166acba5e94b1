"""`make gpu` as far as it goes without a GPU: plan, time, results, and each part on the CPU at tiny sizes."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import attention_peers
import gpu
import gpu_checks
import gpu_kernels
import gpu_parts
import pytest
import torch

from mmkernels import meters, ops
from mmkernels.bench.rows import rows
from mmkernels.ops.attention.cases import attention_inputs
from mmkernels.ops.attention.cross_attention.spec import SPEC
from mmkernels.plan import Problem
from mmkernels.runtime import tuning

ROOT = Path(__file__).parents[1]

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def run_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


PARTS = gpu_parts.all_parts()


def turn(folder: Path, seconds: float = 300.0) -> gpu_parts.Turn:
    return gpu_parts.Turn(seconds, folder, "cpu")


@no_gpu
def test_without_a_gpu_it_says_so_and_what_it_would_run() -> None:
    ended = run_script()
    assert ended.returncode == 2
    first, *plan = ended.stdout.splitlines()
    assert first.startswith("make gpu: nothing was run: ") and "GPU" in first
    assert [line.split()[0] for line in plan] == [part.name for part in PARTS]


@no_gpu
def test_chosen_parts(capsys: Any) -> None:
    def planned(names: str) -> list[str]:
        assert gpu.main([names]) == 2
        return [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]]

    assert planned("cross_attention, nan") == ["nan", "cross_attention"]
    assert planned("received") == ["attention_received"]
    assert set(planned("attention")) == {part.name for part in PARTS if "attention" in part.name}
    assert gpu.main(["nan,nosuch"]) == 2
    assert "no part is called nosuch" in capsys.readouterr().err
    assert gpu.main(["help"]) == 0
    assert "cross_attention" in capsys.readouterr().out


def test_every_op_s_bench_file_is_a_part_with_seconds_by_its_rows() -> None:
    seconds = {part.name: part.seconds for part in PARTS}
    assert set(ops.NAMES) < set(seconds) and "transformers" not in seconds  # whole models, no op
    rows = [config for config in SPEC.benchmarks if "gpu" in config.devices]
    assert seconds["cross_attention"] == 10 * sum(1 + bool(config.grads) for config in rows)
    assert all(seconds[op] >= 10 for op in ops.NAMES)


def test_time_that_a_part_does_not_use_goes_to_the_next() -> None:
    a, b = (gpu_parts.Part(name, "", seconds, lambda turn: {}) for name, seconds in (("a", 30), ("b", 10)))
    assert gpu.allowance([a, b], 20) == 15
    assert gpu.allowance([b], 20) == 20
    assert gpu.allowance([a, b], -1) == 0


MACHINE = {"device": "NVIDIA H000", "slug": "nvidia-h000", "machine": {"commit": None, "gpu": {"clocks_sm": "1980"}}}
TARGET = {"what": "no mask, forward", "than": "tflops", "least": 450.0, "found": 460.0}


def make_run(results: dict[str, Any], names: list[str], out: Path, seconds: float = 480, **options: Any) -> gpu.Run:
    """A run of parts that find what `results` says; an exception is raised."""

    def runner(name: str) -> Any:
        def run(turn: gpu_parts.Turn) -> dict[str, Any]:
            found = results.get(name, {"summary": "fine"})
            if isinstance(found, Exception):
                raise found
            return dict(found)

        return run

    chosen = [replace(part, run=runner(part.name)) for part in PARTS if part.name in names]
    return gpu.Run(chosen, seconds, out, describe=lambda turn: json.loads(json.dumps(MACHINE)), **options)


ALL = [part.name for part in PARTS]


def test_a_failing_part_loses_nothing_of_the_others(tmp_path: Path) -> None:
    results = {
        "tests": {"problems": ["test_a: broken"]},
        "nan": ValueError("no such thing\nmore"),
        "cross_attention": {"summary": "1 rows", "targets": [TARGET], "left_out": ["the last row"]},
    }
    run = make_run(results, ALL, tmp_path, commit="abc")
    run.all()
    assert run.code == 1
    (path,) = tmp_path.iterdir()
    report = json.loads(path.read_text())
    assert path.stem == report["created"][:10]
    assert set(report["parts"]) == set(ALL)
    assert report["parts"]["nan"]["problems"] == ["nan: ValueError: no such thing"]
    assert report["machine"]["commit"] == "abc" and report["gpu_at_the_end"]["clocks_sm"] == "1980"
    table = run.table()
    assert "FAILED test_a: broken" in table and "left out for time: 1, such as the last row" in table
    assert table.count("met") == 1 and "460" in table


def test_a_missed_target_is_no_failure_and_parts_have_files_of_their_own(tmp_path: Path) -> None:
    results = {"cross_attention": {"targets": [TARGET | {"found": 44.0}]}}
    run = make_run(results, ["ceilings", "cross_attention"], tmp_path, whole=False)
    run.all()
    assert run.code == 0 and "missed" in run.table()
    for found, verdict in ((8.0, "met"), (44.0, "missed")):
        line = gpu.target_line({"what": "a step", "than": "extra MB", "most": 10.0, "found": found})
        assert "<= 10.00" in line and line.endswith(verdict)
    assert [path.name.partition("-c")[2] for path in tmp_path.iterdir()] == ["eilings-cross-attention.json"]


def test_what_has_no_time_left_is_listed(tmp_path: Path) -> None:
    run = make_run({}, ALL, tmp_path, seconds=0)
    run.all()
    assert run.code == 1 and run.report["left_out"] == ALL
    assert run.table().count("left out: the time was up") == len(ALL)


@pytest.mark.parametrize("name", ["tests", "nan"])
def test_checks_without_time_are_a_failure(name: str, tmp_path: Path) -> None:
    run = make_run({name: {"left_out": ["a test"]}}, [name], tmp_path)
    run.all()
    assert run.code == 1


def test_a_command_that_hangs_is_ended() -> None:
    begin = time.monotonic()
    code = gpu_parts.run_command([sys.executable, "-c", "import time; time.sleep(60)"], 0.5)
    assert code is None and time.monotonic() - begin < 30
    assert gpu_parts._verdicts("nan", None, []) == {"problems": ["nan: took too long, and was ended"], "left_out": []}


def test_a_command_that_crashes_is_a_problem(tmp_path: Path) -> None:
    found = gpu_parts._evaluate(turn(tmp_path), "import os", "os.abort()")
    (problem,) = found["problems"]
    assert "ended with exit code -6" in problem


def test_pytest_s_verdicts(tmp_path: Path) -> None:
    """What fails, what has no time left, and what a test records."""
    file = tmp_path / "check_it.py"
    file.write_text(
        "import time\n"
        "def test_right(record_property): record_property('row', '[1]')\n"
        "def test_wrong(): assert 1 == 2, 'not so'\n"
        "def test_slow(): time.sleep(2)\n"
        "def test_late(): pass\n"
    )
    code, cases = gpu_parts.run_pytest([str(file), "--noconftest"], turn(tmp_path, 1.5))
    states = {case["name"]: case["state"] for case in cases}
    assert states == {"test_right": "passed", "test_wrong": "failed", "test_slow": "passed", "test_late": "skipped"}
    assert cases[0]["row"] == "[1]"
    verdicts = gpu_parts._verdicts("tests", code, cases)
    assert verdicts == {"problems": ["test_wrong: AssertionError: not so"], "left_out": ["test_late"]}


# The parts themselves, on the CPU.


def test_attention_checks_find_nothing_on_the_cpu() -> None:
    checks = {(kind, dtype, dim) for kind, dtype, dim, *_ in gpu_checks.attention_checks()}
    assert len(checks) == len(gpu_checks.KINDS) + 3 * len(gpu_checks._FEW)
    for kind, dtype, dim in sorted(checks):
        torch_dtype, compared = gpu_checks.DTYPES[dtype], kind != "dropout"
        assert gpu_checks.problem_of(kind, 64, 64, dim, torch_dtype, "cpu", compared=compared) is None, kind


def test_attention_checks_see_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    right = gpu_checks.cross_attention
    monkeypatch.setattr(gpu_checks, "cross_attention", lambda **inputs: right(**inputs) * torch.nan)
    problem = gpu_checks.problem_of("key padding", 64, 64, 64, torch.bfloat16, "cpu", compared=True)
    assert problem is not None and "not finite" in problem


def test_attention_checks_see_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    right = gpu_checks.cross_attention
    monkeypatch.setattr(gpu_checks, "cross_attention", lambda **inputs: right(**inputs) * 1.1)
    problem = gpu_checks.problem_of("causal", 64, 64, 64, torch.bfloat16, "cpu", compared=True)
    assert problem is not None and "error" in problem


@no_gpu
def test_checks_are_run_by_pytest(tmp_path: Path) -> None:
    code, cases = gpu_parts._checks("test_host_time and eager and 16x64 and not backward", turn(tmp_path))
    assert code == 1 and [case["state"] for case in cases] == ["failed"]  # as there is no GPU
    assert [case["name"] for case in cases] == ["test_host_time[B1 H4 16x64 D64-eager]"]


def test_host_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda call, **options: call)
    monkeypatch.setattr(attention_peers, "flex", attention_peers.flash_attn)  # nothing to compile
    for size in gpu_checks.SIZES:
        for mode in gpu_checks.MODES:
            row = gpu_checks.host_times(size, mode, "cpu", calls=1)
            assert row["microseconds"]["ours"] > 0 and row["microseconds"]["sdpa"] > 0
            assert "CantRunError" in row["why_not"]["flex"]


def test_tuned_kernels_can_be_called(monkeypatch: pytest.MonkeyPatch) -> None:
    plans = tuning.plans()
    small = Problem(lambda g, dim: attention_inputs(g, 1, 2, 6, 9, dim))
    searches = {name: replace(search, problems=(small,)) for name, search in plans["cross_attention"].searches.items()}
    plan = replace(plans["cross_attention"], searches=searches)
    monkeypatch.setattr(tuning, "plans", lambda: {"cross_attention": plan})
    monkeypatch.setattr(tuning, "plan", lambda op: plan)
    assert list(gpu_kernels.launch("cpu", "chunked")) == list(searches)


def test_ncu_output_is_read() -> None:
    names = ["ID", "Kernel Name", "gpu__time_duration.sum", "sm__warps_active.avg.pct_of_peak_sustained_active"]
    names += ["sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active", "launch__registers_per_thread"]
    lines = ['==PROF== Connected to process 1, "python3"', ",".join(f'"{name}"' for name in names)]
    lines += ['"","","ns","%","%","register/thread"']
    lines += ['"0","forward_kernel","5,000","24.5","71.2","168"', '"1","void at::native::fill()","9,000","90","0","16"']
    lines += ['"2","merge_splits","3","10","0","32"', '"3","odd","n/a","n/a","n/a","n/a"']
    (kernel,) = gpu_kernels.parse(lines)
    assert gpu_kernels.describe(kernel) == "forward_kernel: tensor pipe 71 %, warps active 24 %, registers 168"
    assert gpu_kernels.parse(["==ERROR== no permission"]) == []


def test_without_ncu_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_kernels.shutil, "which", lambda name: None)
    assert gpu_parts.measure_kernels(turn(tmp_path)) == {"summary": "not run: there is no ncu here"}


@pytest.fixture
def _no_xdist(monkeypatch: pytest.MonkeyPatch) -> None:
    """pytest-benchmark measures nothing in a process that xdist's environment reaches."""
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)


@pytest.mark.slow
@pytest.mark.usefixtures("_no_xdist")
def test_bench_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = gpu_parts.measure_op("cross_attention", "--filter", "16x64 D64 none, bf16, forward + backward")
    found = part(turn(tmp_path))
    assert found["problems"] == [] and found["left_out"] == [] and len(found["rows"]) == 1
    assert "16x64" in found["targets"][0]["what"] and {"than", "found"} <= found["targets"][0].keys()
    assert "fwd+bwd" in found["lines"][0] and "ms" in found["lines"][0]
    (tmp_path / "cross_attention.json").unlink()
    monkeypatch.setattr(gpu_parts, "_WIND_UP", 0.0)
    late = part(turn(tmp_path))
    assert late["rows"] == [] and late["problems"] == [] and len(late["left_out"]) == 1


@pytest.mark.slow
def test_flamingo_part(tmp_path: Path) -> None:
    found = gpu_parts.flamingo(turn(tmp_path), size="tiny", tokens="4", text_length=12, dtype="fp32")
    assert found["problems"] == []
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
