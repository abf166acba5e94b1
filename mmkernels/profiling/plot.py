"""A profile as one picture: latency against visual tokens, memory beside it, and the photograph."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator
from PIL import Image

from mmkernels.profiling.hf_table import compares_patch
from mmkernels.profiling.options import ORIGINAL, PATCHED, name_of
from mmkernels.profiling.table import compared, crops_of, memory_ratio, summary, text_of, title_of_model, warnings
from mmkernels.report import COLOURS, picture, plain, plural, ratio

_TOTAL, _TRAINING = "#000000", "#A06A00"
_STYLES = {"fused": "-", "reference": "--", PATCHED: "-", ORIGINAL: "--"}
_OTHER_STYLES = (":", "-.", (0, (1, 1)))
_GRAIN = 1e5  # bytes that the meter can't tell from nothing
_NAMES = {"fused": "fused ops", "reference": "naive baseline"} | {name: name_of(name) for name in (ORIGINAL, PATCHED)}

Ends = dict[str, tuple[float, str, str]]
"""The labels behind the lines' ends: name -> height, colour, further words."""


def draw(report: dict[str, Any], photo: Image.Image, path: Path) -> None:
    """Write the picture of `report` as a PNG."""
    with picture(path, 14.5, 7.6) as figure:
        latency = figure.add_axes((0.06, 0.155, 0.46, 0.61))
        memory = figure.add_axes((0.685, 0.155, 0.205, 0.37))
        _titles(figure, report)
        _latency(latency, report)
        _memory(memory, report)
        _photo(figure, report, photo)
        figure.text(0.06, 0.055, textwrap.fill(summary(report), 165), fontsize=10.5, va="center")
        figure.text(0.06, 0.006, "  ".join(warnings(report)), fontsize=10.5, color="#B00020", va="bottom")


def _titles(figure: Figure, report: dict[str, Any]) -> None:
    s = report["settings"]
    title, about = f"What a visual token costs: {title_of_model(s)}", subtitle(report)
    figure.text(0.06, 0.935, title, fontsize=_fitting(19, title, 60), weight="bold")
    figure.text(0.06, 0.89, about, fontsize=_fitting(12, about, 98), color="#444444")


def _fitting(size: float, text: str, most: int) -> float:
    """Returns the size of letters at which a text is no longer than `most` letters are at `size`."""
    return size * min(1.0, most / len(text))


def subtitle(report: dict[str, Any]) -> str:
    """Returns what was measured, and where."""
    s = report["settings"]
    prompt = f"A prompt of {plural(s['images'], 'image')} and {text_of(s)}"
    about = report.get("about_size") or s.get("class")
    return f"{prompt}, {s['dtype']}, on {report['device']}" + (f"; {about}" if about else "")


def _strokes(report: dict[str, Any], backend: str, colour: str) -> dict[str, Any]:
    """How a backend's lines look."""
    others = [name for name in report["settings"]["backends"] if name not in _STYLES]
    style = _STYLES.get(backend) or _OTHER_STYLES[others.index(backend) % len(_OTHER_STYLES)]
    face = "white" if backend in ("reference", ORIGINAL) else colour  # so that single points can be told apart
    return {"color": colour, "linestyle": style, "marker": "o", "markerfacecolor": face}


def _series(report: dict[str, Any], backend: str) -> list[dict[str, Any]]:
    return [cell for cell in report["cells"] if cell["backend"] == backend and cell["failed"] is None]


def _line(
    axes: Axes, report: dict[str, Any], backend: str, x: list[int], y: list[float], colour: str, width: float
) -> None:
    axes.plot(x, y, markersize=5.5, linewidth=width, **_strokes(report, backend, colour))


# Latency.


def _latency(axes: Axes, report: dict[str, Any]) -> None:
    first = report["total"]["stages"]
    lines = {stage: (stage if stage in first else f"{stage} step", colour, 2.0)
             for stage, colour in zip(report["stages"], COLOURS, strict=False)}  # fmt: skip
    lines["total"] = (report["total"]["name"], _TOTAL, 3.0)
    if report["settings"]["train"]:
        lines["train_step"] = ("training step", _TRAINING, 2.0)
    ends: Ends = {}
    for name, (label, colour, width) in lines.items():
        for backend in report["settings"]["backends"]:
            cells = [cell for cell in _series(report, backend) if name in cell["seconds"]]
            if not cells:
                continue
            x, y = [cell["tokens_per_image"] for cell in cells], [cell["seconds"][name] * 1e3 for cell in cells]
            _line(axes, report, backend, x, y, colour, width)
            gain = cells[-1]["amdahl"].get(name)
            if label not in ends or gain:
                ends[label] = (y[-1], colour, compared(gain["speedup"]) if gain else "")
    _log_log(axes, report, "milliseconds")
    _label_ends(axes, ends)
    axes.set_title("Latency of each stage", loc="left", fontsize=13, weight="bold", pad=34)
    keys = [Line2D([], [], label=backend_name(backend), linewidth=2, **_strokes(report, backend, "#444444"))
            for backend in report["settings"]["backends"]]  # fmt: skip
    axes.legend(
        handles=keys, loc="lower left", bbox_to_anchor=(-0.012, 0.995), ncols=4, frameon=False, handlelength=3.2,
        fontsize=11,
    )  # fmt: skip


