"""Draws what ``mmkernels bench`` measured: how many times faster the op is than each peer. Reads only JSON.

python -m mmkernels.bench.picture build/bench/cross_attention.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from mmkernels.ops import MODULES
from mmkernels.report import COLOURS, picture, plain, unique

_MARKERS = {"fp32": "o", "bf16": "s", "fp16": "^"}


def draw(report: dict[str, Any], path: Path) -> None:
    """Writes the picture of a result file as a PNG: a panel for each pass, a line for each configuration."""
    rows = [entry["extra_info"] for entry in report["benchmarks"]]
    passes, configurations, dtypes = (unique(rows, name) for name in ("pass", "configuration", "dtype"))
    peers = {name: None for row in rows for name in row["peers"]}
    colours = dict(zip(peers, COLOURS, strict=False))
    keys = [Line2D([], [], color=colour, linewidth=6, label=f"… {name}") for name, colour in colours.items()]
    keys += [Line2D([], [], color="#444444", marker=_MARKERS[dtype], linestyle="", label=dtype) for dtype in dtypes]
    width = 4.2 + 4.6 * len(passes)
    columns = min(len(keys), int(width / (0.7 + 0.095 * max(len(str(key.get_label())) for key in keys))))
    head = 0.75 + 0.25 * -(-len(keys) // columns)  # inches of title and legend, above the panels
    height = 1.1 + head + 0.17 * len(configurations) * len(dtypes) + 0.15 * len(configurations)
    op, machine = ", ".join(unique(rows, "op")), report["machine_info"]["device"]
    source = f"{MODULES[op].replace('.', '/')}/spec.py" if op in MODULES else f"benchmarks/bench_{op}.py"
    layout = ConstrainedLayoutEngine(rect=(0, 0.25 / height, 1, 1 - head / height))
    with picture(path, width, height, layout=layout) as figure:
        panels = figure.subplots(1, len(passes), sharey=True, squeeze=False)[0]
        for axes, name in zip(panels, passes, strict=True):
            _panel(axes, [row for row in rows if row["pass"] == name], configurations, dtypes, colours)
            axes.set_title(name, fontsize=12, loc="left")
        panels[0].set_yticks(range(len(configurations)), configurations)
        panels[0].set_ylim(len(configurations) - 0.5, -0.5)
        figure.suptitle(
            f"mmkernels {op}: how many times faster than …  ({machine})", x=0.01, y=1 - 0.12 / height, ha="left",
            va="top", fontsize=14, weight="bold",
        )  # fmt: skip
        figure.legend(
            handles=keys, loc="upper left", bbox_to_anchor=(0.0, 1 - 0.38 / height), ncols=columns, frameon=False,
            fontsize=11,
        )  # fmt: skip
        words = f"Right of 1: {op} is faster than the peer. Configurations as in {source}."
        figure.text(0.01, 0.006, words, fontsize=9)


def _panel(
    axes: Axes, rows: list[dict[str, Any]], configurations: list[str], dtypes: list[str], colours: dict[str, str]
) -> None:
    axes.set_xscale("log")
    for row in rows:
        middle = configurations.index(row["configuration"])
        y = middle + (dtypes.index(row["dtype"]) - (len(dtypes) - 1) / 2) * 0.7 / max(1, len(dtypes))
        ratios = {name: peer["ratio"] for name, peer in row["peers"].items() if "ratio" in peer}
        axes.plot([1, *ratios.values()], [y] * (len(ratios) + 1), color="#dddddd", linewidth=1.5, zorder=1)
        for name, ratio in ratios.items():
            marker = _MARKERS[row["dtype"]]
            axes.plot(ratio, y, color=colours[name], marker=marker, markersize=7, linestyle="", zorder=3)
    for place in range(len(configurations) - 1):
        axes.axhline(place + 0.5, color="#eeeeee", linewidth=1, zorder=0)
    axes.axvline(1, color="#222222", linewidth=1.5, zorder=2)
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, 0.4), max(high, 2.5))
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("slower  ◂  1  ▸  faster  (log scale)")
    plain(axes, grid="x")
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[1]).with_suffix(".png"))
