"""Prints the JSON of bench_integrations.py as tables.

python benchmarks/integrations_report.py build/bench/integrations.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from integrations_targets import EAGER, SDPA
from models_report import by_dtype
from rich.console import RenderableType
from rich.table import Table

from mmkernels.report import MISSING, console, megabytes, milliseconds, percent, ratio, table

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
    versions = report["machine_info"]["versions"]
    about = f"of transformers {versions['transformers']} before and after patch, torch {versions['torch']}"
    return by_dtype(report, "integrations", about, _table, _LEGEND)


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
