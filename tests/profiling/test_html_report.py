"""The report for browsers: what is in it, and what a real browser makes of it."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from html import unescape
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmkernels.profiling import html_report, profiler, table
from mmkernels.profiling.options import Options
from mmkernels.profiling.photo import default_photo

PHOTO = Image.open(default_photo()).convert("RGB")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
IN_A_BROWSER = pytest.mark.skipif(CHROMIUM is None, reason="needs the program chromium")


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    chosen = Options(
        "qwen2_5_vl",
        default_photo(),
        resolutions=(32, 64),
        reduce=("pool:2", "select:0.25"),
        text_length=12,
        size="tiny",
    )
    return profiler.profile(chosen, PHOTO)


@pytest.fixture(scope="module")
def page(report: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("report")
    html_report.write(report, PHOTO, folder / "report.html")
    assert [path.name for path in folder.iterdir()] == ["report.html"]
    return (folder / "report.html").read_text(encoding="utf-8")


class Reader(HTMLParser):
    """Collects tags, and the text of the table's cells."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        if data.strip() and self.rows and self.rows[-1] and self.tags[-1][0] in ("td", "th"):
            self.rows[-1][-1] += data


def test_the_page_has_all_numbers(report: dict[str, Any], page: str) -> None:
    reader = Reader(page)
    head, *rows = reader.rows
    assert head == [
        "side, px", "reducer", "visual tokens", "backend", "encode, ms", "merge, ms", "prefill, ms", "first token, ms",
        "decode, ms", "memory, MB", "drift", "same token", "Pareto front",
    ]  # fmt: skip
    assert [f"{row[0]} {row[1]}" for row in rows] == report["rows"]
    assert [row[2] for row in rows] == ["56", "16", "14", "12", "4", "3"]
    assert {f"{row[0]} {row[1]}" for row in rows if row[-1] == "yes"} == set(report["pareto"])
    assert [row[10] for row in rows[1:]] == [
        table.drift_text(cell["drift"]["relative_l2"]) for cell in report["cells"][1:]
    ]
    text = unescape(page)
    for words in (table.summary(report), report["command"], report["machine"]["versions"]["torch"], report["created"]):
        assert words in text


