"""The parts of `make gpu`: each runs commands in processes of their own, and returns what these say."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from time_limit import LEFT_OUT

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent
_STDERR = 2  # where the commands' own output goes
_PROCESSES = min(8, os.cpu_count() or 1)  # that compile at a time
_COMPILING = 0.4  # of an op's time, after which it compiles no more beforehand
_WIND_UP = 0.9  # of a part's time, after which no test begins in it
_GRACE = 15.0  # seconds beyond its time, for a part to notice
_ROW_SECONDS = 10.0  # of a benchmark
_NOTHING_COLLECTED = 5  # pytest's exit code

Result = dict[str, Any]
"""What a part found: "summary" and "lines" for people; "problems", each a failure; "left_out" for want of time; "rows"
with their "targets", as result files of `mmkernels bench` have them; and figures of its own."""


class Turn(NamedTuple):
    """A part's seconds, a folder that is deleted after it, and the device, which only tests change."""

    seconds: float
    folder: Path
    device: str = "cuda"


@dataclass(frozen=True)
class Part:
    """A part of the run.

    Args:
        name: what PART= takes.
        about: for people.
        seconds: its share of the time; what it does not use goes to the parts after it.
    """

    name: str
    about: str
    seconds: float
    run: Callable[[Turn], Result]


def all_parts() -> list[Part]:
    """Returns the parts in the order in which they run; an op's bench file is a part."""
    benches = (path.stem.removeprefix("bench_") for path in sorted(FOLDER.glob("bench_*.py")))
    ops = {op: _bench_seconds(op) for op in benches if list(ROOT.glob(f"mmkernels/ops/*/{op}/spec.py"))}
    checks = [str(FOLDER / "gpu_checks.py"), "--noconftest", "-k"]
    nan, host = run_tests(*checks, "test_attention", *_workers()), run_tests(*checks, "test_host_time")
    return [
        Part("build", "the extensions, in place, against the torch that is there", 50, build),
        Part("ceilings", "what the GPU gives at best: copy, bfloat16 matrix product", 20, measure_ceilings),
        Part("tests", "every test marked gpu", 90, run_tests("tests", "-m", "gpu", *_workers())),
        Part("nan", "forward and backward on lengths with L % 128 == 64, every kind of mask", 35, nan),
        *(Part(op, f"mmkernels bench {op}", ops[op], measure_op(op)) for op in sorted(ops, key=lambda op: -ops[op])),
        Part("flamingo", "Flamingo base, 5 images: prefill and training step beside the Amdahl cap", 40, flamingo),
        Part("host", "CPU time of a call, eager and compiled, beside SDPA and FlexAttention", 35, host),
        Part("ncu", "occupancy and tensor-pipe use of each tuned kernel, by Nsight Compute", 25, measure_kernels),
    ]


def _bench_seconds(op: str) -> float:
    """By the number of rows that the op measures on a GPU."""
    try:
        from mmkernels.ops import specs
    except ImportError:  # without torch nothing runs, and parts are only listed
        return _ROW_SECONDS
    rows = sum(1 + bool(config.grads) for config in specs()[op].benchmarks if "gpu" in config.devices)
    return _ROW_SECONDS * max(1, rows)


def _workers() -> list[str]:
    """Returns pytest's options for several processes: what takes long is compiling, on one core each."""
    return ["-n", str(_PROCESSES)] if importlib.util.find_spec("xdist") else []


# The parts.


def build(turn: Turn) -> Result:
    _, verdicts = run_python(turn, "setup.py", "-q", "build_ext", "--inplace")
    package = ROOT / "mmkernels"
    reasons = [f"{path.stem}: {path.read_text().strip()}" for path in sorted(package.glob("*_why_not.txt"))]
    built = sorted(path.name.partition(".")[0] for path in package.glob("*.so"))
    return {"summary": ", ".join(built) or "nothing built", "lines": reasons} | verdicts


def describe(turn: Turn) -> Result:
    d = repr(turn.device)
    return _evaluate(turn, f"dict(device=m.device_name({d}), slug=m.device_slug({d}), machine=m.describe_machine({d}))")


def measure_ceilings(turn: Turn) -> Result:
    rates = _evaluate(turn, f"m.ceilings({turn.device!r}, ['bf16'])")
    if "problems" in rates:
        return rates
    copy, matmul = rates["copy_bytes_per_second"] / 1e12, rates["bf16_flops_per_second"] / 1e12
    return {"summary": f"copy {copy:.2f} TB/s, bf16 matmul {matmul:,.1f} TFLOP/s", "ceilings": rates}


def _evaluate(turn: Turn, expression: str) -> Result:
    """Returns what an expression says about `mmkernels.machine`, called m."""
    out = turn.folder / "value.json"
    code = f"import json, pathlib, mmkernels.machine as m; text = json.dumps({expression})"
    _, verdicts = run_python(turn, "-c", f"{code}; pathlib.Path({str(out)!r}).write_text(text)")
    return dict(json.loads(out.read_text())) if out.exists() else verdicts


def run_tests(*words: str) -> Callable[[Turn], Result]:
    """Returns the part that runs tests; a test may record a "line" for people and a "row" of figures."""

    def run(turn: Turn) -> Result:
        cases, verdicts = run_python(turn, *PYTEST, *words)
        states = Counter(case["state"] for case in cases)
        found = {"summary": ", ".join(f"{count} {state}" for state, count in states.items()), "tests": len(cases)}
        recorded = [case for case in cases if "row" in case]
        if recorded:
            rows = [json.loads(case["row"]) for case in recorded]
            found |= {"lines": [case["line"] for case in recorded], "figures": rows}
        return found | verdicts

    return run


