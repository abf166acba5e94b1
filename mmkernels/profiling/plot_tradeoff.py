"""A profile over resolutions and reducers as one picture: each stage against the tokens left, and the drift."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from PIL import Image

from mmkernels.profiling.pareto import drift_of
from mmkernels.profiling.plot import backend_name, stage_lines, subtitle
from mmkernels.profiling.plot_parts import COMMAS, LEFT, WIDTH, Place, draw_photos, height_of_photos, notes, trade
from mmkernels.profiling.table import rows_of, summary, title_of_model, warnings
from mmkernels.report import COLOURS, picture, plain

_TOP, _HEIGHT, _BELOW, _BETWEEN = 1.75, 1.75, 0.75, 1.15  # inches: above, of, below a panel; above the photographs
_PANEL, _APART, _IN_A_ROW = 1.8, 0.55, 4
_IN_A_COLUMN = 7  # of the legend
_STYLES: tuple[Literal["-", "--", ":", "-."], ...] = ("-", "--", ":", "-.")  # of backends, in their order
_LARGE, _LARGER = 1e4, {"ms": "s", "MB": "GB"}  # from which number on, and what units are shown then
_GRAIN = 1e5  # bytes that the meter can't tell from nothing

Value = Callable[[dict[str, Any]], float | None]


def draw(report: dict[str, Any], photo: Image.Image | None, path: Path) -> None:
    """Write the picture of `report` as a PNG; without a photograph it has no part about what is left of it."""
    words = textwrap.wrap(f"{summary(report)} {notes(report)}", 165)
    photos = _TOP + 2 * (_HEIGHT + _BELOW) + _BETWEEN - 0.4
    bottom = photos - 0.5 if photo is None else photos + height_of_photos(report)
    colours = {str(row): _colour(report, str(row).partition(" ")[2]) for row in rows_of(report)}
    with picture(path, WIDTH, bottom + 0.2 * len(words) + 0.5) as figure:
        place = Place(figure)
        name = title_of_model(report["settings"])
        place.text(LEFT, 0.5, f"What a visual token costs: {name}", fontsize=19, weight="bold")
        sides = ", ".join(f"{side:,}" for side in sorted(report["settings"]["resolutions"]))
        words_of_points = f"Points of a line, from left to right: images of as many pixels as squares of {sides} pixels"
        lines = [*textwrap.wrap(subtitle(report), 92), words_of_points]
        place.text(LEFT, 0.66, "\n".join(lines), va="top", fontsize=11.5, linespacing=1.4, color="#444444")
        place.text(LEFT + 9.6, 0.3, "\n".join(stage_lines(report, 70)), va="top", fontsize=8.5, color="#333333")
        for i, (title, value, unit) in enumerate(_values(report)):
            row, column = divmod(i, _IN_A_ROW)
            left, top = LEFT + 0.3 + column * (_PANEL + _APART), _TOP + row * (_HEIGHT + _BELOW)
            _panel(place.axes(left, top, _PANEL, _HEIGHT), report, title, value, unit)
        left = LEFT + 0.3 + 3 * (_PANEL + _APART)
        _keys(place.axes(left - 0.2, _TOP + _HEIGHT + _BELOW, _PANEL, _HEIGHT), report)
        trade(place.axes(LEFT + 10.15, _TOP + 0.35, 3.3, 2 * _HEIGHT + _BELOW - 0.35), report, colours)
        if photo is not None:
            draw_photos(place, photos, report, photo)
        place.text(LEFT, bottom, "\n".join(words), fontsize=10.5, va="top", linespacing=1.4)
        place.text(LEFT, bottom + 0.2 * len(words) + 0.4, "  ".join(warnings(report)), fontsize=10.5, color="#B00020")


def _colour(report: dict[str, Any], reducer: str) -> str:
    """Returns the colour of a reducer; the first one, which leaves all tokens, is black."""
    at = report["settings"]["reduce"].index(reducer)
    return "black" if at == 0 else COLOURS[(at - 1) % len(COLOURS)]


def _values(report: dict[str, Any]) -> list[tuple[str, Value, str]]:
    """Returns what the panels show: a title, what is read from a cell, and its unit."""

    def milliseconds(name: str) -> Value:
        return lambda cell: cell["seconds"][name] * 1e3 if name in cell["seconds"] else None

    def megabytes(cell: dict[str, Any]) -> float | None:
        size = cell["peak_memory_bytes"]
        return None if size is None else max(size, _GRAIN) / 1e6

    def drift(cell: dict[str, Any]) -> float | None:
        found = drift_of(cell)
        return None if found is None else found[0]

    first = report["total"]["stages"]
    stages = [(stage if stage in first else f"{stage} step", milliseconds(stage), "ms") for stage in report["stages"]]
    total = (report["total"]["name"], milliseconds("total"), "ms")
    return [*stages, total, ("peak memory", megabytes, "MB"), ("drift", drift, "")]


def _panel(axes: Axes, report: dict[str, Any], title: str, value: Value, unit: str) -> None:
    """Draws one value against the tokens of an image: a line for each reducer, a point for each resolution."""
    known = [found for found in map(value, report["cells"]) if found is not None]
    factor, unit = (1e-3, _LARGER[unit]) if unit and max(known, default=0) >= _LARGE else (1, unit)
    axes.set_title(title + (f", {unit}" if unit else ""), loc="left", fontsize=11.5, weight="bold")
    drawn = False
    for backend, style in zip(report["settings"]["backends"], _STYLES, strict=False):
        for reducer in report["settings"]["reduce"]:
            cells = [cell for cell in report["cells"] if (cell["reducer"], cell["backend"]) == (reducer, backend)]
            points = [(cell["tokens_per_image"], value(cell)) for cell in cells]
            line = sorted((x, y * factor) for x, y in points if y is not None)
            if line:
                x, y = zip(*line, strict=True)
                axes.plot(x, y, style, marker="o", markersize=4, linewidth=1.6, color=_colour(report, reducer))
                drawn = True
    if not drawn:
        axes.set_axis_off()
        words = report["memory_why_not"] if title == "peak memory" and report["memory_why_not"] else "not measured"
        axes.text(0, 0.95, textwrap.fill(words, 24), va="top", fontsize=9)
        return
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(LogLocator(4))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(COMMAS)
    axes.set_ylim(0, max(axes.dataLim.y1, 1e-9) * 1.1)
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.10g}"))
    axes.tick_params(labelsize=9)
    axes.set_xlabel("tokens per image", fontsize=9.5)
    plain(axes)


def _keys(axes: Axes, report: dict[str, Any]) -> None:
    """Says what colours and strokes mean."""
    axes.set_axis_off()
    s = report["settings"]
    keys = [Line2D([], [], marker="o", markersize=4, color=_colour(report, name), label=name) for name in s["reduce"]]
    if len(s["backends"]) > 1:
        keys += [
            Line2D([], [], linestyle=style, color="#444444", label=backend_name(backend))
            for backend, style in zip(s["backends"], _STYLES, strict=False)
        ]
    many = len(keys) > _IN_A_COLUMN
    axes.legend(
        handles=keys, loc="upper left", frameon=False, fontsize=7.5 if many else 10, title="reducer", alignment="left",
        ncols=1 + many, columnspacing=1, handlelength=1.2 if many else 2,
    )  # fmt: skip
