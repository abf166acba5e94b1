"""The pages of the guide work as written: their Python runs, their commands exist."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main

from mmkernels import cli
from mmkernels.options import BadInput

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs" / "guide").glob("*.md"))
assert PAGES, "no pages in docs/guide"
USAGE_ERROR = typer.BadParameter.__base__  # of the click that typer comes with
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def script(page: str) -> str:
    """All Python blocks of a page, each line where it is on the page, so that tracebacks name it."""
    lines = [""] * (page.count("\n") + 1)
    for language, code, first in blocks(page):
        if language == "python":
            lines[first : first + code.count("\n")] = code.splitlines()
    return "\n".join(lines)


def blocks(page: str) -> Iterator[tuple[str, str, int]]:
    """Language, text, and the number of its first line, from 0."""
    for found in FENCE.finditer(page):
        yield found[1], found[2], page.count("\n", 0, found.start(2))


def commands(page: str) -> list[list[str]]:
    """What a reader would type: the lines of shell blocks, and whole commands in code spans."""
    lines = [line for language, code, _ in blocks(page) if language == "bash" for line in code.splitlines()]
    lines += re.findall(r"`((?:\.venv/bin/)?mmkernels [^`\n]+)`", FENCE.sub("", page))
    return [shlex.split(part) for line in lines for part in line.split("&&")]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_the_python_of_a_page_runs(page: Path, tmp_path: Path) -> None:
    code = script(page.read_text())
    assert code.strip(), "a page without Python"
    file = tmp_path / f"{page.stem}.py"
    file.write_text(code)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment["TMPDIR"] = str(tmp_path)
    ended = subprocess.run([sys.executable, file], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_the_commands_of_a_page_exist(page: Path) -> None:
    found = commands(page.read_text())
    assert any(words[0].endswith("mmkernels") for words in found)
    for words in found:
        check_command(words)


@pytest.mark.parametrize(
    "line",
    [
        "mmkernels fly",
        "mmkernels bench transformers --fast",
        "mmkernels bench transformer",
        "mmkernels bench transformers --dtype fp8",
        'mmkernels bench transformers --filter "Llama-9"',
        "mmkernels support clap",
        "make everything",
        'pip install ".[everything]"',
        "conda install mmkernels",
    ],
)
def test_a_command_that_does_not_exist_is_noticed(line: str) -> None:
    with pytest.raises((AssertionError, BadInput, USAGE_ERROR)):
        check_command(shlex.split(line))


def check_command(words: list[str]) -> None:
    """Fail unless these words can be typed in a checkout."""
    program, rest = Path(words[0]).name, words[1:]
    if program == "mmkernels":
        check_mmkernels(rest)
    elif program == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(rest) <= set(targets), words
    elif program == "pip":
        extras = (ROOT / "pyproject.toml").read_text().partition("optional-dependencies]")[2].partition("\n\n")[0]
        for name in re.findall(r"\[(\w+)\]", " ".join(rest)):
            assert re.search(rf"^{name} = ", extras, re.MULTILINE), name
    else:
        assert program == "cd", words


def check_mmkernels(words: list[str]) -> None:
    """Parse a command of ours as the command line would, and look at what its arguments name."""
    name, *rest = words
    known = typer.main.get_command(cli._app()).commands
    assert name in known, name
    given = known[name].make_context(name, rest).params
    if name == "support":
        from mmkernels.testing.families import find

        find(given["families"] or ())
    if name == "bench":
        assert (ROOT / "benchmarks" / f"bench_{given['op']}.py").exists(), given["op"]
        for dtype in given["dtype"].split(","):
            assert any(given["filter"] in row for row in rows(given["op"], dtype)), given


def rows(op: str, dtype: str) -> list[str]:
    """The names that `--filter` looks in."""
    assert op == "transformers", f"rows of {op} are not known here"
    from transformers_measure import Row
    from transformers_models import HEADLINES, OVERHEAD
    from transformers_more import OTHERS

    from mmkernels.options import DTYPES

    assert dtype in DTYPES, dtype
    return [str(Row(model, dtype)) for model in (*HEADLINES, *OVERHEAD, *OTHERS)]
