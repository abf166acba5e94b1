"""`mmkernels bench`: which rows it runs, what it prints and saves, also when it is interrupted."""

import importlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from mmkernels import cli, machine
from mmkernels.bench import command, picture, rounds, tables
from mmkernels.bench.plugin import RowsPlugin
from mmkernels.bench.rows import select
from mmkernels.options import BadInput

ROOT = Path(__file__).parents[1]
RESULTS = [
    path
    for path in sorted((ROOT / "benchmarks" / "results").glob("*/*.json"))
    if "benchmarks" in json.loads(path.read_text())
]

NAMES = ["decode, fp32, forward", "media, fp32, forward", "media, bf16, forward", "batch of 8,192, fp32, forward"]


@pytest.mark.parametrize(
    ("wanted", "chosen"),
    [
        ("", [0, 1, 2, 3]),
        ("media", [1, 2]),
        ("decode,media", [0, 1, 2]),
        ("media, bf16", [2]),  # one name, with the comma that is part of it
        ("media, bf16, decode", [0, 2]),
        ("batch of 8,192,decode", [0, 3]),
        ("decode,", [0]),
        (",decode", [0]),
    ],
)
def test_a_filter_takes_several_names(wanted: str, chosen: list[int]) -> None:
    assert [n for n, selected in enumerate(select(NAMES, wanted)) if selected] == chosen


@pytest.mark.parametrize("wanted", ["meadia", "decode,meadia", "meadia,decode"])
def test_a_name_that_matches_nothing_is_an_error_with_the_names(wanted: str) -> None:
    with pytest.raises(BadInput, match=r"no row is named 'meadia'; there are: decode; media; batch of 8,192$"):
        select(NAMES, wanted)


@pytest.fixture(autouse=True)
def _no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """pytest-benchmark measures nothing in workers of pytest-xdist, and these runs would look like one."""
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)


# A folder of benchmarks that take no time.

