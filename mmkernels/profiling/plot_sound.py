"""A profile of sound as one picture: the sound itself, the stages up to the first token, a token, memory and drift."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mmkernels.models.blocks.audio import SAMPLING_RATE, log_mel
from mmkernels.profiling.options import name_of
from mmkernels.profiling.pareto import drift_of
from mmkernels.profiling.plot import backend_name, stage_lines
from mmkernels.profiling.plot_parts import COMMAS, RANDOM
from mmkernels.profiling.sound import Sound
from mmkernels.profiling.sound_table import part_of, summary
from mmkernels.profiling.table import text_of, title_of_model, warnings
from mmkernels.report import COLOURS, picture, plain

_STYLES: dict[str, tuple[Literal["-", "--"], bool]] = {"fused": ("-", True), "reference": ("--", False)}
_OTHER: tuple[Literal[":"], bool] = (":", True)
_GAP = 0.7  # between groups of bars, in bars
_MOST_TICKS = 5
_LEFT = 0.06  # of the picture, in its width

Read = Callable[[dict[str, Any]], float | None]
"""What a panel shows of a cell; None: it was not measured."""


def title(report: dict[str, Any]) -> str:
    return f"What a second of sound costs: {title_of_model(report['settings'])}"


def subtitle(report: dict[str, Any]) -> str:
    """Returns what was measured, and where."""
    s, about = report["settings"], report["about_size"]
    heard = part_of(report)
    return f"{heard[0].upper()}{heard[1:]}, {text_of(s)}, {s['dtype']}, on {report['device']}" + f"; {about}" * bool(
        about
    )


def draw(report: dict[str, Any], sound: Sound, path: Path) -> None:
    """Writes the picture of `report` as a PNG."""
    with picture(path, 14.5, 8.6) as figure:
        left = _LEFT
        figure.text(left, 0.95, title(report), fontsize=19, weight="bold")
        lines = textwrap.fill(subtitle(report), 96)
        figure.text(left, 0.93, lines, va="top", fontsize=11, linespacing=1.3, color="#444444")
        _spectrogram(figure.add_axes((left, 0.745, 0.6, 0.1)), report, sound)
        figure.text(0.69, 0.965, "\n".join(stage_lines(report, 62)), va="top", fontsize=9, color="#333333")
        _stages(figure.add_axes((left, 0.2, 0.36, 0.4)), report)
        panels: tuple[tuple[str, str, Read], ...] = (
            ("One more token", "milliseconds", lambda cell: _scaled(cell["seconds"].get("decode"), 1e3)),
            ("Peak memory", "MB above the weights", lambda cell: _scaled(cell["peak_memory_bytes"], 1e-6)),
            ("Drift", "relative L2 of the logits", _drift),
        )
        for place, (name, unit, read) in zip((0.485, 0.665, 0.845), panels, strict=True):
            _against_seconds(figure.add_axes((place, 0.2, 0.13, 0.4)), report, name, unit, read)
        figure.text(left, 0.07, textwrap.fill(summary(report), 175), fontsize=10.5, va="center")
        random = "" if report["settings"].get("folder") else RANDOM
        for text, colour, place in (("  ".join(warnings(report)), "#B00020", 0.027), (random, "#666666", 0.006)):
            figure.text(left, place, text, fontsize=9.5, color=colour)
        _legend(figure, report)


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _drift(cell: dict[str, Any]) -> float | None:
    found = drift_of(cell)
    return None if found is None else found[0]


def _cells(report: dict[str, Any], backend: str) -> list[dict[str, Any]]:
    return [cell for cell in report["cells"] if cell["backend"] == backend and cell["failed"] is None]


def _shown_backend(report: dict[str, Any]) -> str:
    """Returns the backend whose stages are shown: the first one."""
    name: str = report["settings"]["backends"][0]
    return name


def _spectrogram(axes: Axes, report: dict[str, Any], sound: Sound) -> None:
    """The log-mel spectrogram, with a line where each row's sound ends."""
    seconds = report["settings"]["seconds"]
    features = log_mel(sound.first(seconds[-1]), SAMPLING_RATE, seconds=seconds[-1]).features[0]  # [80, frames]
    axes.imshow(features.numpy(), origin="lower", aspect="auto", cmap="magma", extent=(0, seconds[-1], 0, 80))
    for end in seconds[:-1]:
        axes.axvline(end, color="white", linewidth=1.5)
    axes.set_xticks([0, *seconds], [f"{end:g}" for end in (0, *seconds)])
    axes.set_yticks([])
    axes.set_ylabel("mel bands", fontsize=10)
    axes.set_title(f"{sound.name}, seconds", loc="left", fontsize=11)


# The stages up to the first token.


