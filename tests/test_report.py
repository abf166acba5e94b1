"""The report writer: numbers, notes, files."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from mmkernels import report
from mmkernels.options import BadInput


def test_numbers_have_three_digits_or_so() -> None:
    assert [report.number(x) for x in (0.01234, 1.234, 12.34, 123.4, 1234.5)] == [
        "0.012",
        "1.23",
        "12.3",
        "123",
        "1,234",
    ]
    assert report.milliseconds(0.0123) == "12.3" and report.milliseconds(None) == "n/a"
    assert [report.microseconds(x) for x in (1.23e-6, 1.23e-4)] == ["1.2 us", "123 us"]
    assert [report.megabytes(x) for x in (None, 0, 1.26e6, 1.26e9)] == ["n/a", "0.0", "1.3", "1,260"]
    assert [report.binary_size(x) for x in (12, 2**15, 3 * 2**29)] == ["12 bytes", "32 KiB", "1.5 GiB"]
    assert report.ratio(1.234) == "1.23x" and report.ratio(None) == "n/a" and report.percent(0.567) == "57%"
    assert report.plural(1, "row") == "1 row" and report.plural(2, "row") == "2 rows"


def test_footnotes_have_one_number_each() -> None:
    notes = report.Footnotes()
    assert [notes.mark("a"), notes.mark("b", "a"), notes.mark(), notes.mark("b")] == ["[1]", "[2,1]", "", "[2]"]
    assert notes.lines() == ["[1] a", "[2] b"]


def test_a_table_in_markdown_keeps_each_row_on_its_line() -> None:
    text = report.markdown([["a", "b | c"], ["d\ne", ""]], ["one", "two"])
    assert text == "| one | two |\n| --- | --- |\n| a | b \\| c |\n| d e |  |\n"


def test_texts_stand_on_the_left_and_numbers_on_the_right() -> None:
    console = Console(width=40)
    with console.capture() as printed:
        console.print(report.table([["a", "1"], ["bcd", "234"]], ["name", "number"]))
    lines = [line.rstrip() for line in printed.get().splitlines() if line.strip()]
    assert lines[2:] == [" a          1", " bcd      234"]


@pytest.mark.parametrize(
    ("target", "word"),
    [
        ({"found": 2.0, "least": 1.0}, "met"),
        ({"found": 2.0, "most": 1.0}, "missed"),
        ({"found": 1.0, "most": 1.0}, "met"),
        ({"found": 0.5, "least": 1.0}, "missed"),
        ({"found": None, "least": 1.0}, "can't run"),
    ],
)
def test_verdicts(target: dict[str, float], word: str) -> None:
    assert str(report.verdict(target)) == word


def test_a_file_is_the_old_one_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    report.write_json(path, [1])
    with pytest.raises(TypeError):
        report.write_json(path, [2, object()])
    assert json.loads(path.read_text()) == [1] and list(tmp_path.iterdir()) == [path]
    report.write_json(path, [1, 2])
    assert json.loads(path.read_text()) == [1, 2] and list(tmp_path.iterdir()) == [path]


def test_a_folder_that_can_t_be_written_to_is_found_at_once(tmp_path: Path) -> None:
    report.prepare_folder(tmp_path / "new" / "folder")
    assert (tmp_path / "new" / "folder").is_dir()
    with pytest.raises(BadInput, match=r"--out /proc/here can't be written to"):
        report.prepare_folder(Path("/proc/here"))
    (tmp_path / "rows.json").mkdir()
    with pytest.raises(BadInput, match=r"--out must be a folder for the file rows.json, got .*, in which"):
        report.prepare_folder(tmp_path, "rows.png", "rows.json")
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match=r"--out must be a folder, got the file .*file"):
        report.prepare_folder(tmp_path / "file")


def test_progress_without_a_terminal_is_a_line_a_step(capsys: pytest.CaptureFixture[str]) -> None:
    with report.progress_bar(2) as bar:
        bar("one")
        bar.result("good")
        bar("two [and more]")
    assert capsys.readouterr().err.splitlines() == ["[1/2] one", "    good", "[2/2] two [and more]"]
