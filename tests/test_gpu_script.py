"""`make gpu` as far as it goes without a GPU: plan, time, results, and each part on the CPU at tiny sizes."""

import json
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

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
PARTS = gpu_parts.all_parts()
ALL = [part.name for part in PARTS]


def turn(folder: Path, seconds: float = 300.0) -> gpu_parts.Turn:
    return gpu_parts.Turn(seconds, folder, "cpu")


@no_gpu
@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        ("", ALL),
        ("cross_attention, nan", ["nan", "cross_attention"]),
        ("received", ["attention_received"]),
        ("attention", [name for name in ALL if "attention" in name]),
    ],
)
def test_without_a_gpu_it_says_so_and_what_it_would_run(names: str, chosen: list[str], capsys: Any) -> None:
    assert gpu.main([names]) == 2
    first, *plan = capsys.readouterr().out.splitlines()
    assert first.startswith("make gpu: nothing was run: ") and "GPU" in first
    assert [line.split()[0] for line in plan] == chosen


def test_help_lists_the_parts_and_a_wrong_name_is_an_error(capsys: Any) -> None:
    assert gpu.main(["help"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ALL
    assert gpu.main(["nan,nosuch"]) == 2
    assert "no part is called nosuch" in capsys.readouterr().err


def test_a_file_where_results_go(capsys: Any) -> None:
    with pytest.raises(SystemExit) as end:
        gpu.main(["help", "--out", __file__])
    assert end.value.code == 2 and f"--out must be a folder, got the file {__file__}" in capsys.readouterr().err


def test_every_op_s_bench_file_is_a_part_with_seconds_by_its_rows() -> None:
    seconds = {part.name: part.seconds for part in PARTS}
    assert set(ops.NAMES) < set(seconds) and "transformers" not in seconds  # whole models, no op
    on_gpu = [config for config in SPEC.benchmarks if "gpu" in config.devices]
    assert seconds["cross_attention"] == 10 * sum(1 + bool(config.grads) for config in on_gpu)
    assert all(seconds[op] >= 10 for op in ops.NAMES)


def test_time_that_a_part_does_not_use_goes_to_the_next() -> None:
    a, b = (gpu_parts.Part(name, "", seconds, lambda turn: {}) for name, seconds in (("a", 30), ("b", 10)))
    assert gpu.allowance([a, b], 20) == 15
    assert gpu.allowance([b], 20) == 20
    assert gpu.allowance([a, b], -1) == 0


MACHINE = {"device": "NVIDIA H000", "slug": "nvidia-h000", "machine": {"commit": None, "gpu": {"clocks_sm": "1980"}}}
TARGET = {"than": "tflops", "unit": "TFLOP/s", "least": 450.0, "found": 460.0}
ROW = {"configuration": "no mask", "dtype": "bf16", "pass": "forward", "targets": [TARGET]}


def ended(results: dict[str, Any], names: list[str], out: Path, seconds: float = 480, **options: Any) -> gpu.Run:
    """Returns a run, at its end, of parts that find what `results` says; an exception is raised."""

    def find(name: str) -> dict[str, Any]:
        found = results.get(name, {"summary": "fine"})
        if isinstance(found, Exception):
            raise found
        return found

    chosen = [replace(part, run=lambda turn, name=part.name: find(name)) for part in PARTS if part.name in names]
    run = gpu.Run(chosen, out, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "describe", lambda turn: json.loads(json.dumps(MACHINE)))
        run.all(seconds)
    run.print_table()
    return run


def test_a_failing_part_loses_nothing_of_the_others(tmp_path: Path, capsys: Any) -> None:
    results = {
        "tests": {"problems": ["test_a[1]: broken"]},
        "nan": ValueError("no such thing\nmore"),
        "cross_attention": {"summary": "1 rows", "rows": [ROW], "left_out": ["the last row"]},
    }
    assert ended(results, ALL, tmp_path, commit="abc").code == 1
    (path,) = tmp_path.iterdir()
    report = json.loads(path.read_text())
    assert path.stem == report["created"][:10]
    assert set(report["parts"]) == set(ALL)
    assert report["parts"]["nan"]["problems"] == ["nan: ValueError: no such thing"]
    assert report["machine"]["commit"] == "abc" and report["gpu_at_the_start"]["clocks_sm"] == "1980"
    table = capsys.readouterr().out
    assert "FAILED test_a[1]: broken" in table and "left out for time: 1, such as the last row" in table
    assert table.count("met") == 1 and "460" in table


def test_a_missed_target_is_no_failure_and_parts_have_files_of_their_own(tmp_path: Path, capsys: Any) -> None:
    missed = ROW | {"targets": [TARGET | {"found": 44.0}]}
    run = ended({"cross_attention": {"rows": [missed]}}, ["ceilings", "cross_attention"], tmp_path, whole=False)
    assert run.code == 0 and "missed" in capsys.readouterr().out
    assert [path.name.partition("-c")[2] for path in tmp_path.iterdir()] == ["eilings-cross-attention.json"]


def test_what_has_no_time_left_is_listed(tmp_path: Path, capsys: Any) -> None:
    run = ended({}, ALL, tmp_path, seconds=0)
    assert run.code == 1 and run.report["left_out"] == ALL
    assert capsys.readouterr().out.count("left out: the time was up") == len(ALL)


@pytest.mark.parametrize("name", ["tests", "nan"])
def test_checks_without_time_are_a_failure(name: str, tmp_path: Path) -> None:
    assert ended({name: {"left_out": ["a test"]}}, [name], tmp_path).code == 1


def test_a_command_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_parts, "_GRACE", 0.0)
    begin = time.monotonic()
    _, verdicts = gpu_parts.run_python(turn(tmp_path, 0.5), "-c", "import time; time.sleep(60)")
    assert verdicts == {"problems": ["took too long, and was ended"], "left_out": []}
    assert time.monotonic() - begin < 30


def test_a_command_that_crashes_is_a_problem(tmp_path: Path) -> None:
    assert gpu_parts._evaluate(turn(tmp_path), "__import__('os').abort()")["problems"] == [
        "ended with exit code -6, see above"
    ]


def test_pytest_s_verdicts(tmp_path: Path) -> None:
    """What fails, what has no time left, and what a test records."""
    file = tmp_path / "check_it.py"
    file.write_text(
        "import time\n"
        "def test_right(record_property): record_property('row', '[1]'), record_property('line', 'one')\n"
        "def test_wrong(): assert 1 == 2, 'not so'\n"
        "def test_slow(): time.sleep(2)\n"
        "def test_late(): pass\n"
    )
    assert gpu_parts.run_tests(str(file), "--noconftest")(turn(tmp_path, 1.5)) == {
        "summary": "2 passed, 1 failed, 1 skipped",
        "tests": 4,
        "lines": ["one"],
        "figures": [[1]],
        "problems": ["test_wrong: AssertionError: not so"],
        "left_out": ["test_late"],
    }


# The parts themselves, on the CPU.


def test_attention_checks_find_nothing_on_the_cpu() -> None:
    checks = {(kind, dtype, dim) for kind, dtype, dim, *_ in gpu_checks.attention_checks()}
    assert len(checks) == len(gpu_checks.KINDS) + 3 * len(gpu_checks._FEW)
    for kind, dtype, dim in sorted(checks):
        torch_dtype, compared = gpu_checks.DTYPES[dtype], kind != "dropout"
        assert gpu_checks.problem_of(kind, 64, 64, dim, torch_dtype, "cpu", compared=compared) is None, kind


@pytest.mark.parametrize(
    ("kind", "factor", "word"), [("key padding", torch.nan, "not finite"), ("causal", 1.1, "error")]
)
def test_attention_checks_see_what_is_wrong(
    kind: str, factor: float, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = gpu_checks.cross_attention
    monkeypatch.setattr(gpu_checks, "cross_attention", lambda **inputs: right(**inputs) * factor)
    problem = gpu_checks.problem_of(kind, 64, 64, 64, torch.bfloat16, "cpu", compared=True)
    assert problem is not None and word in problem


@no_gpu
def test_checks_are_run_by_pytest(tmp_path: Path) -> None:
    name = "test_host_time and eager and 16x64 and not backward"
    found = gpu_parts.run_tests(str(gpu_parts.FOLDER / "gpu_checks.py"), "--noconftest", "-k", name)(turn(tmp_path))
    assert found["summary"] == "1 failed"  # as there is no GPU
    assert found["problems"][0].startswith("test_host_time[B1 H4 16x64 D64-eager]: ")


def test_host_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda call, **options: call)
    monkeypatch.setattr(attention_peers, "flex", attention_peers.flash_attn)  # nothing to compile
    for size in gpu_checks.SIZES:
        for mode in gpu_checks.MODES:
            row = gpu_checks.host_times(size, mode, "cpu", calls=1)
            assert row["microseconds"]["ours"] > 0 and row["microseconds"]["sdpa"] > 0
            assert "CantRunError" in row["why_not"]["flex"]


def test_tuned_kernels_can_be_called(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = tuning.plans()["cross_attention"]
    small = Problem(lambda g, dim: attention_inputs(g, 1, 2, 6, 9, dim))
    searches = {name: replace(search, problems=(small,)) for name, search in plan.searches.items()}
    plan = replace(plan, searches=searches)
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


@pytest.mark.slow
def test_bench_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # where it is set, pytest-benchmark measures nothing
    part = gpu_parts.measure_op("cross_attention", "--filter", "16x64 D64 none, bf16, forward + backward")
    found = part(turn(tmp_path))
    assert found["problems"] == [] and found["left_out"] == [] and len(found["rows"]) == 1
    assert "16x64" in found["rows"][0]["configuration"] and {"than", "found"} <= found["rows"][0]["targets"][0].keys()
    assert "forward + backward: " in found["lines"][0] and " ms, " in found["lines"][0]
    (tmp_path / "cross_attention.json").unlink()
    monkeypatch.setattr(gpu_parts, "_WIND_UP", 0.0)
    late = part(turn(tmp_path))
    assert late["rows"] == [] and late["problems"] == [] and len(late["left_out"]) == 1


@pytest.mark.slow
def test_flamingo_part(tmp_path: Path) -> None:
    found = gpu_parts.flamingo(turn(tmp_path), size="tiny", tokens="4", text_length=12, dtype="fp32")
    assert found["problems"] == []
    targets = [(target["than"], target["least"]) for row in found["rows"] for target in row["targets"]]
    assert targets == [("cap", 0.85), ("memory of naive", 3.0)] * 2


# What the harness does on a GPU alone.


def test_a_gpu_has_rows_and_targets_of_its_own() -> None:
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
