"""A profile over reducers as one picture: time, memory, drift, and what each reducer keeps of the photograph."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from PIL import Image

from mmkernels.profiling.pareto import row_of
from mmkernels.profiling.plot import backend_name, stage_lines, subtitle
from mmkernels.profiling.plot_parts import COMMAS, LEFT, WIDTH, Place, draw_photos, height_of_photos, notes, trade
from mmkernels.profiling.table import summary, title_of_model, warnings
from mmkernels.report import COLOURS, MISSING, megabytes, milliseconds, picture, plain

_TOP = 2.0  # inches above the plots
_BAR, _BETWEEN = 0.3, 1.1
_SHADES = {"fused": 1.0, "reference": 0.38}
_OTHER_SHADES = (0.75, 0.6, 0.5)

Cells = dict[tuple[str, str], dict[str, Any]]
"""(reducer, backend) -> its cell."""


def draw(report: dict[str, Any], photo: Image.Image | None, path: Path) -> None:
    """Write the picture of `report` as a PNG; without a photograph it has no part about what is left of it."""
    bars = max(2.5, len(report["reducers"]) * (len(report["settings"]["backends"]) * _BAR + 0.2))
    words = textwrap.wrap(f"{summary(report)} {notes(report)}", 165)
    photos = _TOP + bars + _BETWEEN
    bottom = photos - 0.5 if photo is None else photos + height_of_photos(report)
    with picture(path, WIDTH, bottom + 0.2 * len(words) + 0.5) as figure:
        place = Place(figure)
        _titles(place, report)
        _time(place.axes(LEFT + 1.15, _TOP, 4.9, bars), report)
        _memory(place.axes(LEFT + 6.7, _TOP, 2.45, bars), report)
        trade(place.axes(LEFT + 10.1, _TOP, 3.3, bars), report)
        if photo is not None:
            draw_photos(place, photos, report, photo)
        place.text(LEFT, bottom, "\n".join(words), fontsize=10.5, va="top", linespacing=1.4)
        place.text(LEFT, bottom + 0.2 * len(words) + 0.4, "  ".join(warnings(report)), fontsize=10.5, color="#B00020")


def _titles(place: Place, report: dict[str, Any]) -> None:
    place.text(
        LEFT, 0.5, f"What fewer visual tokens change: {title_of_model(report['settings'])}", fontsize=19, weight="bold"
    )
    lines = textwrap.wrap(subtitle(report), 80)
    place.text(LEFT, 0.66, "\n".join(lines), va="top", fontsize=12, linespacing=1.3, color="#444444")
    stages = "\n".join(stage_lines(report, 92))
    place.text(LEFT + 8.55, 0.3, stages, va="top", fontsize=8.5, color="#333333")


def _cells(report: dict[str, Any]) -> Cells:
    return {(str(row_of(cell)), cell["backend"]): cell for cell in report["cells"]}


def _shade(report: dict[str, Any], backend: str) -> float:
    others = [name for name in report["settings"]["backends"] if name not in _SHADES]
    return _SHADES.get(backend) or _OTHER_SHADES[others.index(backend) % len(_OTHER_SHADES)]


def _mix(colour: str, shade: float) -> tuple[float, float, float]:
    """Returns a colour with white in it: transparent bars would show the grid behind them."""
    red, green, blue = (1 - shade * (1 - part) for part in to_rgb(colour))
    return red, green, blue


# Time and memory: a bar for each reducer and backend.


def _bars(axes: Axes, report: dict[str, Any]) -> dict[tuple[str, str], float]:
    """Prepares axes for bars of all reducers, the first on top; returns the height of each bar's middle."""
    reducers, backends = list(report["reducers"]), report["settings"]["backends"]
    apart = len(backends) + 0.7
    heights = {
        (reducer, backend): i * apart + j for i, reducer in enumerate(reducers) for j, backend in enumerate(backends)
    }
    axes.set_ylim(len(reducers) * apart - 0.7, -0.7)
    axes.set_yticks([i * apart + (len(backends) - 1) / 2 for i in range(len(reducers))], [""] * len(reducers))
    axes.tick_params(axis="y", length=0)
    plain(axes, grid="x")
    return heights


def _time(axes: Axes, report: dict[str, Any]) -> None:
    heights = _bars(axes, report)
    colours = dict(zip(report["stages"], COLOURS, strict=False))
    stages = report["total"]["stages"]
    for key, cell in _cells(report).items():
        if cell["failed"] or "total" not in cell["seconds"]:
            axes.text(0, heights[key], f" {cell['failed'] or MISSING}", va="center", fontsize=10, color="#B00020")
            continue
        left, shade = 0.0, _shade(report, key[1])
        for stage in stages:
            width = cell["seconds"][stage] * 1e3
            axes.barh(heights[key], width, 0.86, left, color=_mix(colours[stage], shade), linewidth=0)
            left += width
        axes.text(left, heights[key], f" {milliseconds(cell['seconds']['total'])}", va="center", fontsize=10)
    labels = [f"{name}\n{about['tokens']:,} tokens" for name, about in report["reducers"].items()]
    axes.set_yticks(axes.get_yticks(), labels, fontsize=10.5)
    axes.set_xlim(0, max(axes.dataLim.x1 * 1.12, 1e-3))  # of no bars it is -inf
    axes.xaxis.set_major_formatter(COMMAS)
    axes.set_xlabel("milliseconds", fontsize=11)
    axes.set_title(f"Time to the {report['total']['name']}", loc="left", fontsize=13, weight="bold", pad=30)
    keys = [Patch(color=colours[stage], label=stage) for stage in stages]
    keys += [Patch(color=_mix("#444444", _shade(report, backend)), label=backend_name(backend))
             for backend in report["settings"]["backends"]]  # fmt: skip
    axes.legend(
        handles=keys, loc="lower left", bbox_to_anchor=(-0.012, 1), borderaxespad=0.1, ncols=len(keys), frameon=False,
        fontsize=10.5, handlelength=1.1, handletextpad=0.5, columnspacing=1.3,
    )  # fmt: skip


def _memory(axes: Axes, report: dict[str, Any]) -> None:
    axes.set_title("Peak memory", loc="left", fontsize=13, weight="bold", pad=30)
    heights = _bars(axes, report)
    measured = {key: cell["peak_memory_bytes"] for key, cell in _cells(report).items()}
    for key, size in measured.items():
        if size is not None:
            axes.barh(heights[key], size / 1e6, 0.86, color=_mix("#444444", _shade(report, key[1])), linewidth=0)
            axes.text(size / 1e6, heights[key], f" {megabytes(size)}", va="center", fontsize=10)
    if any(size is not None for size in measured.values()):
        axes.set_xlim(0, axes.dataLim.x1 * 1.2)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(COMMAS)
        axes.set_xlabel("megabytes above the weights", fontsize=11)
    else:
        axes.set_axis_off()
        axes.text(0, 0, textwrap.fill(report["memory_why_not"] or "not measured", 34), va="top")
