"""The guide's pages are true: their Python runs, their commands exist."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
import typer.main
from torch.distributed.run import get_args_parser

from mmkernels import cli
from mmkernels.ops import MODULES
from mmkernels.options import DTYPES, BadInput
from mmkernels.planning.options import read_options

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs" / "guide").glob("*.md"))
assert PAGES, "no pages in docs/guide"
NEEDS = {"text-to-image": "diffusers", "hub-kernels": "kernels", "reinforcement": "trl"}
"""Of pages whose Python needs a package that `make setup` does not install, that package."""
_TOO_OLD = {
    "profile-any-model": pytest.mark.skipif(
        find_spec("torchvision") is None and version("transformers") == "5.17.0",
        reason="the processor of Idefics3 needs torchvision in transformers 5.17",
    )
}


def _marks(page: str) -> tuple[pytest.MarkDecorator, ...]:
    needs = (pytest.mark.integration(NEEDS[page]),) if page in NEEDS else ()
    return needs + ((_TOO_OLD[page],) if page in _TOO_OLD else ())


RUNNABLE = [pytest.param(page, marks=_marks(page.stem), id=page.stem) for page in PAGES]
USAGE_ERROR = typer.BadParameter.__base__  # of the click that typer comes with
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def script(page: str) -> str:
    """Returns all Python blocks of a page; each line keeps its number, so that tracebacks name the line of the page."""
    lines = [""] * (page.count("\n") + 1)
    for language, code, first in blocks(page):
        if language == "python":
            lines[first : first + code.count("\n")] = code.splitlines()
    return "\n".join(lines)


def blocks(page: str) -> Iterator[tuple[str, str, int]]:
    """Yields the language, the text, and the number of the first line, from 0."""
    for match in FENCE.finditer(page):
        yield match[1], match[2], page.count("\n", 0, match.start(2))


def commands(page: str) -> list[list[str]]:
    """Returns what a reader would type: the lines of shell blocks, and whole commands in code spans."""
    lines = [line for language, code, _ in blocks(page) if language == "bash" for line in code.splitlines()]
    lines += re.findall(r"`((?:\.venv/bin/)?mmkernels [^`\n]+)`", FENCE.sub("", page))
    return [shlex.split(part) for line in lines for part in line.split("&&")]


@pytest.mark.parametrize("page", RUNNABLE)
def test_the_python_of_a_page_runs(page: Path, tmp_path: Path) -> None:
    code = script(page.read_text())
    programs(page.read_text(), tmp_path)
    assert code.strip(), "a page without Python"
    file = tmp_path / f"{page.stem}.py"
    file.write_text(code)
    ended = subprocess.run(
        [sys.executable, file], cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr


def programs(page: str, folder: Path) -> None:
    """Runs the programs of the checkout that a page runs before its Python."""
    for words in commands(page):
        if words[0] == "python":
            program = [sys.executable, ROOT / words[1], *words[2:]]
            ended = subprocess.run(program, cwd=folder, env=environment(folder), capture_output=True, text=True)
            assert ended.returncode == 0, ended.stderr


def environment(folder: Path) -> dict[str, str]:
    """Returns the variables of a reader's program, whose temporary files lie in a folder."""
    path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(ROOT))))  # other versions come first
    return os.environ | {
        "PYTHONPATH": path,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TMPDIR": str(folder),
    }


@pytest.mark.slow
def test_two_groups_of_processes_train(tmp_path: Path) -> None:
    """The commands for two machines, both on this one."""
    page = (ROOT / "docs" / "guide" / "large-batches.md").read_text()
    (tmp_path / "train.py").write_text(script(page))
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *(re.sub("host0:[0-9]+", address, x) for x in words[1:])],
            cwd=tmp_path, env=environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for words in commands(page) if words[0] == "torchrun"
    ]  # fmt: skip
    assert len(started) == 2
    try:
        said = [process.communicate(timeout=240)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], said


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_the_commands_of_a_page_exist(page: Path) -> None:
    lines = commands(page.read_text())
    assert any(words[0].endswith("mmkernels") for words in lines)
    for words in lines:
        check_command(words)


def test_each_line_of_troubleshooting_names_a_test() -> None:
    page = (ROOT / "docs" / "guide" / "troubleshooting.md").read_text()
    lines = [line for line in page.splitlines() if line.startswith("| ") and not line.startswith("| what you see")]
    assert lines
    for line in lines:
        named = re.search(r"\| `(tests/\S+\.py)::(test_\w+)` \|$", line)
        assert named, line
        assert re.search(rf"^ *def {named[2]}\(", (ROOT / named[1]).read_text(), re.MULTILINE), named[0]


@pytest.mark.parametrize(
    "line",
    [
        "mmkernels fly",
        "mmkernels bench transformers --fast",
        "mmkernels bench transformer",
        "mmkernels bench token",
        "mmkernels bench transformers --dtype fp8",
        'mmkernels bench transformers --filter "Llama-9"',
        "mmkernels support clap",
        "mmkernels plan",
        "mmkernels plan captions",
        "mmkernels plan contrastive --device v100",
        "torchrun --nnodes 2 --fast train.py",
        "torchrun --nnodes 2 learn.py",
        "make everything",
        'pip install ".[everything]"',
        "conda install mmkernels",
    ],
)
def test_a_command_that_does_not_exist_is_noticed(line: str) -> None:
    with pytest.raises((AssertionError, BadInput, USAGE_ERROR, SystemExit)):
        check_command(shlex.split(line))


def check_command(words: list[str]) -> None:
    """Fails unless these words are a command that exists in a checkout."""
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
    elif program == "torchrun":
        assert get_args_parser().parse_args(rest).training_script == "train.py", words
    elif program == "python":
        assert (ROOT / rest[0]).is_file(), words
    else:
        assert program == "cd", words


def check_mmkernels(words: list[str]) -> None:
    """Parses an `mmkernels` command as the command line does, and checks what its arguments name."""
    name, *rest = words
    known = typer.main.get_command(cli._app()).commands
    assert name in known, name
    command = known[name]
    if name == "plan":
        assert rest and rest[0] in command.commands, words
        command, rest = command.commands[rest[0]], rest[1:]
    options = command.make_context(name, rest).params
    if name == "support":
        from mmkernels.integrations.transformers.sweep import model_types
        from mmkernels.testing.families import find

        known_names = model_types if options["every"] else find
        known_names(options["families"] or ())
    if name == "plan":
        named = ("batch", "dim", "ranks", "dtype", "device", "bandwidth", "encoder_ms")
        read_options(**{option: options[option] for option in named})
    if name == "bench" and options["op"] in {module.split(".")[2] for module in MODULES.values()}:  # a family of ops
        assert not options["filter"], options
    elif name == "bench":
        assert (ROOT / "benchmarks" / f"bench_{options['op']}.py").exists(), options["op"]
        for dtype in (options["dtype"] or "fp32,bf16").split(","):
            chosen = options["filter"]
            assert dtype in DTYPES, dtype
            assert not chosen or any(chosen in row for row in rows(options["op"], dtype)), options


def rows(op: str, dtype: str) -> list[str]:
    """Returns the names that `--filter` searches."""
    assert op == "transformers", f"rows of {op} are not known here"
    from transformers_measure import Row
    from transformers_models import MODELS

    return [str(Row(model, dtype)) for model in MODELS]
