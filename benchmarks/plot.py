"""Draws what ``mmkernels bench`` measured: how many times faster the op is than each peer. Reads only JSON.

python benchmarks/plot.py build/bench/cross_attention.json [picture.png]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

# Okabe and Ito's palette, which people with any colour vision tell apart.
_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442", "#999999")
_MARKERS = {"fp32": "o", "bf16": "s", "fp16": "^"}


def draw(report: dict[str, Any], path: Path) -> None:
    """Write the picture of a pytest-benchmark report as a PNG: a panel for each pass, a line for each configuration."""
    rows = [entry["extra_info"] for entry in report["benchmarks"]]
    passes, configurations = _unique(rows, "pass"), _unique(rows, "configuration")
    peers = {name: None for row in rows for name in row["peers"]}
    colours = dict(zip(peers, _COLOURS, strict=False))
    dtypes = _unique(rows, "dtype")
    keys = [Line2D([], [], color=colour, linewidth=6, label=f"… {name}") for name, colour in colours.items()]
    keys += [Line2D([], [], color="#444444", marker=_MARKERS[dtype], linestyle="", label=dtype) for dtype in dtypes]
    width = 4.2 + 4.6 * len(passes)
    columns = min(len(keys), int(width / (0.7 + 0.095 * max(len(str(key.get_label())) for key in keys))))
    head = 0.75 + 0.25 * -(-len(keys) // columns)  # inches of title and legend, above the panels
    height = 1.1 + head + 0.17 * len(configurations) * len(dtypes) + 0.15 * len(configurations)
    figure, panels = plt.subplots(
        1,
        len(passes),
        figsize=(width, height),
        dpi=110,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    figure.get_layout_engine().set(rect=(0, 0.25 / height, 1, 1 - head / height))
    for axes, name in zip(panels[0], passes, strict=True):
        _panel(axes, [row for row in rows if row["pass"] == name], configurations, dtypes, colours)
        axes.set_title(name, fontsize=12, loc="left")
    panels[0][0].set_yticks(range(len(configurations)), configurations)
    panels[0][0].set_ylim(len(configurations) - 0.5, -0.5)
    op, machine = ", ".join(_unique(rows, "op")), report["machine_info"]["device"]
    places = [Path("mmkernels", "ops", op, name) for name in ("cases.py", "spec.py")]
    known = (place for place in places if (Path(__file__).resolve().parents[1] / place).exists())
    source = next(known, f"benchmarks/bench_{op}.py")
    figure.suptitle(
        f"mmkernels {op}: how many times faster than …  ({machine})", x=0.01, y=1 - 0.12 / height, ha="left", va="top",
        fontsize=14, weight="bold",
    )  # fmt: skip
    figure.legend(
        handles=keys,
        loc="upper left",
        bbox_to_anchor=(0.0, 1 - 0.38 / height),
        ncols=columns,
        frameon=False,
        fontsize=11,
    )
    figure.text(
        0.01,
        0.006,
        f"Right of 1: {op} is faster than the peer. Configurations as in {source}.",
        fontsize=9,
    )
    figure.savefig(path)
    plt.close(figure)


def _panel(
    axes: Axes, rows: list[dict[str, Any]], configurations: list[str], dtypes: list[str], colours: dict[str, str]
) -> None:
    axes.set_xscale("log")
    for row in rows:
        middle = configurations.index(row["configuration"])
        y = middle + (dtypes.index(row["dtype"]) - (len(dtypes) - 1) / 2) * 0.7 / max(1, len(dtypes))
        found = {name: peer["ratio"] for name, peer in row["peers"].items() if "ratio" in peer}
        axes.plot([1, *found.values()], [y] * (len(found) + 1), color="#dddddd", linewidth=1.5, zorder=1)
        for name, ratio in found.items():
            axes.plot(
                ratio, y, color=colours[name], marker=_MARKERS[row["dtype"]], markersize=7, linestyle="", zorder=3
            )
    for place in range(len(configurations) - 1):
        axes.axhline(place + 0.5, color="#eeeeee", linewidth=1, zorder=0)
    axes.axvline(1, color="#222222", linewidth=1.5, zorder=2)
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, 0.4), max(high, 2.5))
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("slower  ◂  1  ▸  faster  (log scale)")
    axes.grid(True, axis="x", color="#eeeeee", zorder=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _unique(rows: list[dict[str, Any]], name: str) -> list[str]:
    return list(dict.fromkeys(row[name] for row in rows))


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    source = Path(sys.argv[1])
    draw(json.loads(source.read_text()), Path(sys.argv[2]) if len(sys.argv) == 3 else source.with_suffix(".png"))
