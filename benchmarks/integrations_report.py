"""Prints the JSON of bench_integrations.py as tables.

python benchmarks/integrations_report.py build/bench/integrations.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from integrations_targets import EAGER, SDPA
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mmkernels.bench import tables
from mmkernels.report import MISSING, console, megabytes, milliseconds, percent, ratio, table, unique

_WIDTH = 130

_LEGEND = (
    "ms: of one run of the patched model. vs eager, sdpa: the time of the model before, on that attention, over ours;\n"
    "models without a slot for attention have eager alone. at most: the fastest of these over ours with every op of\n"
    "mmkernels removed (the Amdahl cap); share: of the cap that is reached. attention: modules without their linear\n"
    "layers, against eager's; of peak: the rate of the op's calls over the visible pairs, as a share of the FMA\n"
    "peak. MB: peak memory above the model and its inputs; of a training step what the forward pass keeps for the\n"
    "backward pass, but for gradients; own MB: of the fastest before. Random weights, published widths, a few layers."
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
    rest = f": transformers {versions['transformers']} before and after patch, torch {versions['torch']}, on "
    heading = Text.assemble(("integrations", "bold"), rest, machine["device"], "\n")
    expected = report.get("expected_rows", rows)
    if rows < expected:
        heading.append(f"{expected - rows} of {expected} rows were not measured\n", style="yellow")
    return heading


def _table(rows: list[dict[str, Any]]) -> Table:
    titles = ["ms", "vs\neager", "vs\nsdpa", "at\nmost", "share", "attention\nvs eager", "of\npeak", "MB", "own\nMB"]
    return table(map(_cells, rows), ["model", "", *titles], texts=2)


def _cells(row: dict[str, Any]) -> list[str]:
    peers, bound = row["peers"], row["amdahl"]
    own = min(peers.values(), key=lambda peer: peer["seconds"])
    of_modules, of_peak = row["attention_modules"]["ratio"], row["attention_calls"]["share_of_peak"]
    return [
        row["configuration"],
        row["pass"],
        milliseconds(row["seconds"]),
        *(ratio(peers[name]["ratio"]) if name in peers else MISSING for name in (EAGER, SDPA)),
        ratio(bound["cap"]),
        percent(bound["share_of_cap"]),
        MISSING if of_modules is None else ratio(of_modules),
        MISSING if of_peak is None else percent(of_peak),
        megabytes(row["peak_memory_bytes"]),
        megabytes(own["peak_memory_bytes"]),
    ]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    console(_WIDTH).print(render(json.loads(Path(sys.argv[1]).read_text())))
