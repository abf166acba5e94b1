"""Ctrl-C and SIGTERM: every command says so in one line, keeps what it has measured, and exits as shells expect.

``mmkernels bench`` is tested in test_bench_command.py.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mmkernels import cli
from mmkernels.interrupts import Interrupted, ends_well, interruptible

CODE = """
import os, runpy, signal, sys
import torch  # once for all of them
from mmkernels import cli, doctor, machine
from mmkernels.aot import launches
from mmkernels.integrations.transformers import support_table
from mmkernels.planning import command as planning
from mmkernels.profiling import profiler, timing

torch.set_num_threads(1)
timing._BUDGET = 0.0
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
number = getattr(signal, sys.argv[1])


def waits(module, name, at=0):
    '''The call number `at` of a function gets the signal, and would wait for a minute.'''
    function, calls = getattr(module, name), []

    def run(*args):
        calls.append(args)
        if len(calls) <= at:
            return function(*args)
        os.kill(os.getpid(), number)
        signal.pause()

    setattr(module, name, run)


TINY = "profile flamingo --size tiny --images 1 --text-length 8 --device cpu --backend chunked --tokens 4,8 --out "
COMMANDS = {
    "doctor": ("doctor", machine, "versions", 0),
    "support": ("support vilt siglip", support_table, "check", 1),
    "support at once": ("support vilt", support_table, "check", 0),
    "profile": (TINY + "some", profiler, "measure_rows", 1),
    "profile at once": (TINY + "none", profiler, "measure_rows", 0),
    "plan": ("plan contrastive --device h200 --out plan.json", planning, "quick_check", 0),
    "aot": ("--frontend", launches, "entries", 0),
}
for name in sys.argv[2:]:
    words, *where = COMMANDS[name]
    sys.stdout.flush()
    if not (child := os.fork()):
        out = os.open(f"{name}.out", os.O_CREAT | os.O_WRONLY)
        err = os.open(f"{name}.err", os.O_CREAT | os.O_WRONLY)
        os.dup2(out, 1), os.dup2(err, 2)
        sys.argv = ["mmkernels", *words.split()]
        waits(*where)
        cli.main() if name != "aot" else runpy.run_module("mmkernels.aot", run_name="__main__")
        os._exit(99)
    print(name, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), sep=": ")
"""
KEPT = {
    "doctor": "",
    "support": "; 1 of 2 families were checked",
    "support at once": "; 0 of 1 families were checked",
    "profile": "; what is above is saved",
    "profile at once": "; nothing was measured yet",
    "plan": "; the plan above is kept",
    "aot": "; what was compiled is kept",
}


def interrupted(folder: Path, number: str, code: int, *names: str) -> None:
    """Checks how the commands of these names end, with the signal of a name."""
    ended = subprocess.run([sys.executable, "-c", CODE, number, *names], cwd=folder, capture_output=True, text=True)
    assert ended.stdout.splitlines() == [f"{name}: {code}" for name in names], ended.stderr
    for name in names:
        program = "mmkernels.aot" if name == "aot" else "mmkernels"
        lines = (folder / f"{name}.err").read_text().splitlines()
        assert lines[-1] == f"{program}: interrupted{KEPT[name]}"
        assert all(line.startswith("[") for line in lines[:-1])  # progress


def test_sigterm_ends_a_command_as_ctrl_c_does(tmp_path: Path) -> None:
    interrupted(tmp_path, "SIGTERM", 143, "doctor", "aot")


def test_every_command_says_so_and_keeps_what_it_measured(tmp_path: Path) -> None:
    interrupted(tmp_path, "SIGINT", 130, *KEPT)
    report = json.loads((tmp_path / "some" / "profile.json").read_text())
    assert [cell["tokens_per_image"] for cell in report["cells"]] == [4]
    assert (tmp_path / "some" / "profile.png").exists() and not list((tmp_path / "none").iterdir())
    assert "Interrupted: 8 tokens per image were not measured." in (tmp_path / "profile.out").read_text()
    table = (tmp_path / "support.out").read_text()
    assert "vilt" in table and "siglip" not in table
    assert len(json.loads((tmp_path / "plan.json").read_text())["rows"]) == 6
    assert "1,048,576" in (tmp_path / "plan.out").read_text()
    assert not any((tmp_path / f"{name}.out").read_text() for name in ("support at once", "profile at once", "aot"))


def test_every_command_is_covered() -> None:
    app = cli._app()
    names = {command.callback.__name__ for command in app.registered_commands if command.callback}
    names |= {group.name for group in app.registered_groups if group.name}
    assert names - {"bench"} == {name.split()[0] for name in KEPT} - {"aot"}


def test_the_line_and_the_code(capsys: pytest.CaptureFixture[str]) -> None:
    for error, said in (
        (KeyboardInterrupt(), "x: interrupted; all rows are kept"),
        (Interrupted(), "x: interrupted; all rows are kept"),
        (Interrupted("two rows are kept"), "x: interrupted; two rows are kept"),
    ):
        with pytest.raises(SystemExit) as end, ends_well("x", "all rows are kept"):
            raise error
        assert end.value.code == 130 and capsys.readouterr().err == f"{said}\n"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_handler_of_the_caller_stays() -> None:
    handler = lambda number, frame: None
    before = signal.signal(signal.SIGTERM, handler)
    try:
        with ends_well("x"):
            assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_command_keeps_its_signature() -> None:
    @interruptible
    def command(rows: int = 3) -> int:
        """Counts."""
        if rows < 0:
            raise KeyboardInterrupt
        return rows

    assert (command(), command(rows=4), command.__doc__, command.__name__) == (3, 4, "Counts.", "command")
    with pytest.raises(Interrupted):
        command(-1)
