"""A profile over reducers as one picture: time, memory, drift, and what each reducer keeps of the photograph."""

from __future__ import annotations

import itertools
import math
import textwrap
from pathlib import Path
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, StrMethodFormatter
from matplotlib.transforms import Bbox
from PIL import Image

from mmkernels.profiling.options import UNREDUCED
from mmkernels.profiling.photo import crops, paint
from mmkernels.profiling.plot import backend_name, stage_lines, subtitle
from mmkernels.profiling.table import drift_of, summary, warnings
from mmkernels.report import COLOURS, MISSING, megabytes, milliseconds, picture, plain, plural

_WIDTH, _LEFT, _TOP = 14.5, 0.4, 2.0  # inches: of the picture, of its margin, of what is above the plots
_BAR, _BETWEEN, _CAPTION = 0.3, 1.1, 0.68
_LARGEST_PHOTO, _APART = 3.3, 0.2
_IN_A_ROW = 6
_SHADES = {"fused": 1.0, "reference": 0.38}
_OTHER_SHADES = (0.75, 0.6, 0.5)
_PAINT = (
    "Patches with a token of their own are as they were, those that share one have their mean, dropped ones are grey."
)
_RANDOM = "The weights are random: drift shows how much of the output changes, not what a trained model would lose."

_COMMAS = StrMethodFormatter("{x:,.10g}")

Cells = dict[tuple[str, str], dict[str, Any]]
"""(reducer, backend) -> its cell."""


def draw(report: dict[str, Any], photo: Image.Image, path: Path) -> None:
    """Write the picture of `report` as a PNG."""
    reducers = report["reducers"]
    bars = max(2.5, len(reducers) * (len(report["settings"]["backends"]) * _BAR + 0.2))
    rows, side = math.ceil(len(reducers) / _IN_A_ROW), _side(len(reducers))
    words = textwrap.wrap(f"{summary(report)} {_more_tokens(reducers)}{_RANDOM}", 165)
    photos = _TOP + bars + _BETWEEN
    bottom = photos + rows * (side + _CAPTION)
    with picture(path, _WIDTH, bottom + 0.2 * len(words) + 0.5) as figure:
        place = _Place(figure)
        _titles(place, report)
        _time(place.axes(_LEFT + 1.15, _TOP, 4.9, bars), report)
        _memory(place.axes(_LEFT + 6.7, _TOP, 2.45, bars), report)
        _trade(place.axes(_LEFT + 10.1, _TOP, 3.3, bars), report)
        place.text(_LEFT, photos - 0.2, "What is left of the first image", fontsize=13, weight="bold")
        place.text(_LEFT + 3.5, photos - 0.2, _PAINT, fontsize=10.5, color="#444444")
        for i, (reducer, about) in enumerate(reducers.items()):
            row, column = divmod(i, _IN_A_ROW)
            axes = place.axes(_LEFT + column * (side + _APART), photos + row * (side + _CAPTION), side, side)
            _photo(axes, photo, reducer, about)
        place.text(_LEFT, bottom, "\n".join(words), fontsize=10.5, va="top", linespacing=1.4)
        place.text(_LEFT, bottom + 0.2 * len(words) + 0.4, "  ".join(warnings(report)), fontsize=10.5, color="#B00020")


def _more_tokens(reducers: dict[str, Any]) -> str:
    """Returns why there are more tokens than patches, where there are."""
    more = [about["tokens"] - len(set(about["token_of"]) - {-1}) for about in reducers.values() if about["token_of"]]
    beside = more[0] if more else 0
    return f"Each image has {plural(beside, 'token')} beside its patches, such as a class token. " if beside else ""


def _side(photos: int) -> float:
    """Returns the side of a photograph in inches, so that a row of them is as wide as the picture."""
    width = _WIDTH - 2 * _LEFT + _APART
    return min(width / min(photos, _IN_A_ROW) - _APART, _LARGEST_PHOTO)


class _Place:
    """Places in a figure, in inches from its left and from its top."""

    def __init__(self, figure: Figure) -> None:
        self.figure = figure
        self.height = figure.get_figheight()

    def text(self, left: float, top: float, words: str, **how: Any) -> None:
        self.figure.text(left / _WIDTH, 1 - top / self.height, words, **how)

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        return self.figure.add_axes(
            (left / _WIDTH, 1 - (top + height) / self.height, width / _WIDTH, height / self.height)
        )