CONFTEST = """
def pytest_addoption(parser):
    for name in ("--dtypes", "--device"):
        parser.addoption(name)
    parser.addoption("--quick", action="store_true")


def pytest_benchmark_update_machine_info(config, machine_info):
    rates = {f"{name}_per_second": 1e9 for name in ("fp32_flops", "copy_bytes", "read_bytes")}
    machine_info.clear()
    machine_info.update(device="a CPU", ceilings=rates)
"""
BENCH = """
import os
import time

import pytest


@pytest.mark.parametrize("row", ["one, fp32, forward", "two, fp32, forward", "three, fp32, forward"])
def test_fake(benchmark, row):
    if "two" in row and os.environ.get("AT_TWO") == "wait":
        time.sleep(300)
    benchmark.pedantic(lambda: None, rounds=1)
    assert "two" not in row or os.environ.get("AT_TWO") != "fail", "fake is wrong"
    benchmark.extra_info |= {
        "op": "{op}",
        "configuration": row.partition(",")[0],
        "dtype": "fp32",
        "pass": "forward",
        "seconds": 0.002,
        "peers": {"naive": {"ratio": 2.0, "ratio_at_peak": 3.0, "peak_memory_bytes": 10**6}},
        "peak_memory_bytes": None,
        "flops_per_second": 1e9,
        "share_of_compute_peak": 0.6,
        "share_of_bandwidth_peak": 0.1,
        "targets": [{"than": "peak", "unit": "share", "least": 0.5, "found": 0.6, "at_peak": 1.0}],
    }
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    benchmarks = tmp_path / "benchmarks"
    benchmarks.mkdir()
    (benchmarks / "conftest.py").write_text(CONFTEST)
    for op in ("fake", "other"):
        (benchmarks / f"bench_{op}.py").write_text(BENCH.replace("{op}", op))
        monkeypatch.delitem(sys.modules, f"bench_{op}", raising=False)  # of another test's folder
    (tmp_path / "pyproject.toml").touch()
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(command, "find_benchmarks", lambda: benchmarks)
    monkeypatch.setattr(command.picture, "draw", lambda report, path: path.touch())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_cli(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["mmkernels", *arguments])
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def results(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def configurations(path: Path) -> list[str]:
    return [entry["extra_info"]["configuration"] for entry in results(path)["benchmarks"]]


def test_each_row_is_printed_and_all_are_saved_by_op(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_cli(monkeypatch, "bench", "--device", "cpu", "--filter", "one,three", "--out", "out") == 0
    out, err = capfd.readouterr()
    assert max(map(len, out.splitlines())) <= 100
    assert err.rstrip().splitlines() == [
        line
        for number, row in enumerate(("fake: one", "fake: three", "other: one", "other: three"), 1)
        for line in (f"[{number}/4] {row}, fp32, forward", "    2.00 ms, 1 GFLOP/s, naive 2.00x, 60% of peak")
    ]
    assert "fake on a CPU" in out and "other on a CPU" in out and "met" in out and "not measured" not in out
    for op in ("fake", "other"):
        assert configurations(folder / "out" / f"{op}.json") == ["one", "three"]
        assert results(folder / "out" / f"{op}.json")["machine_info"]["device"] == "a CPU"
        assert (folder / "out" / f"{op}.png").exists()


def test_a_family_runs_its_ops_and_shows_their_targets_together(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "MODULES", {"fake": "mmkernels.ops.family.fake", "other": "mmkernels.ops.kin.other"})
    monkeypatch.setattr(command, "_WHOLE_MODELS", {"family": ("other",)})
    assert run_cli(monkeypatch, "bench", "family", "--device", "cpu", "--filter", "one", "--out", "out") == 0
    out = capfd.readouterr().out
    assert max(map(len, out.splitlines())) <= 100
    assert sorted(path.stem for path in Path("out").glob("*.json")) == ["fake", "other"]
    after = out[out.rindex("Written:") :]
    assert after.index("targets of fake") < after.index("targets of other") and out.count("60%") == 4
    assert run_cli(monkeypatch, "bench", "kin", "--device", "cpu", "--filter", "one", "--out", "kin") == 0
    assert [path.stem for path in Path("kin").glob("*.json")] == ["other"]
    assert run_cli(monkeypatch, "bench", "famly", "--out", "out") == 2
    assert "op must be one of fake, other, family, kin, got 'famly'" in capfd.readouterr().err.replace(";", ",")


def test_a_row_that_fails_leaves_the_others(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AT_TWO", "fail")
    assert run_cli(monkeypatch, "bench", "fake", "--device", "cpu", "--out", "out") == 1
    out, err = capfd.readouterr()
    assert "    FAILED: AssertionError: fake is wrong" in err and "some rows gave no time" in err
    assert "1 of 3 rows were not measured" in out
    assert configurations(folder / "out" / "fake.json") == ["one", "three"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_that_is_interrupted_keeps_what_it_measured(folder: Path, number: signal.Signals, code: int) -> None:
    """What it has measured is on the disk before the signal comes, so that any other end leaves it there too."""
    program = "import sys; from pathlib import Path; from mmkernels import cli; from mmkernels.bench import command\n"
    program += "command.find_benchmarks = lambda: Path('benchmarks')\n"
    program += "sys.argv = ['mmkernels', 'bench', 'fake', '--device', 'cpu', '--out', 'out']; cli.main()"
    environment = os.environ | {"AT_TWO": "wait", "PYTHONPATH": str(ROOT)}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", program], cwd=folder, env=environment, **pipes)
    saved = folder / "out" / "fake.json"
    end = time.monotonic() + 300
    while not saved.exists() and time.monotonic() < end and process.poll() is None:
        time.sleep(0.05)
    assert configurations(saved) == ["one"] and results(saved)["expected_rows"] == 3
    process.send_signal(number)
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, err
    assert configurations(saved) == ["one"] and (folder / "out" / "fake.png").exists()
    assert "2 of 3 rows were not measured" in out
    assert err.splitlines()[-1] == "mmkernels: interrupted; the rows above are saved"


def test_an_interrupt_at_an_instruction_without_a_line() -> None:
    captured = 0

    def stopped() -> FrameType:
        assert captured == 0  # a function's first instruction takes what it captured, and has no line
        return sys._getframe()

    without_line = TracebackType(None, stopped(), 0, -1)
    assert without_line.tb_lineno is None
    trace = TracebackType(without_line, sys._getframe(), sys._getframe().f_lasti, sys._getframe().f_lineno)
    interrupt = pytest.ExceptionInfo.from_exception(KeyboardInterrupt().with_traceback(trace))
    with pytest.raises(TypeError):
        interrupt.getrepr(funcargs=True)
    plugin = RowsPlugin("", Path())
    plugin.pytest_keyboard_interrupt(interrupt)
    assert plugin.interrupted and "KeyboardInterrupt" in str(interrupt.getrepr(funcargs=True))


def test_a_bar_on_a_terminal_names_the_row_and_what_is_left(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pty.openpty()
    kept = os.dup(2)
    os.dup2(theirs, 2)
    try:
        assert run_cli(monkeypatch, "bench", "fake", "--device", "cpu", "--out", "out") == 0
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(theirs)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", os.read(ours, 2**20).decode())
    os.close(ours)
    assert "2/3" in shown and re.search(r"\d:\d\d:\d\d left fake: three, fp32", shown)
    assert "fake: three, fp32, forward: 2.00 ms, 1 GFLOP/s, naive 2.00x, 60% of peak" in shown


def test_a_filter_that_selects_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_cli(monkeypatch, "bench", "--device", "cpu", "--filter", "one,no such row", "--out", "out") == 2
    assert capfd.readouterr().err.strip().splitlines() == [
        "mmkernels: --filter: no row is named 'no such row'; there are: one; two; three"
    ]
    assert not list((folder / "out").glob("*.json"))


def test_every_bench_file_loads_and_has_rows() -> None:
    files = sorted((ROOT / "benchmarks").glob("bench_*.py"))
    collect = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *map(str, files)]
    done = subprocess.run([*collect, f"--rootdir={ROOT}"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout
    assert all(f"{path.name}::" in done.stdout for path in files)


def test_outside_a_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    monkeypatch.setattr(command.mmkernels, "__file__", str(tmp_path / "mmkernels" / "__init__.py"))
    monkeypatch.chdir(tmp_path)
    assert run_cli(monkeypatch, "bench") == 2
    assert "run this in a checkout" in capsys.readouterr().err


# The true benchmarks.


def test_the_smallest_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Forward + backward, for which FlexAttention need not be compiled."""
    monkeypatch.setattr(rounds, "BUDGET", 0.0)
    monkeypatch.setattr(machine, "BURST", 1e-3)
    row = "16x64 D64 none, fp32, forward + backward"
    arguments = ("cross_attention", "--device", "cpu", "--dtype", "fp32", "--filter", row, "--out", str(tmp_path))
    assert run_cli(monkeypatch, "bench", *arguments) == 0
    printed = capfd.readouterr().out
    assert "sdpa" in printed and "B1 H4 16x64 D64 none" in printed
    assert "[1] flex: has no backward pass on a CPU" in printed
    report = results(tmp_path / "cross_attention.json")
    (entry,) = report["benchmarks"]
    assert entry["extra_info"]["peers"]["sdpa"]["ratio"] > 0
    assert report["machine_info"]["ceilings"]["copy_bytes_per_second"] > 1e8
    assert "node" not in report["machine_info"] and set(report["commit_info"]) <= {"id", "dirty"}


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_committed_results_still_load_and_plot(path: Path, tmp_path: Path) -> None:
    report = results(path)
    custom = (ROOT / "benchmarks" / f"{path.stem}_report.py").exists()
    render = importlib.import_module(f"{path.stem}_report").render if custom else tables.render
    console = Console(width=130)
    with console.capture() as printed:
        console.print(render(report))
    assert all(entry["extra_info"]["configuration"][:8] in printed.get() for entry in report["benchmarks"])
    assert all(tables.line(entry["extra_info"]) for entry in report["benchmarks"])
    picture.draw(report, tmp_path / "picture.png")
    with Image.open(tmp_path / "picture.png") as drawn:
        assert len(drawn.convert("RGB").getcolors(2**24) or ()) > 50
