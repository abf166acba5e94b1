"""The parts of `make gpu`, one a process: ``python benchmarks/gpu_parts.py PART --seconds N --out result.json``."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent
_STDERR = 2
_PROCESSES = 8  # that compile at a time
_COMPILING = 0.4  # of a bench file's time, after which it compiles no more beforehand
_WIND_UP = 0.9  # of a part's time, after which nothing new begins in it

Result = dict[str, Any]  # as in gpu.py


def build(seconds: float, device: str) -> Result:
    code = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=ROOT, stdout=_STDERR
    ).returncode
    reasons = [
        f"{path.stem}: {path.read_text().strip()}" for path in sorted((ROOT / "mmkernels").glob("*_why_not.txt"))
    ]
    built = sorted(path.name.partition(".")[0] for path in (ROOT / "mmkernels").glob("*.so"))
    problems = [] if code == 0 else [f"setup.py build_ext: exit code {code}, see above"]
    return {"summary": ", ".join(built) or "nothing built", "lines": reasons, "problems": problems}


def describe(seconds: float, device: str) -> Result:
    from mmkernels.machine import describe_machine, device_name, device_slug

    return {"device": device_name(device), "slug": device_slug(device), "machine": describe_machine(device)}


def measure_ceilings(seconds: float, device: str) -> Result:
    from mmkernels.machine import ceilings

    rates = ceilings(device, ("bf16",))
    summary = (
        f"copy {rates['copy_bytes_per_second'] / 1e12:.2f} TB/s, "
        f"bf16 matmul {rates['bf16_flops_per_second'] / 1e12:,.1f} TFLOP/s"
    )
    return {"summary": summary, "ceilings": rates}


def run_tests(seconds: float, device: str) -> Result:
    code, cases = _pytest(["tests", "-m", "gpu", *_workers()], seconds)
    passed = sum(case["state"] == "passed" for case in cases)
    skipped = sum(case["state"] == "skipped" for case in cases)
    return {"summary": f"{passed} passed, {skipped} skipped", "tests": len(cases)} | _verdicts(code, cases)


def _workers() -> list[str]:
    """pytest's options for several processes: what takes long is compiling, on one core each."""
    return ["-n", str(min(_PROCESSES, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []


def check_nan(seconds: float, device: str) -> Result:
    from gpu_checks import check_all

    return check_all(time.monotonic() + _WIND_UP * seconds, device, processes=min(_PROCESSES, os.cpu_count() or 1))


def measure_op(op: str) -> Callable[[float, str], Result]:
    """A bench file's rows."""

    def run(seconds: float, device: str, *more: str) -> Result:
        end = time.monotonic() + seconds
        options = [str(FOLDER / f"bench_{op}.py"), "-p", "no:warnings", "--dtypes", "bf16", "--device", device, *more]
        if device != "cpu" and _workers():
            _pytest([*options, "--compile-only", *_workers()], _COMPILING * seconds)
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "bench.json"
            options += ["--benchmark-quiet", f"--benchmark-json={report}"]
            code, cases = _pytest(options, end - time.monotonic())
            text = report.read_text() if report.exists() else ""
        rows = [entry["extra_info"] for entry in json.loads(text)["benchmarks"]] if text else []
        targets = [
            {"what": f"{row['configuration']}, {row['pass']}", **target} for row in rows for target in row["targets"]
        ]
        result = {"summary": f"{len(rows)} rows", "lines": [_line(row) for row in rows], "rows": rows}
        return result | {"targets": targets} | _verdicts(code, cases)

    return run


def _line(row: dict[str, Any]) -> str:
    """Such as "media, forward: 0.35 ms, 420 TFLOP/s; sdpa 12.1x flex 1.4x"."""
    rate = row["flops_per_second"]
    if "backward_seconds" in row:
        rate = row["backward_flops_per_second"]
    arithmetic = f"{rate / 1e12:,.0f} TFLOP/s{' backward' if 'backward_seconds' in row else ''}"
    speed = arithmetic if row["share_of_compute_peak"] > row["share_of_bandwidth_peak"] else (
        f"{row['bytes_per_second'] / 1e12:.2f} TB/s"
    )  # fmt: skip
    ratios = [f"{name} {peer['ratio']:.1f}x" for name, peer in row["peers"].items() if "ratio" in peer]
    passes = row["pass"].replace("forward + backward", "fwd+bwd").replace("forward", "fwd")
    return f"{row['configuration']}, {passes}: {row['seconds'] * 1e3:.3f} ms, {speed}; {' '.join(ratios)}"


def measure_flamingo(
    seconds: float, device: str, *, size: str = "base", tokens: Sequence[int] = (64, 1024), text_length: int = 2048,
    dtype: str = "bf16",
) -> Result:  # fmt: skip
    """Prefill and a training step with 5 images: the size's own 64 visual tokens an image, and 1,024."""
    from mmkernels.models.blocks.images import load_image
    from mmkernels.profiling.options import Options
    from mmkernels.profiling.photo import default_photo
    from mmkernels.profiling.profiler import profile

    photo = default_photo()
    options = Options(
        "flamingo", photo, tuple(tokens), images=5, text_length=text_length, dtype=dtype, device=device, size=size,
        train=True,
    )  # fmt: skip
    report = profile(options, load_image(photo), lambda what: print(f"   {what}", file=sys.stderr, flush=True))
    naive = {cell["tokens_per_image"]: cell for cell in report["cells"] if cell["backend"] == "reference"}
    targets, lines = [], []
    for cell in report["cells"]:
        if cell["backend"] != "fused":
            continue
        count = cell["tokens_per_image"]
        what = f"Flamingo {size}, 5 x {count} visual tokens"
        for stage, title, memory in (
            ("prefill", "prefill", "peak_memory_bytes"),
            ("train_step", "training step", "train_peak_memory_bytes"),
        ):
            bound = cell["amdahl"].get(stage)
            targets.append(_target(f"{what}, {title}", "cap", 0.85, bound and bound["share_of_cap"]))
            own, other = cell[memory], naive[count][memory]
            targets.append(_target(f"{what}, {title}, memory", "naive", 3.0, other / own if own and other else None))
            if bound:
                lines.append(f"{what}, {title}: {bound['speedup']:.2f}x of at most {bound['cap']:.2f}x")
    return {"summary": f"{len(report['cells'])} cells", "lines": lines, "targets": targets, "profile": report}


def _target(what: str, than: str, least: float, found: float | None) -> dict[str, Any]:
    return {"what": what, "than": than, "least": least, "found": found}


def measure_host(seconds: float, device: str) -> Result:
    from gpu_checks import host_times

    return host_times(time.monotonic() + _WIND_UP * seconds, device)


def measure_kernels(seconds: float, device: str) -> Result:
    from gpu_kernels import profile_kernels

    return profile_kernels(seconds)


def _pytest(arguments: list[str], seconds: float) -> tuple[int, list[dict[str, str]]]:
    """Exit code, and each test's name, state and message."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "junit.xml"
        command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", "-p", "time_limit"]
        command += ["--seconds", f"{_WIND_UP * seconds:.1f}", f"--junitxml={found}", *arguments]
        paths = os.pathsep.join([str(ROOT), str(FOLDER), os.environ.get("PYTHONPATH", "")])
        code = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": paths}, stdout=_STDERR).returncode
        root = ElementTree.parse(found).getroot() if found.exists() else ElementTree.Element("none")
    cases = []
    for case in root.iter("testcase"):
        state, message = "passed", ""
        for child in case:
            if child.tag in ("failure", "error", "skipped"):
                state = "skipped" if child.tag == "skipped" else "failed"
                message = child.get("message") or ""
        cases.append({"name": case.get("name", "?"), "state": state, "message": message})
    return code, cases


def _verdicts(code: int, cases: Sequence[dict[str, str]]) -> Result:
    from time_limit import LEFT_OUT

    problems = [
        f"{case['name']}: {next(iter(case['message'].splitlines()), '')}" for case in cases if case["state"] == "failed"
    ]
    if not problems and code not in (0, 5):  # 5: nothing was collected
        problems = [f"pytest ended with exit code {code}, see above"]
    return {"problems": problems, "left_out": [case["name"] for case in cases if LEFT_OUT in case["message"]]}


PARTS: dict[str, Callable[[float, str], Result]] = {
    "build": build,
    "describe": describe,
    "ceilings": measure_ceilings,
    "tests": run_tests,
    "nan": check_nan,
    "flamingo": measure_flamingo,
    "host": measure_host,
    "ncu": measure_kernels,
}


def run_part(name: str, seconds: float, device: str) -> Result:
    """A part's result; an error in it is a problem that it found."""
    try:
        return (PARTS[name] if name in PARTS else measure_op(name))(seconds, device)
    except Exception as error:  # the other parts go on
        traceback.print_exc()
        return {"problems": [f"{name}: {type(error).__name__}: {next(iter(str(error).splitlines()), '')}"]}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("part")
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    result = run_part(options.part, options.seconds, options.device)
    options.out.write_text(json.dumps(result))
    sys.stderr.flush()
    os._exit(0)  # what a broken GPU context says at exit is no news


if __name__ == "__main__":
    main()
