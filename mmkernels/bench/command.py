"""``mmkernels bench``: run the bench files of a checkout, print their ratios, draw them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

import mmkernels
from mmkernels.machine import device_slug
from mmkernels.options import DTYPES, BadInput, check_device, one_of
from mmkernels.profiling.command import prepare_folder
from mmkernels.profiling.table import WIDTH, console, megabytes

_STDERR = 2  # where pytest's progress goes
_GPU_WIDTH = 130  # columns: a GPU has more peers
_NO_ROWS = 5  # pytest's exit code where nothing was collected


def run_bench(op: str | None, dtypes: Sequence[str], device: str, contains: str, out: Path, save: bool) -> None:
    """Run, print, and write ``<op>.json`` and ``<op>.png``.

    Args:
        op: None: every op that has a bench file.
        contains: only rows with this in their name.
        out: folder for the results.
        save: write to ``benchmarks/results/<device>/`` instead of `out`.

    Raises:
        BadInput: there is no checkout, no such op or row; `out` can't be written to.
        SystemExit: a result was wrong.
    """
    folder = find_benchmarks()
    files = {path.stem.removeprefix("bench_"): path for path in sorted(folder.glob("bench_*.py"))}
    if op is not None:
        one_of("op", op, tuple(files))
        files = {op: files[op]}
    for dtype in dtypes:
        one_of("--dtype", dtype, tuple(DTYPES))
    check_device(device)
    out = folder / "results" / device_slug(device) if save else out
    prepare_folder(out)
    failed = 0
    for name, path in files.items():
        result = out / f"{name}.json"
        failed += _run(path, result, ["--dtypes", ",".join(dtypes), "--device", device, "--filter", contains])
        own = folder / f"{name}_report.py"  # of a benchmark whose rows are not an op's
        if own.exists():
            subprocess.run([sys.executable, str(own), str(result)], check=True)
        else:
            report = json.loads(result.read_text())
            console(WIDTH if device == "cpu" else _GPU_WIDTH).print(render(report))
        subprocess.run([sys.executable, str(folder / "plot.py"), str(result)], check=True)
        console().print(f"Written: {result.with_suffix('.png')} (picture), {result} (all numbers)")
    if failed:
        print("mmkernels: some rows gave no time, see above", file=sys.stderr)
        raise SystemExit(1)


def find_benchmarks() -> Path:
    """The folder ``benchmarks`` of the checkout that the package or the working directory belongs to."""
    for root in (Path(mmkernels.__file__).parents[1], Path.cwd()):
        if list((root / "benchmarks").glob("bench_*.py")):
            return root / "benchmarks"
    raise BadInput("benchmarks/ is part of the source, not of the package: run this in a checkout of mmkernels")


def _run(path: Path, result: Path, options: list[str]) -> bool:
    """Write `result` by pytest; whether a row failed."""
    result.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", str(path), "-q", "--no-header", "-p", "no:warnings"]
    command += [f"--benchmark-json={result.resolve()}", "--benchmark-quiet", *options]
    code = subprocess.run(command, stdout=_STDERR, cwd=path.parents[1]).returncode
    if not result.exists() or not result.stat().st_size:
        if code in (0, _NO_ROWS):
            raise BadInput(f"no row of {path.name} matches {' '.join(options)}")
        raise SystemExit(1)
    return code != 0


def render(report: dict[str, Any]) -> RenderableType:
    """A table for each dtype and pass."""
    rows = [entry["extra_info"] for entry in report["benchmarks"]]
    parts: list[RenderableType] = [_heading(report, rows)]
    for group in dict.fromkeys((row["dtype"], row["pass"]) for row in rows):
        parts += [Text(" ".join(group), style="bold")]
        parts += _table([row for row in rows if (row["dtype"], row["pass"]) == group])
    legend = _LEGEND + (_COUNTED if any("gemms" in row for row in rows) else "")
    return Group(*parts, *_targets(rows), Text(legend, style="dim"))


_LEGEND = (
    "ms: median of ours. vs a peer: its time over ours, so above 1 ours is faster.\n"
    "of peak: of the arithmetic's rate or, if more, of the memory bandwidth (b); both measured here.\n"
    "targets: ours over the peer's speed, or the share of a peak; tflops: of the pass, and in rows of\n"
    "forward + backward of the backward alone; yardstick: the share of head dim 128's rate; at peak:\n"
    "what a kernel that did only the least work, at the full rate of arithmetic or memory, would reach;\n"
    "memory: peak above inputs and gradients, a peer's over ours, or ours in MB.\n"
    "MB: peak memory above the inputs, ours and the naive baseline's."
)
_COUNTED = "\nGEMMs: matrix products that ours made, counted as it ran; the op's forward pass needs one."


def _heading(report: dict[str, Any], rows: list[dict[str, Any]]) -> Text:
    machine = report["machine_info"]
    rates = machine["ceilings"]
    peaks = [f"{name} {rates[f'{name}_flops_per_second'] / 1e9:,.0f} GFLOP/s" for name in _unique(rows, "dtype")]
    peaks.append(f"copy {rates['copy_bytes_per_second'] / 1e9:,.0f} GB/s")
    peaks.append(f"read {rates['read_bytes_per_second'] / 1e9:,.0f} GB/s")
    title = Text(", ".join(_unique(rows, "op")), style="bold")
    title.append(f" on {machine['device']}; measured peaks: {', '.join(peaks)}\n", style="not bold")
    return title


def _unique(rows: list[dict[str, Any]], name: str) -> list[str]:
    return list(dict.fromkeys(row[name] for row in rows))


def _table(rows: list[dict[str, Any]]) -> list[RenderableType]:
    peers = list(dict.fromkeys(name for row in rows for name in row["peers"]))
    notes: dict[str, int] = {}
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("configuration")
    counted = ["GEMMs"] if any("gemms" in row for row in rows) else []
    versus = ("vs\n" + name.replace(" ", "\n") for name in peers)
    for title in ("ms", *versus, "GFLOP\n/s", "of\npeak", *counted, "MB", "naive\nMB"):
        table.add_column(title, justify="right")
    for row in rows:
        ratios = [_ratio(name, row["peers"].get(name), notes) for name in peers]
        speed = f"{row['flops_per_second'] / 1e9:,.0f}"
        naive = megabytes(row["peers"].get("naive", {}).get("peak_memory_bytes"))
        memory = megabytes(row["peak_memory_bytes"])
        products = [f"{row['gemms']:.3g}" if "gemms" in row else "" for _ in counted]
        table.add_row(row["configuration"], _ms(row["seconds"]), *ratios, speed, _share(row), *products, memory, naive)
    return [table, *(Text(f"[{number}] {note}") for note, number in notes.items()), Text()]


def _targets(rows: list[dict[str, Any]]) -> list[RenderableType]:
    """Ours beside each target, and what no kernel can pass here: the same ratio with nothing but the least work."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("targets")
    for title in ("dtype", "pass"):
        table.add_column(title)
    for title in ("than", "target", "ours", "at peak", ""):
        table.add_column(title, justify="right")
    for row in rows:
        for target in row.get("targets", ()):
            mark = verdict(target)
            least, *numbers = (_times(target["than"], target.get(key)) for key in ("least", "found", "at_peak"))
            bound = least or f"<= {_times(target['than'], target['most'])}"
            table.add_row(row["configuration"], row["dtype"], row["pass"], target["than"], bound, *numbers, mark)
    return [table, Text()] if table.row_count else []