def _stages(axes: Axes, report: dict[str, Any]) -> None:
    """Stacked bars, one for each row, in groups of one length of sound; beside them the naive total."""
    backend, names = _shown_backend(report), report["total"]["stages"]
    cells = [cell for cell in _cells(report, backend) if "total" in cell["seconds"]]
    axes.set_title(
        f"Up to the {report['total']['name']}, by stage, {name_of(backend)}",
        loc="left",
        fontsize=13,
        weight="bold",
        pad=26,
    )
    if not cells:
        axes.set_axis_off()
        axes.text(0, 0.9, "not measured", va="top")
        return
    places = _places(cells)
    floor = [0.0] * len(cells)
    for colour, name in zip(COLOURS, names, strict=False):
        heights = [cell["seconds"][name] * 1e3 for cell in cells]
        axes.bar(places, heights, bottom=floor, width=0.86, color=colour, label=name)
        floor = [low + height for low, height in zip(floor, heights, strict=True)]
    for place, height in zip(places, floor, strict=True):
        axes.annotate(f"{height:,.0f}" if height >= 10 else f"{height:.2g}", (place, height), xytext=(0, 3),
                      textcoords="offset points", ha="center", fontsize=9)  # fmt: skip
    naive = {(cell["sound_seconds"], cell["pool"]): cell for cell in _cells(report, "reference")}
    if backend != "reference" and naive:
        found = [naive.get((cell["sound_seconds"], cell["pool"])) for cell in cells]
        pairs = [(place, cell["seconds"]["total"] * 1e3) for place, cell in zip(places, found, strict=True)
                 if cell and "total" in cell["seconds"]]  # fmt: skip
        if pairs:
            axes.plot(*zip(*pairs, strict=True), "_", markersize=24, markeredgewidth=2, color="black", label="naive")
    axes.set_xticks(places, [f"{cell['tokens']:,}\n/{cell['pool']}" for cell in cells], fontsize=9)
    _name_groups(axes, cells, places)
    axes.set_ylabel("milliseconds", fontsize=11)
    axes.set_ylim(0, 1.12 * axes.get_ylim()[1])
    axes.yaxis.set_major_formatter(COMMAS)
    plain(axes, grid="y")
    axes.legend(loc="lower left", bbox_to_anchor=(-0.012, 0.99), ncols=7, frameon=False, fontsize=9.5,
                handlelength=1.0, columnspacing=1.0)  # fmt: skip


def _places(cells: list[dict[str, Any]]) -> list[float]:
    """Returns where the bars stand."""
    places: list[float] = []
    for i, cell in enumerate(cells):
        apart = i > 0 and cell["sound_seconds"] != cells[i - 1]["sound_seconds"]
        places.append((places[-1] + 1 if places else 0.0) + _GAP * apart)
    return places


def _name_groups(axes: Axes, cells: list[dict[str, Any]], places: list[float]) -> None:
    """Writes below each group of bars how much sound it is."""
    for seconds in dict.fromkeys(cell["sound_seconds"] for cell in cells):
        inside = [place for place, cell in zip(places, cells, strict=True) if cell["sound_seconds"] == seconds]
        axes.annotate(
            f"{seconds:g} s", (sum(inside) / len(inside), 0), xytext=(0, -34), xycoords=("data", "axes fraction"),
            textcoords="offset points", ha="center", va="top", fontsize=11, weight="bold", annotation_clip=False,
        )  # fmt: skip
    axes.annotate(
        "tokens / pooled by, seconds of sound", (0, 0), xytext=(0, -54), xycoords="axes fraction",
        textcoords="offset points", va="top", fontsize=10.5, annotation_clip=False,
    )  # fmt: skip


# Against the length of the sound, a line for each pooling.


def _against_seconds(axes: Axes, report: dict[str, Any], name: str, unit: str, read: Read) -> None:
    axes.set_title(name, loc="left", fontsize=13, weight="bold", pad=26)
    shown = False
    for backend in report["settings"]["backends"]:
        for pool, colour in _colours(report).items():
            cells = [cell for cell in _cells(report, backend) if cell["pool"] == pool]
            points = [(cell["sound_seconds"], value) for cell in cells if (value := read(cell)) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), **_strokes(backend, colour))
                shown = True
    if not shown:
        axes.set_axis_off()
        axes.text(0, 0.9, textwrap.fill(report["memory_why_not"] or "not measured", 26), va="top")
        return
    axes.set_xlim(0, 1.05 * report["settings"]["seconds"][-1])
    axes.set_ylim(0, max(1.08 * axes.get_ylim()[1], 1e-6))
    seconds = report["settings"]["seconds"]
    axes.set_xticks([0, *seconds] if len(seconds) < _MOST_TICKS else [0, seconds[-1]])
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(COMMAS)
    axes.set_xlabel("seconds of sound", fontsize=11)
    axes.annotate(unit, (0, 1), xytext=(0, 7), xycoords="axes fraction", textcoords="offset points", fontsize=10.5)
    plain(axes)


def _colours(report: dict[str, Any]) -> dict[int, str]:
    """Returns the colour of each pooling; those of the stages are others."""
    return dict(zip(report["settings"]["pool"], ("#000000", "#E69F00", "#8C510A", "#777777", *COLOURS), strict=False))


def _strokes(backend: str, colour: str) -> dict[str, Any]:
    """How the lines of a backend look."""
    style, filled = _STYLES.get(backend, _OTHER)
    return {"linestyle": style, "marker": "o", "color": colour, "markerfacecolor": colour if filled else "white"}


def _legend(figure: Figure, report: dict[str, Any]) -> None:
    """Which line is of which backend, and of which pooling."""
    backends, colours = report["settings"]["backends"], _colours(report)
    keys = [Line2D([], [], label=backend_name(name), **_strokes(name, "#444444")) for name in backends]
    keys = keys if len(keys) > 1 else []
    keys += [
        Line2D([], [], label="not pooled" if pool == 1 else f"pooled by {pool}", color=colour, linewidth=3)
        for pool, colour in colours.items()
    ]
    figure.legend(
        handles=keys, loc="lower left", bbox_to_anchor=(0.478, 0.667), ncols=6, frameon=False, fontsize=10,
        columnspacing=1.4,
    )  # fmt: skip