def test_the_page_needs_nothing_else(report: dict[str, Any], page: str) -> None:
    reader = Reader(page)
    images = [attributes for tag, attributes in reader.tags if tag == "img"]
    assert len(images) == 1 + len(report["rows"])
    assert all((attributes["src"] or "").startswith("data:image/") and attributes["alt"] for attributes in images)
    assert not {tag for tag, _ in reader.tags} & {"script", "link", "iframe", "object", "embed", "base", "form", "a"}
    assert not re.search(r"url\(|@import|https?:", page)
    (policy,) = (a["content"] for tag, a in reader.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert len(page) < 3_000_000


def test_names_are_text(report: dict[str, Any]) -> None:
    """Nothing that a user gave becomes markup."""
    hostile = copy.deepcopy(report)
    hostile["settings"] |= {"folder": "<script>alert(1)</script>", "image": '"><img src=http://there/x.png>'}
    hostile["command"] = "</pre><b>&"
    hostile["device"] = "<i>"
    page = html_report.render(hostile, PHOTO, b"")
    assert not re.search(r"<script|<img src=http|<b>&|<i>", page)
    assert "&lt;script&gt;" in page


@pytest.mark.parametrize("rows", [{"tokens": (4, 8)}, {"reduce": ("pool:2", "perceiver:4")}])
def test_flamingo_has_a_report_too(rows: dict[str, Any], tmp_path: Path) -> None:
    chosen = Options("flamingo", default_photo(), images=2, text_length=12, size="tiny", train=True, **rows)
    report = profiler.profile(chosen, PHOTO)
    html_report.write(report, PHOTO, tmp_path / "report.html")
    reader = Reader((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert len(reader.rows) == 1 + len(report["cells"]) and len({len(row) for row in reader.rows}) == 1
    assert "training step, ms" in reader.rows[0]
    assert sum(tag == "img" for tag, _ in reader.tags) == 1 + len(report["reducers"])


def test_a_profile_that_is_cut_short_has_a_report(report: dict[str, Any], tmp_path: Path) -> None:
    """Times come last; one row had no memory left."""
    cut = copy.deepcopy(report)
    cut["cells"] = [cell | {"seconds": {}, "samples_seconds": {}} for cell in cut["cells"][:3]]
    cut["cells"][2] |= {"failed": "out of memory", "drift": None, "peak_memory_bytes": None}
    cut["reducers"] = dict(list(cut["reducers"].items())[:3])
    cut["pareto"] = []
    html_report.write(cut, PHOTO, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    _, *rows = Reader(page).rows
    assert [row[4] for row in rows] == ["n/a", "n/a", "out of memory"] and len({len(row) for row in rows}) == 1
    assert "Interrupted: 32 none and 32 pool:2 and 32 select:0.25 were not measured." in page
    assert page.count("<figure>") == 3


# In a real browser.

MEASURE = """
<script>
addEventListener("load", () => {
  const page = document.documentElement, outside = [];
  for (const element of document.querySelectorAll("main *")) {
    if (element.closest(".wide") && !element.matches(".wide")) continue;  // a wide table scrolls within its box
    const box = element.getBoundingClientRect();
    if (box.width && (box.right > page.clientWidth + 1 || box.left < -1)) outside.push(element.tagName);
  }
  const images = [...document.images];
  page.dataset.found = JSON.stringify({
    width: page.clientWidth, scrolls: page.scrollWidth, outside,
    images: images.length, loaded: images.filter(image => image.naturalWidth > 0).length,
    stretched: images.filter(i => Math.abs(i.width / i.height - i.naturalWidth / i.naturalHeight) > 0.05).length,
  });
});
</script>
"""


def chromium(page: Path, folder: Path, *arguments: str, width: int = 1280, height: int = 900) -> str:
    """Runs the browser on a file; returns what it prints."""
    assert CHROMIUM is not None
    words = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", f"--user-data-dir={folder / 'user'}",
        f"--window-size={width},{height}", "--hide-scrollbars", *arguments, page.as_uri(),
    ]  # fmt: skip
    return subprocess.run(words, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.fixture
def server() -> Iterator[tuple[str, list[str]]]:
    """A web server on this machine, and the paths that it was asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(404)
            self.end_headers()

        def log_message(self, *args: Any) -> None:
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{running.server_port}", asked
    running.shutdown()
    thread.join()
    running.server_close()


@IN_A_BROWSER
@pytest.mark.parametrize("width", [500, 1280])
def test_layout_in_a_browser(page: str, report: dict[str, Any], tmp_path: Path, width: int) -> None:
    """Nothing is wider than the window, and every image is shown in its shape; the copy may run code."""
    assert "</head>" in page
    copied = page.replace(html_report.POLICY, "").replace("</head>", MEASURE + "</head>")
    (tmp_path / "copy.html").write_text(copied, encoding="utf-8")
    shown = chromium(tmp_path / "copy.html", tmp_path, "--dump-dom", width=width)
    found = json.loads(unescape(re.search(r'data-found="([^"]*)"', shown)[1]))  # type: ignore[index]
    assert found == {
        "width": width, "scrolls": width, "outside": [], "stretched": 0,
        "images": 1 + len(report["rows"]), "loaded": 1 + len(report["rows"]),
    }  # fmt: skip


@IN_A_BROWSER
@pytest.mark.parametrize("guarded", [True, False])
def test_no_request_leaves(page: str, tmp_path: Path, server: tuple[str, list[str]], guarded: bool) -> None:
    """The policy stops what someone put into the page: without it, the same page asks the server."""
    address, asked = server
    injected = f'<img src="{address}/image"><script src="{address}/script"></script>'
    injected += f'<link rel="stylesheet" href="{address}/style"><script>fetch("{address}/fetch")</script>'
    changed = page.replace("</main>", f"{injected}</main>")
    if not guarded:
        changed = changed.replace(html_report.POLICY, "")
    (tmp_path / "report.html").write_text(changed, encoding="utf-8")
    shown = chromium(tmp_path / "report.html", tmp_path, "--dump-dom")
    assert "Measurements" in shown and f'src="{address}/image"' in shown
    assert set(asked) == (set() if guarded else {"/image", "/script", "/style", "/fetch"})


@IN_A_BROWSER
def test_the_page_is_painted_and_asks_for_nothing(page: str, tmp_path: Path, server: tuple[str, list[str]]) -> None:
    """Every request goes through the proxy, those to this machine too; what is left are the browser's own."""
    address, asked = server
    (tmp_path / "report.html").write_text(page, encoding="utf-8")
    proxy = (f"--proxy-server={address}", "--proxy-bypass-list=<-loopback>")
    chromium(tmp_path / "report.html", tmp_path, *proxy, f"--screenshot={tmp_path / 'shot.png'}", height=2400)
    assert not [path for path in asked if not path.startswith("http://clients2.google.com/time/")]
    with Image.open(tmp_path / "shot.png") as shot:
        assert shot.size == (1280, 2400)
        colours = shot.convert("RGB").getcolors(2**24)
        assert colours is not None and len(colours) > 1000  # text alone has fewer
        assert (255, 246, 221) in {colour for _, colour in colours}  # rows on the Pareto front