def _titles(place: _Place, report: dict[str, Any]) -> None:
    s = report["settings"]
    place.text(_LEFT, 0.5, f"What fewer visual tokens change: {s['model']} {s['size']}", fontsize=19, weight="bold")
    place.text(_LEFT, 0.82, subtitle(report), fontsize=12, color="#444444")
    stages = "\n".join(stage_lines(report, 92))
    place.text(_LEFT + 8.55, 0.3, stages, va="top", fontsize=8.5, color="#333333")


def _cells(report: dict[str, Any]) -> Cells:
    return {(cell["reducer"], cell["backend"]): cell for cell in report["cells"]}


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
    axes.xaxis.set_major_formatter(_COMMAS)
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
        axes.xaxis.set_major_formatter(_COMMAS)
        axes.set_xlabel("megabytes above the weights", fontsize=11)
    else:
        axes.set_axis_off()
        axes.text(0, 0, textwrap.fill(report["memory_why_not"] or "not measured", 34), va="top")


# What a reducer costs in drift.


def _trade(axes: Axes, report: dict[str, Any]) -> None:
    backend = report["settings"]["backends"][0]
    axes.set_title("Drift of the output", loc="left", fontsize=13, weight="bold", pad=30)
    axes.annotate(
        "of the logits, relative L2; lower left is better", (0, 1), xytext=(0, 9), xycoords="axes fraction",
        textcoords="offset points", fontsize=10.5,
    )  # fmt: skip
    points = {}
    for reducer in report["reducers"]:
        cell = _cells(report)[reducer, backend]
        found = drift_of(cell)
        if found is not None and "total" in cell["seconds"]:
            points[reducer] = (cell["seconds"]["total"] * 1e3, found[0])
    if not points:
        axes.set_axis_off()
        axes.text(0, 0.9, "not measured", va="top")
        return
    for reducer, (x, y) in points.items():
        axes.plot(x, y, "o", markersize=8, color="black" if reducer == UNREDUCED else COLOURS[2], clip_on=False)
    times, drifts = zip(*points.values(), strict=True)
    room = max(max(times) - min(times), 0.2 * max(times))  # differences that are noise stay small
    axes.set_xlim(min(times) - 0.2 * room, min(times) + 1.2 * room)
    high = max(*drifts, 1e-6)
    axes.set_ylim(-0.06 * high, high * 1.15)
    plain(axes)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(_COMMAS)
    axes.set_xlabel(f"milliseconds to the {report['total']['name']}, {backend_name(backend)}", fontsize=11)
    _label(axes, points)


def _label(axes: Axes, points: dict[str, tuple[float, float]]) -> None:
    """Writes each point's name beside it, or as near as it touches no other name and no point."""
    taken = [Bbox.from_bounds(x - 8, y - 8, 16, 16) for x, y in axes.transData.transform(list(points.values()))]
    inside = axes.get_window_extent().padded(10)
    sides: tuple[tuple[Literal["left", "right"], int], ...] = (("left", 8), ("right", -8))
    steps = sorted(range(-len(points), len(points) + 1), key=abs)
    for name, point in points.items():
        text = axes.annotate(
            name, point, (0, 0), textcoords="offset points", fontsize=10.5, va="center", annotation_clip=False
        )
        for step, (side, right) in itertools.product(steps, sides):
            text.set_position((right, 15 * step))
            text.set_horizontalalignment(side)
            box = text.get_window_extent()
            if all(inside.contains(*corner) for corner in (box.min, box.max)) and not box.count_overlaps(taken):
                break
        taken.append(box)


# The photograph.


def _photo(axes: Axes, photo: Image.Image, reducer: str, about: dict[str, Any]) -> None:
    axes.imshow(paint(crops(photo, 1)[0], about))
    axes.set_axis_off()
    below: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points", "va": "top"}
    axes.annotate(reducer, (0, 0), (0, -6), fontsize=11, weight="bold", **below)
    axes.annotate(_caption(about), (0, 0), (0, -22), fontsize=9.5, color="#333333", **below)


def _caption(about: dict[str, Any]) -> str:
    patches, token_of = about["rows"] * about["columns"], about["token_of"]
    if token_of is None:
        return "each token sees all patches"
    left = len(set(token_of) - {-1})
    if -1 in token_of:
        return f"{left:,} of {patches:,} patches kept"
    return f"all {patches:,} patches" if left == patches else f"{patches:,} patches in {left:,} tokens"
