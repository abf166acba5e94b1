"""``mmkernels profile``: measure, print, write JSON and a picture."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from mmkernels.models.blocks.images import ImageError, load_image
from mmkernels.options import BadInput
from mmkernels.profiling import plot, table
from mmkernels.profiling.options import Options
from mmkernels.profiling.profiler import find_model, profile, steps


def run_profile(options: Options, out: Path) -> None:
    """Profile, print the tables, and write ``profile.json`` and ``profile.png`` to `out`.

    Raises:
        BadInput: anything that the user gave can't be used; most of it is found before the first measurement.
    """
    find_model(options)
    photo = _open_photo(options.image)
    prepare_folder(out)
    with progress_bar(steps(options)) as advance:
        report = profile(options, photo, advance)
    (out / "profile.json").write_text(json.dumps(report, indent=1) + "\n")
    plot.draw(report, photo, out / "profile.png")
    console = table.console()
    console.print(table.render(report))
    console.print(f"Written: {out / 'profile.png'} (picture), {out / 'profile.json'} (all numbers)")
    console.print(table.summary(report), style="bold")


def _open_photo(path: Path) -> Image.Image:
    try:
        return load_image(path)
    except (ImageError, FileNotFoundError, IsADirectoryError) as error:
        raise BadInput(str(error)) from None


def prepare_folder(folder: Path) -> None:
    """Make the folder, and find out now that it can't be written to, not after the measurements."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise BadInput(f"--out {folder} can't be written to: {error.strerror}") from None


@contextmanager
def progress_bar(total: int) -> Iterator[Callable[[str], None]]:
    """A function to call before each of `total` steps: a bar on a terminal, else a line each, on standard error."""
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        done = iter(range(1, total + 1))
        yield lambda what: print(f"[{next(done)}/{total}] {what}", file=sys.stderr, flush=True)
        return
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=total)
        started = False

        def advance(what: str) -> None:
            nonlocal started
            bar.update(task, description=what, advance=int(started))
            started = True

        yield advance
