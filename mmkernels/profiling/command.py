"""``mmkernels profile``: measure, print, write JSON, a picture and a report for browsers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from mmkernels import report as writer
from mmkernels.interrupts import Interrupted
from mmkernels.meters import quick_collections
from mmkernels.models.blocks.images import ImageError, load_image
from mmkernels.options import BadInput
from mmkernels.profiling import html_report, plot_sound, sound_profiler, table
from mmkernels.profiling.draw import draw
from mmkernels.profiling.hf_options import HFOptions
from mmkernels.profiling.hf_profiler import HFProfile
from mmkernels.profiling.options import Options
from mmkernels.profiling.profiler import check_photo, find_model, reports, steps
from mmkernels.profiling.sound import open_sound
from mmkernels.profiling.sound_options import SoundOptions

_JSON, _PICTURE = "profile.json", "profile.png"


class _Subject(Protocol):
    """What is profiled, and what its report looks like.

    Attributes:
        kind: what the file is, in words.
        path: the file that is read, which nothing may overwrite; None: there is none.
    """

    kind: str

    @property
    def path(self) -> Path | None: ...

    def steps(self) -> int:
        """Returns how often `reports` reports progress."""
        ...

    def reports(self, progress: Callable[[str], None]) -> Iterator[dict[str, Any]]: ...
    def draw(self, report: dict[str, Any], path: Path) -> None: ...
    def write_html(self, report: dict[str, Any], path: Path) -> None: ...


class _OfPhoto:
    kind = "photograph"

    def __init__(self, options: Options) -> None:
        find_model(options)
        self.options, self.path = options, options.image
        self.photo = _open_photo(options.image)
        check_photo(options, self.photo)

    def steps(self) -> int:
        return steps(self.options)

    def reports(self, progress: Callable[[str], None]) -> Iterator[dict[str, Any]]:
        return reports(self.options, self.photo, progress)

    def draw(self, report: dict[str, Any], path: Path) -> None:
        draw(report, self.photo, path)

    def write_html(self, report: dict[str, Any], path: Path) -> None:
        html_report.write(report, self.photo, path)


class _OfTransformers:
    kind = "photograph"

    def __init__(self, options: HFOptions) -> None:
        self.path = options.image
        self.photo = _open_photo(options.image)
        self.profile = HFProfile(options, self.photo)

    def steps(self) -> int:
        return self.profile.steps()

    def reports(self, progress: Callable[[str], None]) -> Iterator[dict[str, Any]]:
        return self.profile.reports(progress)

    def draw(self, report: dict[str, Any], path: Path) -> None:
        draw(report, self.photo, path)

    def write_html(self, report: dict[str, Any], path: Path) -> None:
        html_report.write(report, self.photo, path)


class _OfSound:
    kind = "sound"

    def __init__(self, options: SoundOptions) -> None:
        self.path = options.audio
        self.sound = open_sound(options.audio)
        self.options = sound_profiler.fit(options, self.sound)

    def steps(self) -> int:
        return sound_profiler.steps(self.options)

    def reports(self, progress: Callable[[str], None]) -> Iterator[dict[str, Any]]:
        return sound_profiler.reports(self.options, self.sound, progress)

    def draw(self, report: dict[str, Any], path: Path) -> None:
        plot_sound.draw(report, self.sound, path)

    def write_html(self, report: dict[str, Any], path: Path) -> None:
        html_report.write_of_sound(report, self.sound, path)


def _subject(options: Options | SoundOptions | HFOptions) -> _Subject:
    if isinstance(options, HFOptions):
        return _OfTransformers(options)
    return _OfSound(options) if isinstance(options, SoundOptions) else _OfPhoto(options)


def run_profile(options: Options | SoundOptions | HFOptions, out: Path, report_file: Path | None = None) -> None:
    """Profiles, prints the tables, and writes ``profile.json`` and ``profile.png`` to `out`, and the report.

    The JSON is written after each number of tokens, or reducer, or part of a sound.

    Args:
        options: what to run.
        out: the folder.
        report_file: the HTML file; None: none is written.

    Raises:
        BadInput: anything that the user gave can't be used; most of it is found before the first measurement.
        Interrupted: by Ctrl-C; the rows that were measured are printed and saved.
    """
    subject = _subject(options)
    writer.prepare_folder(out, _JSON, _PICTURE)
    for name in (_JSON, _PICTURE):
        if subject.path is not None and subject.path.resolve() == (out / name).resolve():
            raise BadInput(f"--out must be a folder in which {name} is not the {subject.kind}, got {out}")
    if report_file is not None:
        _prepare_file(report_file, [subject.path, out / _JSON, out / _PICTURE])
    report, interrupted = None, False
    with writer.progress_bar(subject.steps()) as advance, quick_collections():
        try:
            for report in subject.reports(advance):
                writer.write_json(out / _JSON, report)
        except KeyboardInterrupt:
            interrupted = True
    if report is None:
        raise Interrupted("nothing was measured yet")
    subject.draw(report, out / _PICTURE)
    written = [f"{out / _PICTURE} (picture)", f"{out / _JSON} (all numbers)"]
    if report_file is not None:
        subject.write_html(report, report_file)
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


def _prepare_file(path: Path, others: list[Path | None]) -> None:
    """Finds before anything is measured that the report can't be written."""
    if path.is_dir():
        raise BadInput(f"--report must be a file, got the folder {path}")
    if path.resolve() in [other.resolve() for other in others if other is not None]:
        raise BadInput(f"--report must be a file of its own, got {path}")
    existed = path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
        if not existed:
            path.unlink()
    except OSError as error:
        raise BadInput(f"--report {path} can't be written to: {error.strerror}") from None
