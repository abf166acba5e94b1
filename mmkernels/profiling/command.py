"""``mmkernels profile``: measure, print, write JSON and a picture."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from mmkernels import report as writer
from mmkernels.meters import quick_collections
from mmkernels.models.blocks.images import ImageError, load_image
from mmkernels.options import BadInput
from mmkernels.profiling import plot, table
from mmkernels.profiling.options import Options
from mmkernels.profiling.profiler import find_model, profile, steps


def run_profile(options: Options, out: Path) -> None:
    """Profiles, prints the tables, and writes ``profile.json`` and ``profile.png`` to `out`.

    Raises:
        BadInput: anything that the user gave can't be used; most of it is found before the first measurement.
    """
    find_model(options)
    photo = _open_photo(options.image)
    writer.prepare_folder(out)
    with writer.progress_bar(steps(options)) as advance, quick_collections():
        report = profile(options, photo, advance)
    writer.write_json(out / "profile.json", report)
    plot.draw(report, photo, out / "profile.png")
    console = writer.console()
    console.print(table.render(report))
    console.print(f"Written: {out / 'profile.png'} (picture), {out / 'profile.json'} (all numbers)")
    console.print(table.summary(report), style="bold")


def _open_photo(path: Path) -> Image.Image:
    try:
        return load_image(path)
    except (ImageError, FileNotFoundError, IsADirectoryError) as error:
        raise BadInput(str(error)) from None
