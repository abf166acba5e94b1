"""A profile as one HTML file, readable without a network: tables, the picture, and what is left of the photograph."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterable
from html import escape
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image

from mmkernels.profiling import hf_table, plot_sound, table
from mmkernels.profiling.draw import draw
from mmkernels.profiling.hf_table import compares_patch
from mmkernels.profiling.pareto import drift_of, drift_text, row_of
from mmkernels.profiling.photo import paint
from mmkernels.profiling.plot import subtitle
from mmkernels.profiling.plot_parts import caption, first_image, paint_legend
from mmkernels.profiling.sound import Sound
from mmkernels.report import MISSING, megabytes, milliseconds, percent

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""The content security policy: nothing is loaded, and nothing runs."""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""

_FRONT_ROW = '<tr class="front">'

_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: #1c1c1c; font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1200px; margin: 0 auto; padding: 24px 20px 48px; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 4px; }
h2 { font-size: 1.2rem; margin: 36px 0 8px; }
p { margin: 6px 0; max-width: 75ch; overflow-wrap: anywhere; }
.about { color: #555; }
.summary { background: #f2f5f9; border-left: 4px solid #0072b2; padding: 10px 14px; max-width: none; }
.warning { color: #b00020; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { padding: 4px 10px 4px 0; text-align: right; white-space: nowrap; border-bottom: 1px solid #e4e4e4; }
th { vertical-align: bottom; color: #555; font-weight: 600; white-space: normal; }
th.text, td.text { text-align: left; }
tr.front td { background: #fff6dd; }
tr.front td:first-child { box-shadow: inset 4px 0 #e69f00; }
td:first-child, th:first-child { padding-left: 10px; }
img { max-width: 100%; height: auto; display: block; }
.wide img { max-width: none; width: 100%; min-width: 760px; }
figure img { width: 100%; }
.photos { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 260px), 1fr)); gap: 18px; }
figure { margin: 0; }
figcaption { font-size: .9rem; margin-top: 4px; overflow-wrap: anywhere; }
figcaption b { display: block; font-size: 1rem; }
.front-photo { outline: 4px solid #e69f00; }
pre { background: #f4f4f4; padding: 10px 12px; white-space: pre-wrap; overflow-wrap: anywhere; font-size: .9rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 16px; margin: 0; }
dt { color: #555; }
dd { margin: 0; overflow-wrap: anywhere; }
"""


def write(report: dict[str, Any], photo: Image.Image, path: Path) -> None:
    """Writes the report in one step.

    Args:
        report: of the profile.
        photo: the photograph.
        path: the HTML file.
    """
    with TemporaryDirectory() as folder:
        picture = Path(folder) / "profile.png"
        draw(report, photo, picture, photos=False)
        page = render(report, photo, picture.read_bytes())
    _write(page, path)


def _write(page: str, path: Path) -> None:
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(page, encoding="utf-8")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def render(report: dict[str, Any], photo: Image.Image, picture: bytes) -> str:
    """Returns the whole page.

    Args:
        report: of the profile.
        photo: the photograph.
        picture: a PNG.
    """
    title = f"What a visual token costs: {table.title_of_model(report['settings'])}"
    return _page(report, title, subtitle(report), picture, _photos(report, photo))


def write_of_sound(report: dict[str, Any], sound: Sound, path: Path) -> None:
    """Writes the report of a model that hears, in one step; `report`, `path` as of `write`."""
    with TemporaryDirectory() as folder:
        picture = Path(folder) / "profile.png"
        plot_sound.draw(report, sound, picture)
        page = _page(report, plot_sound.title(report), plot_sound.subtitle(report), picture.read_bytes(), [])
    _write(page, path)


def _page(report: dict[str, Any], title: str, about: str, picture: bytes, parts_below: list[str]) -> str:
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="about">{escape(about)}</p>',
        f'<p class="summary">{escape(table.summary(report))}</p>',
        *(f'<p class="warning">{escape(line)}</p>' for line in table.warnings(report)),
        "<h2>Measurements</h2>",
        _measurements(report),
        *(f'<p class="about">{escape(line)}</p>' for line in _legend(report)),
        "<h2>The picture</h2>",
        f'<div class="wide">{_image(picture, "png", f"The measurements as plots. {table.summary(report)}")}</div>',
        *parts_below,
        "<h2>How it was measured</h2>",
        f"<pre>{escape(report['command'])}</pre>",
        _settings(report),
    ]
    return _PAGE.format(policy=POLICY, title=escape(title), style=_STYLE, body="\n".join(parts))


def _image(content: bytes, kind: str, words: str, classes: str = "") -> str:
    data = base64.b64encode(content).decode()
    classes = f' class="{classes}"' if classes else ""
    return f'<img{classes} alt="{escape(words)}" src="data:image/{kind};base64,{data}">'


# The table.


def _measurements(report: dict[str, Any]) -> str:
    s, total = report["settings"], report["total"]
    reducing, of_sound = table.compares_rows(report), table.is_of_sound(report)
    repeated = [stage for stage in report["stages"] if stage not in total["stages"]]
    times = (
        {stage: stage for stage in total["stages"]} | {"total": total["name"]} | {stage: stage for stage in repeated}
    )
    memories = {"peak_memory_bytes": "memory"}
    if s["train"]:
        times["train_step"], memories["train_peak_memory_bytes"] = "training step", "training memory"
    if of_sound:
        texts = ["sound, s", "pooled by", "tokens", "backend"]
    else:
        texts = ["side, px"] * bool(s.get("resolutions")) + ["reducer"] * reducing + ["visual tokens"]
        texts.append("patch" if compares_patch(report) else "backend")
    titles = [f"{title}, ms" for title in times.values()] + [f"{title}, MB" for title in memories.values()]
    titles += (
        ["drift"]
        + ["same tokens"] * compares_patch(report)
        + ["same token"] * reducing
        + ["Pareto front"] * (reducing and not of_sound)
    )
    heads = [*(f'<th class="text" scope="col">{escape(text)}</th>' for text in texts)]
    heads += [f'<th scope="col">{escape(text)}</th>' for text in titles]
    lines = []
    for cell in report["cells"]:
        front = table.is_best(report, cell)
        names = table.begin(report, cell)
        if cell["failed"]:
            values = [cell["failed"]] + [""] * (len(titles) - 1)
        else:
            values = [milliseconds(cell["seconds"].get(name)) for name in times]
            values += [megabytes(cell[name]) for name in memories]
            values += _drifts(report, cell)
            values += ["yes" if front else ""] * (reducing and not of_sound)
        row = [*(f'<td class="text">{escape(name)}</td>' for name in names), *(f"<td>{escape(x)}</td>" for x in values)]
        lines.append((_FRONT_ROW if front else "<tr>") + "".join(row) + "</tr>")
    return _table(heads, lines)


def _drifts(report: dict[str, Any], cell: dict[str, Any]) -> list[str]:
    """Returns what stands in the columns of the drift."""
    if compares_patch(report):
        return hf_table.drift(cell)
    found = drift_of(cell)
    drift = MISSING if found is None else drift_text(found[0])
    agreement = [percent(None if found is None else found[1])] * table.compares_rows(report)
    return ["baseline" if found is not None and found[0] == 0 else drift, *agreement]


def _legend(report: dict[str, Any]) -> list[str]:
    """Returns what the columns are; the table on a terminal marks the Pareto front, this one has a column for it."""
    mark = f"{table.MARK}: on the "
    return [line.replace(mark, "") for line in table.legend(report).splitlines()]


def _table(heads: Iterable[str], lines: Iterable[str]) -> str:
    body = "\n".join(lines)
    return f'<div class="wide"><table><thead><tr>{"".join(heads)}</tr></thead>\n<tbody>{body}</tbody></table></div>'


# The photograph.


def _photos(report: dict[str, Any], photo: Image.Image) -> list[str]:
    """Returns the first image as each reducer leaves it."""
    if not report["reducers"]:
        return []
    image = first_image(report, photo)
    backend = report["settings"]["backends"][0]
    cells = {str(row_of(cell)): cell for cell in report["cells"] if cell["backend"] == backend}
    figures = []
    for row, about in report["reducers"].items():
        front = row in report.get("pareto", ())
        words = f"{row}: {caption(about)}"
        below = [f"<b>{escape(row)}</b>", escape(_said(report, cells[row], about))]
        picture = _image(_painted(image, about), "jpeg", words, "front-photo" * front)
        figures.append(f"<figure>{picture}<figcaption>{''.join(below)}</figcaption></figure>")
    return [
        "<h2>What is left of the first image</h2>",
        f'<p class="about">{escape(paint_legend(report))} Rows on the Pareto front have a frame.</p>',
        f'<div class="photos">{"".join(figures)}</div>',
    ]


def _said(report: dict[str, Any], cell: dict[str, Any], about: dict[str, Any]) -> str:
    """Returns what stands below a photograph."""
    parts = [caption(about)]
    if "total" in cell["seconds"]:
        parts.append(f"{report['total']['name']} after {milliseconds(cell['seconds']['total'])} ms")
    found = drift_of(cell)
    if found is not None and found[0] > 0:
        parts.append(f"drift {drift_text(found[0])}")
    return ", ".join(parts)


def _painted(image: Image.Image, about: dict[str, Any]) -> bytes:
    """Returns the painted image as a JPEG: a PNG of a photograph is ten times as large."""
    stream = BytesIO()
    painted = Image.fromarray(paint(image, about))
    painted.thumbnail((720, 720))
    painted.save(stream, "JPEG", quality=85)
    return stream.getvalue()


# Settings.


def _settings(report: dict[str, Any]) -> str:
    machine = report["machine"]
    about = {name.replace("_", " "): _value(value) for name, value in report["settings"].items() if value is not None}
    about |= {"device": report["device"], "threads": str(machine["torch_threads"]), "measured": report["created"]}
    about |= {name: str(version) for name, version in machine["versions"].items()}
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in about.items())
    return f"<dl>{rows}</dl>"


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
