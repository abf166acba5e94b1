"""Rows -> a table, JSON, a picture, a progress bar: what every command writes its results with."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from mmkernels.options import BadInput

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 100
"""Columns where the output is no terminal."""


def console(width: int = WIDTH) -> Console:
    """Returns the console for results, on standard output: as wide as the terminal, else `width`."""
    terminal = Console(highlight=False)
    return terminal if terminal.is_terminal else Console(highlight=False, width=width)


# Tables.


def table(rows: Iterable[Sequence[Any]], columns: Sequence[str | Column], *, texts: int = 1) -> Table:
    """Returns a table with one line for each row.

    Args:
        rows: the cells, as the functions below format them.
        columns: titles, or rich's columns where more than the title and the side must be said.
        texts: how many of the titles, the first ones, stand above text (on the left); numbers stand on the right.
    """
    sides = ["left"] * texts + ["right"] * (len(columns) - texts)
    made = (x if isinstance(x, Column) else Column(x, justify=side) for x, side in zip(columns, sides, strict=True))  # type: ignore[arg-type]
    lines = Table(*made, box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for row in rows:
        lines.add_row(*row)
    return lines


def markdown(rows: Iterable[Sequence[str]], titles: Sequence[str]) -> str:
    """Returns a table in Markdown, one line for each row."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "".join(
        f"| {' | '.join(' '.join(cell.replace('|', chr(92) + '|').split()) for cell in row)} |\n" for row in lines
    )


class Footnotes:
    """Numbers the notes below a table: the same text has the same number."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def mark(self, *notes: str) -> str:
        """Returns the mark that stands in a cell, such as "[1]" or "[1,3]"; "" for no note."""
        numbers = (self._numbers.setdefault(note, len(self._numbers) + 1) for note in notes)
        joined = ",".join(map(str, numbers))
        return f"[{joined}]" if joined else ""

    def lines(self) -> list[str]:
        """Returns the notes in the order of their numbers."""
        return [f"[{number}] {note}" for note, number in self._numbers.items()]


def met(target: Mapping[str, Any]) -> bool:
    """Returns whether a target in a result file, a least or a most, is reached."""
    reached = target["found"]
    return bool(reached >= target["least"] if "least" in target else reached <= target["most"])


def verdict(target: Mapping[str, Any]) -> Text:
    """Returns the word for a target in a result file; nothing was measured for one whose peer can't run."""
    if target["found"] is None:
        return Text("can't run", style="yellow")
    return Text("met", style="green") if met(target) else Text("missed", style="yellow")


def unique(rows: Iterable[Mapping[str, Any]], name: str) -> list[Any]:
    """Returns the different values of one field, in the order in which they appear."""
    return list(dict.fromkeys(row[name] for row in rows))


# Numbers for people, three digits or so; "n/a" where nothing was measured.

MISSING = "n/a"


def number(value: float) -> str:
    """Such as "1,234", "12.3", "1.23" and "0.012"."""
    size = abs(value)
    digits = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3
    return f"{value:,.{digits}f}"


def milliseconds(seconds: float | None) -> str:
    return MISSING if seconds is None else number(seconds * 1e3)


def microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} us" if abs(seconds) >= 1e-5 else f"{seconds * 1e6:.1f} us"


def megabytes(size: float | None) -> str:
    if size is None:
        return MISSING
    return f"{size / 1e6:,.0f}" if size >= 1e7 else f"{size / 1e6:.1f}"


def binary_size(size: int) -> str:
    """Bytes in binary units, such as "32 KiB"."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size} bytes"


def ratio(value: float | None) -> str:
    return MISSING if value is None else f"{value:.2f}x"


def percent(value: float | None) -> str:
    return MISSING if value is None else f"{value:.0%}"


def plural(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


# Files.


def prepare_folder(folder: Path, *files: str) -> None:
    """Makes the folder, so that one that can't be written to is found before anything is measured.

    Args:
        files: the names of what will be written.

    Raises:
        BadInput: it can't be written to.
    """
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"--out must be a folder, got the file {folder}")
    for name in files:
        if (folder / name).is_dir():
            raise BadInput(f"--out must be a folder for the file {name}, got {folder}, in which {name} is a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise BadInput(f"--out {folder} can't be written to: {error.strerror}") from None


def write_json(path: Path, content: Any) -> None:
    """Writes the file in one step, so that it has the old content or the new one at every moment."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(json.dumps(content, indent=1) + "\n")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


# Progress.


class ProgressBar:
    """Shows how far a number of steps has come; see `progress_bar`."""

    def __init__(self, total: int, console: Console, bar: Progress | None) -> None:
        self._total, self._console, self._bar = total, console, bar
        self._task = None if bar is None else bar.add_task("", total=total)
        self._begun = 0
        self._step = ""

    def __call__(self, step: str) -> None:
        """Says which step begins, so that those before have ended."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, description=step, completed=self._begun, refresh=True)
        else:
            self._print(f"[{self._begun + 1}/{self._total}] {step}")
        self._begun += 1
        self._step = step

    def result(self, text: str) -> None:
        """Prints what the step that has begun led to; the bar stays below it."""
        self._print(f"    {text}" if self._bar is None else f"{self._step}: {text}")

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)


@contextmanager
def progress_bar(total: int, stream: TextIO | None = None) -> Iterator[ProgressBar]:
    """A bar to call with the name of each of `total` steps before it begins.

    On a terminal it shows the time that the rest is expected to take; elsewhere there is a line for each step. The bar
    is drawn when a step begins and not by a thread, which would disturb what is measured.

    Args:
        stream: standard error unless given.
    """
    console = Console(file=stream or sys.stderr, highlight=False)
    if not console.is_terminal:
        yield ProgressBar(total, console, None)
        return
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("left"),
        TextColumn("{task.description}", markup=False),
    )
    with Progress(*columns, console=console, transient=True, auto_refresh=False, speed_estimate_period=1e9) as bar:
        yield ProgressBar(total, console, bar)


# Pictures.

COLOURS = ("#0072B2", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#E69F00", "#000000", "#999999")
"""Okabe and Ito's palette, which people with any colour vision tell apart."""


@contextmanager
def picture(path: Path, width: float, height: float, **options: Any) -> Iterator[Figure]:
    """A matplotlib figure to draw into, in inches, which is written to `path` as a PNG at the end."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, facecolor="white", **options)
    yield figure
    figure.savefig(path)


def plain(axes: Axes, *, grid: str = "both") -> None:
    """Leaves of a plot's frame only the axes, and draws a light grid behind the lines."""
    axes.grid(True, which="major", axis=grid, color="#dddddd", linewidth=0.8)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