def measure_op(op: str, *options: str) -> Callable[[Turn], Result]:
    """Returns the part that measures an op's benchmarks, with more options of `mmkernels bench`."""

    def run(turn: Turn) -> Result:
        end = time.monotonic() + turn.seconds
        if turn.device != "cpu" and _workers():
            bench = [str(FOLDER / f"bench_{op}.py"), "--dtypes", "bf16", "--device", turn.device, "--compile-only"]
            run_python(turn._replace(seconds=_COMPILING * turn.seconds), *PYTEST, *bench, *_workers())
        command = [*MMKERNELS, "bench", op, "--dtype", "bf16", "--device", turn.device, "--out", str(turn.folder)]
        left = turn._replace(seconds=max(0.0, end - time.monotonic()))
        _, verdicts = run_python(left, *command, *options)
        report = turn.folder / f"{op}.json"
        entries = json.loads(report.read_text())["benchmarks"] if report.exists() else []
        rows = [entry["extra_info"] for entry in entries]
        return {"summary": f"{len(rows)} rows", "lines": _lines(rows), "rows": rows} | verdicts

    return run


def _lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    from mmkernels.bench.tables import line

    return [f"{row['configuration']}, {row['pass']}: {line(dict(row))}" for row in rows]


def flamingo(turn: Turn, size: str = "base", tokens: str = "64,1024", text_length: int = 2048,
             dtype: str = "bf16") -> Result:  # fmt: skip
    """Prefill and a training step with 5 images: with the size's own 64 visual tokens an image, and with 1,024."""
    command = [*MMKERNELS, "profile", "flamingo", "--size", size, "--tokens", tokens, "--images", "5", "--train"]
    command += ["--text-length", str(text_length), "--dtype", dtype, "--device", turn.device]
    _, verdicts = run_python(turn, *command, "--out", str(turn.folder))
    path = turn.folder / "profile.json"
    if not path.exists():
        return verdicts
    report = json.loads(path.read_text())
    naive = {cell["tokens_per_image"]: cell for cell in report["cells"] if cell["backend"] == "reference"}
    fused = [cell for cell in report["cells"] if cell["backend"] == "fused"]
    stages = (("prefill", "prefill", "peak_memory_bytes"), ("train_step", "training step", "train_peak_memory_bytes"))
    rows, lines = [], []
    for cell, (stage, title, memory) in itertools.product(fused, stages):
        what, bound = f"Flamingo {size}, 5 x {cell['tokens_per_image']} visual tokens", cell["amdahl"].get(stage)
        ours, theirs = cell[memory], naive[cell["tokens_per_image"]][memory]
        ratio = theirs / ours if ours and theirs else None
        targets = [
            {"than": "cap", "unit": "share", "least": 0.85, "found": bound and bound["share_of_cap"]},
            {"than": "memory of naive", "unit": "ratio", "least": 3.0, "found": ratio},
        ]
        rows.append({"configuration": what, "dtype": dtype, "pass": title, "targets": targets})
        if bound:
            lines.append(f"{what}, {title}: {bound['speedup']:.2f}x of at most {bound['cap']:.2f}x")
    found = {"summary": f"{len(report['cells'])} cells", "lines": lines, "rows": rows, "profile": report}
    return found | verdicts


def measure_kernels(turn: Turn) -> Result:
    from gpu_kernels import profile_kernels

    return profile_kernels(turn.folder / "ncu.csv", turn.seconds)


# Running commands.

MMKERNELS = ("-m", "mmkernels")
PYTEST = ("-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", "-p", "no:warnings")


def run_command(command: Sequence[str], seconds: float, **environment: str) -> int | None:
    """Returns the exit code; None: it took longer, and was ended with all that it had started. It prints on stderr."""
    paths = [str(ROOT), str(FOLDER), os.environ.get("PYTHONPATH", "")]
    everything = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))} | environment
    with subprocess.Popen(command, cwd=ROOT, env=everything, stdout=_STDERR, start_new_session=True) as process:
        try:
            return process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def run_python(turn: Turn, *words: str) -> tuple[list[dict[str, str]], Result]:
    """Runs Python with these arguments for a part. Where it runs pytest, no test begins when the time is nearly over.

    Returns:
        Of each test its name, state, message and what it recorded; and the part's "problems" and "left_out".
    """
    junit = turn.folder / "junit.xml"
    junit.unlink(missing_ok=True)
    options = ["-p", "time_limit", "--seconds", f"{_WIND_UP * turn.seconds:.1f}", f"--junitxml={junit}"]
    code = run_command([sys.executable, *words], turn.seconds + _GRACE, PYTEST_ADDOPTS=shlex.join(options))
    cases = [_case(case) for case in ElementTree.parse(junit).iter("testcase")] if junit.exists() else []
    problems = [f"{x['name']}: {(x['message'].splitlines() or [''])[0]}" for x in cases if x["state"] == "failed"]
    left_out = [case["name"] for case in cases if LEFT_OUT in case["message"]]
    if not problems and not left_out and code not in (0, _NOTHING_COLLECTED):
        ended = "took too long, and was ended" if code is None else f"ended with exit code {code}, see above"
        problems = [ended]
    return cases, {"problems": problems, "left_out": left_out}


def _case(case: ElementTree.Element) -> dict[str, str]:
    found = {"name": case.get("name", "?"), "state": "passed", "message": ""}
    for child in case:
        if child.tag in ("failure", "error", "skipped"):
            found["state"] = "skipped" if child.tag == "skipped" else "failed"
            found["message"] = child.get("message") or ""
    return found | {entry.get("name", "?"): entry.get("value", "") for entry in case.iter("property")}
