"""Prints the JSON of bench_transformers.py as tables.

python benchmarks/transformers_report.py build/bench/transformers.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mmkernels.report import console, megabytes, met, microseconds, milliseconds, percent, ratio, table, unique, verdict

_WIDTH = 130

_LEGEND = (
    "forward: of the whole model. vs sdpa: sdpa's time over ours. at most: sdpa's time over the time with every op of\n"
    "mmkernels removed (the Amdahl cap); share: of the cap that is reached. attention: all calls of the registered\n"
    "function in a forward pass, together; to images: only those whose keys are the images'. masks: the function that\n"
    "makes them, in a forward pass. MB: peak memory of a forward pass above the model and its inputs.\n"
    "Published widths, random weights, one or two layers: a deeper model makes its masks just as often."
)


def render(report: dict[str, Any]) -> RenderableType:
    """Returns a table for each dtype, and one of the targets."""
    rows = [entry["extra_info"] for entry in report["benchmarks"]]
    parts: list[RenderableType] = [_heading(report["machine_info"])]
    for dtype in unique(rows, "dtype"):
        parts += [Text(dtype, style="bold"), _table([row for row in rows if row["dtype"] == dtype])]
    return Group(*parts, *_targets(rows), Text(_LEGEND, style="dim"))


def _heading(machine: dict[str, Any]) -> Text:
    versions = machine["versions"]
    rest = f" {versions['transformers']}, torch {versions['torch']}, on {machine['device']}: "
    return Text.assemble(("transformers", "bold"), rest, 'attn_implementation="mmkernels" beside "sdpa"\n')


def _table(rows: list[dict[str, Any]]) -> Table:
    titles = ["forward\nms", "vs\nsdpa", "at\nmost", "share", "attention\nms", "vs\nsdpa", "to images\nvs sdpa"]
    titles += ["masks\nms", "sdpa's\nms", "MB", "sdpa's\nMB"]
    return table(map(_cells, rows), ["model", *titles])


def _cells(row: dict[str, Any]) -> list[str]:
    bound, attention, counted, masks = (row[name] for name in ("amdahl", "attention", "counted", "masks"))
    return [
        row["configuration"],
        milliseconds(row["seconds"]),
        ratio(row["peers"]["sdpa"]["ratio"]),
        ratio(bound["cap"]) if bound else "",
        percent(bound["share_of_cap"]) if bound else "",
        milliseconds(attention["seconds"]),
        ratio(attention.get("ratio")),
        ratio(counted.get("ratio")) if counted["called"] != "all" else "",
        milliseconds(masks["seconds"]),
        milliseconds(masks["sdpa_seconds"]),
        *(_memory(size) for size in (row["peak_memory_bytes"], row["peers"]["sdpa"]["peak_memory_bytes"])),
    ]


def _memory(size: int | None) -> str:
    return "" if size is None else megabytes(size)


def _targets(rows: list[dict[str, Any]]) -> list[RenderableType]:
    """Returns the targets without those of forward passes that are met; of these only the slowest is named."""
    every = [(row, target) for row in rows for target in row["targets"]]
    forwards = [(row, target) for row, target in every if target["than"] == "forward"]
    cells = [
        [row["configuration"], row["dtype"], target["than"], *_numbers(target), verdict(target)]
        for row, target in every
        if target["than"] != "forward" or not met(target)
    ]
    parts: list[RenderableType] = []
    if cells:
        parts.append(table(cells, ["targets", "dtype", "of", "target", "found", ""], texts=3))
    if forwards:
        row, target = min(forwards, key=lambda entry: entry[1]["found"])
        slowest = f"{ratio(target['found'])} sdpa's speed ({row['configuration']}, {row['dtype']})"
        parts.append(Text(f"slowest forward: {slowest}; none may be below {target['least']}x\n"))
    return parts


def _numbers(target: dict[str, Any]) -> tuple[str, str]:
    if "most" in target:
        return f"<= {microseconds(target['most'])}", microseconds(target["found"])
    return f">= {target['least']:g}x", ratio(target["found"])


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    console(_WIDTH).print(render(json.loads(Path(sys.argv[1]).read_text())))
