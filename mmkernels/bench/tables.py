"""What ``mmkernels bench`` prints: a line for each row as it comes, and the tables of a result file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mmkernels.report import Footnotes, megabytes, milliseconds, percent, table, unique, verdict

Row = dict[str, Any]
"""The ``extra_info`` of one row in a result file."""

_LEGEND = (
    "ms: median of ours. vs a peer: its time over ours, so above 1 ours is faster. at peak: the ratio to\n"
    "the fastest peer of a kernel that did only the least work, at the full rate of arithmetic or memory.\n"
    "of peak: of the arithmetic's rate or, if more, of the memory bandwidth (b), measured between the\n"
    "calls with all threads at once. MB: peak memory above the inputs, ours and the naive baseline's."
)
_TARGETS_LEGEND = (
    "\ntargets: ours over a peer's speed, or the share of a peak, of the ratio at peak, or of the\n"
    "yardstick's rate (head dim 128); tflops: of the pass, and in rows of forward + backward of the\n"
    "backward alone; memory: peak above inputs and gradients, a peer's over ours (of which some MB may be\n"
    "allowed), or ours in MB; ms: of a training step, beside the best that is published."
)
_COUNTED = "\nGEMMs: matrix products that ours made, counted as it ran; the op's forward pass needs one."


def line(row: Row) -> str:
    """Returns the figures of one row in one line."""
    ratios = [f"{name} {peer['ratio']:.2f}x" for name, peer in row["peers"].items() if "ratio" in peer]
    figures = [f"{milliseconds(row['seconds'])} ms"]
    if "backward_flops_per_second" in row:  # the rate of the backward pass alone, as its target has it
        figures.append(f"{row['backward_flops_per_second'] / 1e12:,.0f} TFLOP/s backward")
    elif "flops_per_second" in row:
        rate = row["flops_per_second"]
        figures.append(f"{rate / 1e12:,.0f} TFLOP/s" if rate >= 1e13 else f"{rate / 1e9:,.0f} GFLOP/s")
    figures += ratios
    if row.get("amdahl"):
        figures.append(f"{percent(row['amdahl']['share_of_cap'])} of the cap, {row['amdahl']['cap']:.2f}x")
    attention = row.get("attention", {})
    if attention.get("share_of_peak") is not None:
        calls, share = attention["calls_per_layer"], percent(attention["share_of_peak"])
        figures.append(f"{calls:.3g} attention calls a layer, {share} of peak")
    if "share_of_compute_peak" in row:
        figures.append(f"{_share(row).strip()} of peak")
    if row.get("peak_memory_bytes") is not None:
        figures.append(f"{megabytes(row['peak_memory_bytes'])} MB")
    return ", ".join(figures)


def render(report: dict[str, Any], *, with_targets: bool = True) -> RenderableType:
    """Returns a table for each dtype and pass, and one of the targets."""
    rows = _rows(report)
    parts: list[RenderableType] = [_heading(report, rows)]
    for group in dict.fromkeys((row["dtype"], row["pass"]) for row in rows):
        parts += [Text(" ".join(group), style="bold")]
        parts += _table([row for row in rows if (row["dtype"], row["pass"]) == group])
    if with_targets and any(row.get("targets") for row in rows):
        parts += [targets(rows), Text()]
    return Group(*parts)


def all_targets(reports: Iterable[dict[str, Any]]) -> RenderableType:
    """Returns a table of the targets of each op."""
    every = [row for report in reports for row in _rows(report) if row.get("targets")]
    parts = [targets([row for row in every if row["op"] == op], f"targets of {op}") for op in unique(every, "op")]
    return Group(*parts, Text())


def _rows(report: dict[str, Any]) -> list[Row]:
    return [entry["extra_info"] for entry in report["benchmarks"]]


def legend(reports: Sequence[dict[str, Any]]) -> Text:
    """Returns what the tables of these result files mean."""
    rows = [row for report in reports for row in _rows(report)]
    words = _LEGEND
    if any(row["targets"] for row in rows):
        words += _TARGETS_LEGEND
    if any("gemms" in row for row in rows):
        words += _COUNTED
    return Text(words, style="dim")


def _heading(report: dict[str, Any], rows: list[Row]) -> Text:
    machine = report["machine_info"]
    rates = machine["ceilings"]
    peaks = [f"{name} {rates[f'{name}_flops_per_second'] / 1e9:,.0f} GFLOP/s" for name in unique(rows, "dtype")]
    peaks.append(f"copy {rates['copy_bytes_per_second'] / 1e9:,.0f} GB/s")
    peaks.append(f"read {rates['read_bytes_per_second'] / 1e9:,.0f} GB/s")
    title = Text(", ".join(unique(rows, "op")), style="bold")
    title.append(f" on {machine['device']}; measured peaks: {', '.join(peaks)}\n", style="not bold")
    missing = report.get("expected_rows", len(rows)) - len(rows)
    if missing:
        title.append(f"{missing} of {report['expected_rows']} rows were not measured\n", style="yellow")
    return title


def _table(rows: list[Row]) -> list[RenderableType]:
    peers = list(dict.fromkeys(name for row in rows for name in row["peers"]))
    notes = Footnotes()
    counted = any("gemms" in row for row in rows)
    bounded = any(_ratio_at_peak(row) for row in rows)  # older files have no such ratio
    titles = ["ms", *("vs\n" + name.replace(" ", "\n") for name in peers)]
    titles += ["at\npeak"] * bounded + ["GFLOP\n/s", "of\npeak"] + ["GEMMs"] * counted + ["MB", "naive\nMB"]
    cells = []
    for row in rows:
        naive = row["peers"].get("naive", {}).get("peak_memory_bytes")
        cells.append(
            [
                row["configuration"],
                milliseconds(row["seconds"]),
                *(_ratio(name, row["peers"].get(name), notes) for name in peers),
                *[_ratio_at_peak(row)] * bounded,
                f"{row['flops_per_second'] / 1e9:,.0f}",
                _share(row),
                *[f"{row['gemms']:.3g}" if "gemms" in row else ""] * counted,
                megabytes(row["peak_memory_bytes"]),
                megabytes(naive),
            ]
        )
    return [table(cells, ["configuration", *titles]), *map(Text, notes.lines()), Text()]


def targets(rows: Iterable[Row], title: str = "targets") -> Table:
    """Returns a table of ours beside each target, and of what a kernel at the full peak would reach."""
    cells = []
    for row in rows:
        for target in row.get("targets", ()):
            least, most, reached, at_peak = (_value(target, key) for key in ("least", "most", "found", "at_peak"))
            name = [row["configuration"], row["dtype"], row["pass"], target["than"]]
            cells.append([*name, least or f"<= {most}", reached, at_peak, verdict(target)])
    return table(cells, [title, "dtype", "pass", "than", "target", "ours", "at peak", ""], texts=3)


_UNITS = {"peak": "share", "bandwidth": "share", "tflops": "TFLOP/s", "extra MB": "MB"}  # in files that name none


def _value(target: dict[str, Any], key: str) -> str:
    value, unit = target.get(key), target.get("unit", _UNITS.get(target["than"]))
    if value is None:
        return ""
    if unit == "share":
        return percent(value)
    return f"{value:,.0f}" if unit in ("TFLOP/s", "MB") else f"{value:.2f}"


def _ratio(name: str, peer: dict[str, Any] | None, notes: Footnotes) -> str:
    if peer is None:
        return ""
    return notes.mark(f"{name}: {peer['why_not']}") if "why_not" in peer else f"{peer['ratio']:.2f}"


def _ratio_at_peak(row: Row) -> str:
    """Of the fastest peer."""
    bounds = [peer["ratio_at_peak"] for peer in row["peers"].values() if "ratio_at_peak" in peer]
    return f"{min(bounds):.2f}" if bounds else ""


def _share(row: Row) -> str:
    compute, bandwidth = row["share_of_compute_peak"], row["share_of_bandwidth_peak"]
    return f"{percent(compute)} " if compute >= bandwidth else f"{percent(bandwidth)}b"
