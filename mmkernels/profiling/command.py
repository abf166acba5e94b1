"""``mmkernels profile``: measure, print, write JSON and a picture."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from mmkernels import report as writer
from mmkernels.interrupts import Interrupted
from mmkernels.meters import quick_collections
from mmkernels.models.blocks.images import ImageError, load_image
from mmkernels.options import BadInput
from mmkernels.profiling import plot, plot_reduce, table
from mmkernels.profiling.options import Options
from mmkernels.profiling.profiler import find_model, reports, steps

_JSON, _PICTURE = "profile.json", "profile.png"


def run_profile(options: Options, out: Path) -> None:
    """Profiles, prints the tables, and writes ``profile.json`` and ``profile.png`` to `out`.

    The JSON is written after each number of tokens, or reducer.

    Raises:
        BadInput: anything that the user gave can't be used; most of it is found before the first measurement.
        Interrupted: by Ctrl-C; the rows that were measured are printed and saved.
    """
    find_model(options)
    photo = _open_photo(options.image)
    writer.prepare_folder(out, _JSON, _PICTURE)
    if options.image.resolve() == (out / _PICTURE).resolve():
        raise BadInput(f"--out must be a folder in which {_PICTURE} is not the photograph, got {out}")
    report, interrupted = None, False
    with writer.progress_bar(steps(options)) as advance, quick_collections():
        try:
            for report in reports(options, photo, advance):
                writer.write_json(out / _JSON, report)
        except KeyboardInterrupt:
            interrupted = True
    if report is None:
        raise Interrupted("nothing was measured yet")
    draw = plot_reduce.draw if options.reduce else plot.draw
    draw(report, photo, out / _PICTURE)
    console = writer.console()
    console.print(table.render(report))
    console.print(f"Written: {out / _PICTURE} (picture), {out / _JSON} (all numbers)")
    console.print(table.summary(report), style="bold")
    if interrupted:
        raise Interrupted("what is above is saved")


def _open_photo(path: Path) -> Image.Image:
    try:
        return load_image(path)
    except (ImageError, FileNotFoundError) as error:
        raise BadInput(f"--image {str(error).removeprefix('image ')}") from None