def backend_name(backend: str) -> str:
    """Returns what a picture calls a backend."""
    return _NAMES.get(backend, f"backend {backend}")


def _log_log(axes: Axes, report: dict[str, Any], unit: str) -> None:
    tokens = report["settings"]["tokens"]
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlim(tokens[0] / 1.25, tokens[-1] * 1.25)
    low, high = axes.get_ylim()
    if high < 4 * low:  # all alike: don't blow up noise
        axes.set_ylim(low / 2, high * 2)
    axes.set_xticks(tokens, [f"{count:,}" for count in tokens])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("visual tokens per image", fontsize=11)
    axes.set_ylabel(unit, fontsize=11)
    _plain_numbers(axes)
    plain(axes)


def _plain_numbers(axes: Axes) -> None:
    """Decades as 10, 100, 1,000; where few of them fit, also 2 and 5 times them."""
    low, high = axes.get_ylim()
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    if high / low < 200:
        axes.yaxis.set_minor_formatter(
            FuncFormatter(lambda value, _: f"{value:,.10g}" if f"{value:e}"[0] in "25" else "")
        )
    else:
        axes.yaxis.set_minor_formatter(NullFormatter())


def _label_ends(axes: Axes, ends: Ends) -> None:
    """Write each line's name behind its end, moved up where names would touch."""
    x = axes.get_xlim()[1]
    lowest = axes.transAxes.transform((0, 0))[1]
    for label, (height, colour, words) in sorted(ends.items(), key=lambda item: item[1][0]):
        text = label + (f"\n{words}" if words else "")
        half = (text.count("\n") + 1) * 19 / 2
        pixel = max(axes.transData.transform((x, height))[1], lowest + half)
        lowest = pixel + half + 4
        place = axes.transData.inverted().transform((0, pixel))[1]
        axes.annotate(
            text, (x, place), xytext=(5, 0), textcoords="offset points", color=colour, va="center", fontsize=11,
            weight="bold", linespacing=1.15, annotation_clip=False,
        )  # fmt: skip


# Memory.


def _memory(axes: Axes, report: dict[str, Any]) -> None:
    lines = {"peak_memory_bytes": ("inference,", _TOTAL)}
    if report["settings"]["train"]:
        lines["train_peak_memory_bytes"] = ("training,", _TRAINING)
    ends: Ends = {}
    for name, (title, colour) in lines.items():
        for backend in report["settings"]["backends"]:
            cells = [cell for cell in _series(report, backend) if cell[name] is not None]
            if not cells:
                continue
            x, y = [cell["tokens_per_image"] for cell in cells], [max(cell[name], _GRAIN) / 1e6 for cell in cells]
            _line(axes, report, backend, x, y, colour, 2.0)
            label = (
                backend_name(backend).split()[0] if len(lines) == 1 else f"{title}\n{backend_name(backend).split()[0]}"
            )
            share = memory_ratio(report, cells[-1], name)
            of = "before" if compares_patch(report) else "naive"
            ends[label] = (y[-1], colour, f"{ratio(share)} of {of}" if share is not None else "")
    axes.set_title("Peak memory, measured", loc="left", fontsize=13, weight="bold", pad=12)
    if ends:
        _log_log(axes, report, "megabytes above the weights")
        _label_ends(axes, ends)
    else:
        axes.set_axis_off()
        axes.text(0, 0.9, textwrap.fill(report["memory_why_not"] or "not measured", 50), va="top")


# The photograph.


def _photo(figure: Figure, report: dict[str, Any], photo: Image.Image) -> None:
    """The photograph, its name, and what the stages do."""
    small = photo.copy()
    small.thumbnail((330, 330))
    axes = figure.add_axes((0.685, 0.66, 0.11, 0.29), anchor="NW")
    axes.imshow(small)
    axes.set_axis_off()
    lines = [crops_of(report), "", *stage_lines(report, 34)]
    figure.text(0.805, 0.95, "\n".join(lines), va="top", fontsize=9, linespacing=1.32, color="#333333")


def stage_lines(report: dict[str, Any], width: int) -> list[str]:
    """Returns what each stage does, in lines of at most `width` letters."""
    about_all = report["stages"] | {report["total"]["name"]: " + ".join(report["total"]["stages"])}
    if report["settings"]["train"]:
        about_all["training step"] = "forward and backward"
    lines: list[str] = []
    for stage, about in about_all.items():
        lines += textwrap.wrap(f"{stage}: {about}", width, subsequent_indent="    ")
    return lines
