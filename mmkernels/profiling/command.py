"""``mmkernels profile``: measure, print, write JSON, a picture and a report for browsers."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from mmkernels import report as writer
from mmkernels.interrupts import Interrupted
from mmkernels.meters import quick_collections
from mmkernels.models.blocks.images import ImageError, load_image
from mmkernels.options import BadInput
from mmkernels.profiling import html_report, table
from mmkernels.profiling.draw import draw
from mmkernels.profiling.options import Options
from mmkernels.profiling.profiler import check_photo, find_model, reports, steps

_JSON, _PICTURE = "profile.json", "profile.png"


def run_profile(options: Options, out: Path, report_file: Path | None = None) -> None:
    """Profiles, prints the tables, and writes ``profile.json`` and ``profile.png`` to `out`, and the report.

    The JSON is written after each number of tokens, or reducer.

    Args:
        options: what to run.
        out: the folder.
        report_file: the HTML file; None: none is written.

    Raises:
        BadInput: anything that the user gave can't be used; most of it is found before the first measurement.
        Interrupted: by Ctrl-C; the rows that were measured are printed and saved.
    """
    find_model(options)
    photo = _open_photo(options.image)
    check_photo(options, photo)
    writer.prepare_folder(out, _JSON, _PICTURE)
    if options.image.resolve() == (out / _PICTURE).resolve():
        raise BadInput(f"--out must be a folder in which {_PICTURE} is not the photograph, got {out}")
    if report_file is not None:
        _prepare_file(report_file, options.image, [out / _JSON, out / _PICTURE])
    report, interrupted = None, False
    with writer.progress_bar(steps(options)) as advance, quick_collections():
        try:
            for report in reports(options, photo, advance):
                writer.write_json(out / _JSON, report)
        except KeyboardInterrupt:
            interrupted = True
    if report is None:
        raise Interrupted("nothing was measured yet")
    draw(report, photo, out / _PICTURE)
    written = [f"{out / _PICTURE} (picture)", f"{out / _JSON} (all numbers)"]
    if report_file is not None:
        html_report.write(report, photo, report_file)
        written.append(f"{report_file} (report, for a browser)")
    console = writer.console()
    console.print(table.render(report))
    console.print(f"Written: {', '.join(written)}")
    console.print(table.summary(report), style="bold")
    if interrupted:
        raise Interrupted("what is above is saved")


def _open_photo(path: Path) -> Image.Image:
    try:
        return load_image(path)
    except (ImageError, FileNotFoundError) as error:
        raise BadInput(f"--image {str(error).removeprefix('image ')}") from None


def _prepare_file(path: Path, photo: Path, others: list[Path]) -> None:
    """Finds before anything is measured that the report can't be written."""
    if path.is_dir():
        raise BadInput(f"--report must be a file, got the folder {path}")
    if path.resolve() in [photo.resolve(), *(other.resolve() for other in others)]:
        raise BadInput(f"--report must be a file of its own, got {path}")
    existed = path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
        if not existed:
            path.unlink()
    except OSError as error:
        raise BadInput(f"--report {path} can't be written to: {error.strerror}") from None
