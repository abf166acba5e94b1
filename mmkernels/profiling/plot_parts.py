"""Parts of the pictures of reducers: places, the trade-off of time and drift, what is left of the photograph."""

from __future__ import annotations

import itertools
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter
from matplotlib.transforms import Bbox
from PIL import Image

from mmkernels.profiling.pareto import trades
from mmkernels.profiling.photo import crops, paint
from mmkernels.profiling.plot import backend_name
from mmkernels.report import COLOURS, plain, plural

WIDTH, LEFT = 14.5, 0.4
"""Inches: of a picture, of its margin."""
CAPTION = 0.68
"""Inches below a photograph."""
RANDOM = "The weights are random: drift shows how much of the output changes, not what a trained model would lose."

_LARGEST_PHOTO, _APART = 3.3, 0.2
_IN_A_ROW = 6
_FRONT = "#D9D9D9"
COMMAS = StrMethodFormatter("{x:,.10g}")


class Place:
    """Places in a figure, in inches from its left and from its top."""

    def __init__(self, figure: Figure) -> None:
        self.figure = figure
        self.height = figure.get_figheight()

    def text(self, left: float, top: float, words: str, **how: Any) -> None:
        self.figure.text(left / WIDTH, 1 - top / self.height, words, **how)

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        return self.figure.add_axes(
            (left / WIDTH, 1 - (top + height) / self.height, width / WIDTH, height / self.height)
        )


def notes(report: dict[str, Any]) -> str:
    """Returns what a reader of the drift, and of the numbers of tokens, must know."""
    random = "" if report["settings"].get("folder") else RANDOM
    return f"{_more_tokens(report)}{random}"


def _more_tokens(report: dict[str, Any]) -> str:
    """Returns why there are more tokens than patches, where there are."""
    reducers = report["reducers"].values()
    more = [about["tokens"] - len(set(about["token_of"]) - {-1}) for about in reducers if about["token_of"]]
    if not any(more):
        return ""
    if not report.get("square", True):
        return "Images of several tiles have a thumbnail too, which is not shown. "
    return f"Each image has {plural(more[0], 'token')} beside its patches, such as a class token. "


def _side(photos: int) -> float:
    """Returns the side of a photograph in inches, so that a row of them is as wide as the picture."""
    width = WIDTH - 2 * LEFT + _APART
    return min(width / min(photos, _IN_A_ROW) - _APART, _LARGEST_PHOTO)


# What a reducer costs in drift.


def trade(axes: Axes, report: dict[str, Any], colours: dict[str, str] | None = None) -> None:
    """Draws time to the first token against drift, with a line through the Pareto front.

    Args:
        axes: where.
        report: of the profile.
        colours: of each row; None: the first one, from which drift is measured, is black.
    """
    backend = report["settings"]["backends"][0]
    axes.set_title("Drift of the output", loc="left", fontsize=13, weight="bold", pad=30)
    axes.annotate(
        "relative L2 of the logits; the Pareto front is grey", (0, 1), xytext=(0, 9), xycoords="axes fraction",
        textcoords="offset points", fontsize=10.5,
    )  # fmt: skip
    points = {row: (found.seconds * 1e3, found.drift) for row, found in trades(report["cells"], backend).items()}
    if not points:
        axes.set_axis_off()
        axes.text(0, 0.9, "not measured", va="top")
        return
    front = [points[row] for row in report.get("pareto", ()) if row in points]
    if len(front) > 1:
        axes.plot(*zip(*front, strict=True), color=_FRONT, linewidth=6, solid_capstyle="round", zorder=1)
    first = next(iter(report["reducers"]))
    for row, (x, y) in points.items():
        colour = ("black" if row == first else COLOURS[2]) if colours is None else colours[row]
        axes.plot(x, y, "o", markersize=8, color=colour, clip_on=False)
    times, drifts = zip(*points.values(), strict=True)
    room = max(max(times) - min(times), 0.2 * max(times))  # differences that are noise stay small
    axes.set_xlim(min(times) - 0.2 * room, min(times) + 1.2 * room)
    high = max(*drifts, 1e-6)
    axes.set_ylim(-0.06 * high, high * 1.15)
    plain(axes)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(COMMAS)
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


def height_of_photos(report: dict[str, Any]) -> float:
    """Returns how many inches `draw_photos` takes."""
    heights = _heights(report)
    return sum(heights) + len(heights) * CAPTION


def draw_photos(place: Place, top: float, report: dict[str, Any], photo: Image.Image) -> None:
    """Draws what each row leaves of the first image."""
    place.text(LEFT, top - 0.2, "What is left of the first image", fontsize=13, weight="bold")
    place.text(LEFT + 3.5, top - 0.2, paint_legend(report), fontsize=10.5, color="#444444")
    first, side, heights = first_image(report, photo), _side(len(report["reducers"])), _heights(report)
    for i, (reducer, about) in enumerate(report["reducers"].items()):
        row, column = divmod(i, _IN_A_ROW)
        above = sum(heights[:row]) + row * CAPTION
        axes = place.axes(LEFT + column * (side + _APART), top + above, side, heights[row])
        _photo(axes, first, reducer, about)


def first_image(report: dict[str, Any], photo: Image.Image) -> Image.Image:
    """Returns the first image of the prompt."""
    return crops(photo, 1, square=report.get("square", True))[0]


def _heights(report: dict[str, Any]) -> list[float]:
    """Returns the height of each row of photographs in inches: images of several sizes differ a little in shape."""
    shapes = [about["rows"] / about["columns"] for about in report["reducers"].values()]
    side = _side(len(shapes))
    return [side * max(shapes[i : i + _IN_A_ROW]) for i in range(0, len(shapes), _IN_A_ROW)]


def _photo(axes: Axes, image: Image.Image, reducer: str, about: dict[str, Any]) -> None:
    axes.imshow(paint(image, about))
    axes.set_anchor("SW")
    axes.set_axis_off()
    below: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points", "va": "top"}
    axes.annotate(reducer, (0, 0), (0, -6), fontsize=11, weight="bold", **below)
    axes.annotate(caption(about), (0, 0), (0, -22), fontsize=9.5, color="#333333", **below)


def paint_legend(report: dict[str, Any]) -> str:
    """Returns what the painted photographs show."""
    side = max((_side_of(about) for about in report["reducers"].values()), default=1)
    if side == 1:
        return (
            "Patches with a token of their own are as they were, those that share one have their mean, dropped ones "
            "are grey."
        )
    return (
        f"Tokens ({side} x {side} patches) that stay alone are as they were, those that become one have their mean, "
        "dropped ones are grey."
    )


def _side_of(about: dict[str, Any]) -> int:
    return int(about.get("side", 1))  # older reports have none


def caption(about: dict[str, Any]) -> str:
    """Returns what a reducer makes of an image's patches, or of its tokens where these are of several, in words."""
    count, token_of = about["rows"] * about["columns"], about["token_of"]
    of_patches = _side_of(about) == 1
    many = f"{count:,} {'patches' if of_patches else 'tokens'}"
    if token_of is None:
        return "each token sees all patches"
    left = len(set(token_of) - {-1})
    if -1 in token_of:
        return f"{left:,} of {many} kept"
    if left == count:
        return f"all {many}"
    return f"{many} in {left:,} token{'s' * (left != 1)}" if of_patches else f"{many} become {left:,}"
