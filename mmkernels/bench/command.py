"""``mmkernels bench``: run the bench files of a checkout, print their ratios, draw them."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

import pytest

import mmkernels
from mmkernels.bench import picture, tables
from mmkernels.bench.plugin import RowsPlugin
from mmkernels.interrupts import Interrupted
from mmkernels.machine import device_slug
from mmkernels.ops import MODULES
from mmkernels.options import DTYPES, BadInput, check_device, one_of
from mmkernels.report import WIDTH, console, prepare_folder

_GPU_WIDTH = 130  # columns: a GPU has more peers
_WHOLE_MODELS = {"tokens": ("fastv",), "contrastive": ("ring",)}
"""Bench files that measure more than one op beside the ops of a family: a model, ranks."""
_WITH = {"linear_logprobs": ("linear_cross_entropy",), "integrations": ("max_sim",)}
"""Ops that are shown with what is built on them."""


def run_bench(
    op: str | None,
    dtypes: Sequence[str],
    device: str,
    wanted: str,
    out: Path,
    *,
    save: bool = False,
    quick: bool = False,
) -> None:
    """Runs, prints, and writes ``<op>.json`` and ``<op>.png``; each row is printed and saved as it finishes.

    Args:
        op: an op, or a family of ops such as "tokens"; None: every op that has a bench file.
        wanted: only rows whose name contains one of these, see `rows.select`.
        out: folder for the results.
        save: write to ``benchmarks/results/<device>/`` instead of `out`.
        quick: only the ops' headline rows, in few rounds and beside the quick peers.

    Raises:
        BadInput: there is no checkout, no such op or row; `out` can't be written to.
        Interrupted: by Ctrl-C; the rows that were measured are printed and saved.
        SystemExit: a result was wrong.
    """
    folder = find_benchmarks()
    files = {path.stem.removeprefix("bench_"): path for path in sorted(folder.glob("bench_*.py"))}
    if op is not None:
        groups = _groups(files)
        one_of("op", op, tuple(groups))
        files = {name: files[name] for name in groups[op]}
    if quick and op not in files:
        files = {name: path for name, path in files.items() if name in MODULES}
    for dtype in dtypes or ("",):
        one_of("--dtype", dtype, tuple(DTYPES))
    check_device(device)
    out = folder / "results" / device_slug(device) if save else out
    prepare_folder(out)
    options = ["--dtypes", ",".join(dtypes), "--device", device, *["--quick"] * quick]
    plugin = RowsPlugin(wanted, out.resolve())
    code = _pytest([*map(str, files.values()), *options], plugin, folder.parent)
    if plugin.bad_filter is not None:
        raise plugin.bad_filter
    _show([out / result.name for result in plugin.results], folder, device)
    if plugin.interrupted:
        raise Interrupted("the rows above are saved" if plugin.results else "nothing was measured yet")
    if code == pytest.ExitCode.NO_TESTS_COLLECTED:
        raise BadInput(f"no row of {', '.join(files)} runs on {device}")
    if code != pytest.ExitCode.OK:
        print("mmkernels: some rows gave no time, see above", file=sys.stderr)
        raise SystemExit(1)


def _groups(files: Collection[str]) -> dict[str, list[str]]:
    """Returns what can be asked for, and the bench files of each: a file, or a family of ops."""
    groups = {name: [name, *(other for other in _WITH.get(name, ()) if other in files)] for name in files}
    for name in files:
        if name in MODULES:
            groups.setdefault(MODULES[name].split(".")[2], []).append(name)
    for family, whole in _WHOLE_MODELS.items():
        if family in groups:
            groups[family] += [name for name in whole if name in files]
    return groups


def find_benchmarks() -> Path:
    """Returns the folder ``benchmarks`` of the checkout that the package or the working directory belongs to."""
    for root in (Path(mmkernels.__file__).parents[1], Path.cwd()):
        if list((root / "benchmarks").glob("bench_*.py")):
            return root / "benchmarks"
    raise BadInput("benchmarks/ is part of the source, not of the package: run this in a checkout of mmkernels")


def _pytest(arguments: list[str], plugin: RowsPlugin, root: Path) -> int:
    """Runs pytest in this process, with what it prints on standard error; returns its exit code."""
    quiet = ["-qq", "--no-header", "-p", "no:warnings", "-p", "no:cacheprovider", "--benchmark-quiet"]
    with contextlib.redirect_stdout(sys.stderr):
        return int(pytest.main([*arguments, *quiet, f"--rootdir={root}"], plugins=[plugin]))


def _show(results: Sequence[Path], folder: Path, device: str) -> None:
    """Prints the tables of result files, and draws their pictures."""
    output, shown = console(WIDTH if device == "cpu" else _GPU_WIDTH), []
    for result in results:
        report = json.loads(result.read_text())
        custom = folder / f"{result.stem}_report.py"  # of a benchmark whose rows are not an op's
        if custom.exists():
            subprocess.run([sys.executable, str(custom), str(result)], check=True)
        else:
            output.print(tables.render(report, with_targets=len(results) == 1))
            shown.append(report)
        picture.draw(report, result.with_suffix(".png"))
        output.print(f"Written: {result.with_suffix('.png')} (picture), {result} (all numbers)\n", soft_wrap=True)
    if shown:
        if len(results) > 1:
            output.print(tables.all_targets(shown))
        output.print(tables.legend(shown))
