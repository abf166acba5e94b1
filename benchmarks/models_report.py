"""Prints the JSON of bench_models.py as tables.

python benchmarks/models_report.py build/bench/models.json
"""

from __future__ import annotations

import json
import sys
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
    rows = [entry["extra_info"] for entry in report["benchmarks"]]
    parts: list[RenderableType] = [_heading(report, len(rows))]
    for dtype in unique(rows, "dtype"):
        parts += [Text(dtype, style="bold"), _table([row for row in rows if row["dtype"] == dtype])]
    if any(row["targets"] for row in rows):
        parts.append(tables.targets(rows))
    return Group(*parts, Text(_LEGEND, style="dim"))


def _heading(report: dict[str, Any], rows: int) -> Text:
    machine = report["machine_info"]
    versions = machine["versions"]
    rest = (
        f" beside transformers {versions['transformers']} on sdpa, torch {versions['torch']}, on {machine['device']}\n"
    )
    heading = Text.assemble(("models", "bold"), rest)
    expected = report.get("expected_rows", rows)
    if rows < expected:
        heading.append(f"{expected - rows} of {expected} rows were not measured\n", style="yellow")
    return heading


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