def verdict(target: dict[str, Any]) -> Text:
    """Of one target in the JSON."""
    if target["found"] is None:
        return Text("can't run", style="yellow")
    return Text("met", style="green") if met(target) else Text("missed", style="yellow")


def met(target: dict[str, Any]) -> bool:
    """Whether a target in the JSON, a least or a most, is reached."""
    return bool(target["found"] >= target["least"] if "least" in target else target["found"] <= target["most"])


def _times(than: str, value: float | None) -> str:
    if value is None:
        return ""
    if than in ("peak", "bandwidth"):
        return f"{value:.0%}"
    return f"{value:,.0f}" if than in ("tflops", "extra MB") else f"{value:.2f}"


def _ratio(name: str, peer: dict[str, Any] | None, notes: dict[str, int]) -> str:
    if peer is None:
        return ""
    if "why_not" in peer:
        return f"[{notes.setdefault(f'{name}: ' + peer['why_not'], len(notes) + 1)}]"
    return f"{peer['ratio']:.2f}"


def _share(row: dict[str, Any]) -> str:
    compute, bandwidth = row["share_of_compute_peak"], row["share_of_bandwidth_peak"]
    return f"{compute:.0%} " if compute >= bandwidth else f"{bandwidth:.0%}b"


def _ms(seconds: float) -> str:
    value = seconds * 1e3
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.3f}"
