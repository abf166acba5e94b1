"""Prints the JSON of bench_models.py as tables.

python benchmarks/models_report.py build/bench/models.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from models_targets import NAIVE, SDPA
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mmkernels.bench import tables
from mmkernels.report import MISSING, console, megabytes, milliseconds, percent, ratio, table, unique
from mmkernels.targets import OURS

_WIDTH = 140
Tables = Callable[[list[dict[str, Any]]], Table]

_LEGEND = (
    "ms: of one run of ours, or of transformers' model on mmkernels' attention where the row says so. vs sdpa: the\n"
    "time of transformers' model on sdpa over ours; LXMERT has a formula of its own alone, and for word times\n"
    "transformers leaves sdpa; vs naive: that of ours on the naive formula of every op.\n"
    "at most: the time on sdpa, or naive where that ran, over that of ours with every op of mmkernels removed (the\n"
    "Amdahl cap); share: of the cap that is reached. attention: all its calls in a run, of a training step in its\n"
    "forward pass; of peak: their rate over the visible pairs, as a share of the FMA peak. MB: peak memory above the\n"
    "model and its inputs; of a training step what the forward pass keeps for the backward pass, but for gradients.\n"
    "Random weights; published widths and a few layers, or small sizes."
)


def render(report: dict[str, Any]) -> RenderableType:
    """Returns a table for each dtype, and one of the targets."""
    versions = report["machine_info"]["versions"]
    about = f"beside transformers {versions['transformers']} on sdpa, torch {versions['torch']}"
    return by_dtype(report, "models", about, _table, _LEGEND)


def by_dtype(report: dict[str, Any], name: str, about: str, make: Tables, legend: str) -> RenderableType:
    """Returns a heading, a table for each dtype, one of the targets, and what the columns mean.

    Args:
        report: the JSON of a bench file. name: of the bench file. about: follows the name, before the device's.
        make: makes the table of some rows.
    """
    rows = [entry["extra_info"] for entry in report["benchmarks"]]
    heading = Text.assemble((name, "bold"), f" {about}, on {report['machine_info']['device']}\n")
    expected = report.get("expected_rows", len(rows))
    if len(rows) < expected:
        heading.append(f"{expected - len(rows)} of {expected} rows were not measured\n", style="yellow")
    parts: list[RenderableType] = [heading]
    for dtype in unique(rows, "dtype"):
        parts += [Text(dtype, style="bold"), make([row for row in rows if row["dtype"] == dtype])]
    if any(row["targets"] for row in rows):
        parts.append(tables.targets(rows))
    return Group(*parts, Text(legend, style="dim"))


def _table(rows: list[dict[str, Any]]) -> Table:
    naive = any(NAIVE in row["peers"] for row in rows)
    titles = ["ms", "vs\nsdpa", *["vs\nnaive"] * naive, "at\nmost", "share", "calls\na layer"]
    titles += ["attention\nms", "vs\nsdpa", "of\npeak", "MB", "sdpa's\nMB", *["naive's\nMB"] * naive]
    return table((_cells(row, naive) for row in rows), ["model", "", *titles], texts=2)


def _cells(row: dict[str, Any], naive: bool) -> list[str]:
    """Returns what stands in a row; `naive`: with the columns of the naive model."""
    bound, attention, peers = row["amdahl"], row["attention"], row["peers"]
    of_naive = peers.get(NAIVE)
    return [
        row["configuration"],
        row["pass"],
        milliseconds(row["seconds"]),
        ratio(peers[SDPA]["ratio"]),
        *[ratio(of_naive["ratio"]) if of_naive else MISSING] * naive,
        ratio(bound["cap"]),
        percent(bound["share_of_cap"]),
        f"{attention['calls_per_layer']:.3g}",
        milliseconds(attention["seconds"][OURS]),
        ratio(attention["ratio"]) if "ratio" in attention else MISSING,
        percent(attention["share_of_peak"]),
        megabytes(row["peak_memory_bytes"]),
        megabytes(peers[SDPA]["peak_memory_bytes"]),
        *[megabytes(of_naive["peak_memory_bytes"]) if of_naive else MISSING] * naive,
    ]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    console(_WIDTH).print(render(json.loads(Path(sys.argv[1]).read_text())))
