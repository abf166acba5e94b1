"""`make gpu`: everything that only a machine with a GPU can tell, in one run of at most eight minutes.

python benchmarks/gpu.py [PART,...] [--seconds 480] [--out FOLDER]

(With ``PYTHONPATH=.`` before it, where mmkernels is not installed.)

The parts (gpu_parts.py) run pytest, `mmkernels bench` and a few checks in processes of their own, so that one that
crashes, hangs or breaks the GPU's context loses nothing of the others. Results are written after each part to
``benchmarks/results/<device>/<date>.json`` (chosen parts alone: ``<date>-<parts>.json``); a short table comes last.

Exit code 0: all that ran is right, and every part had its turn. 1: a build, test, check or part failed. 2: there is no
GPU, or no such part. A missed target of speed is reported, and is no failure.
"""

from __future__ import annotations

import argparse
import datetime
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu_parts import FOLDER, ROOT, Part, Result, Turn, all_parts, describe

_SECONDS = 480.0
_RESERVE = 15.0  # for the start, the description of the machine and the table
_LEAST = 5.0  # below this a part is not begun
_WIDTH = 130  # columns of the table
_MOST_PROBLEMS = 8  # of a part in the table; the JSON has all


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description="Build, test and measure on a GPU.")
    parser.add_argument("parts", nargs="?", default="", help="comma-separated; default: all; help: list them")
    parser.add_argument("--seconds", type=float, default=_SECONDS, help="for everything together")
    parser.add_argument("--out", type=Path, help="folder for the JSON; default: benchmarks/results/<device>")
    parser.add_argument("--commit", default="", help="what to note as the commit, where there is no repository")
    options = parser.parse_args(arguments)
    if options.out is not None and options.out.exists() and not options.out.is_dir():
        parser.error(f"--out must be a folder, got the file {options.out}")
    known = all_parts()
    names = [name for name in re.split(r"[,\s]+", options.parts) if name]
    if names == ["help"]:
        print(_list_of(known))
        return 0
    wanted = {name: _named(name, known) for name in names}
    wrong = [name for name, parts in wanted.items() if not parts]
    if wrong:
        print(f"no part is called {', '.join(wrong)}; there are:\n{_list_of(known)}", file=sys.stderr)
        return 2
    chosen = [part for part in known if not names or any(part in parts for parts in wanted.values())]
    reason = gpu_why_not()
    if reason is not None:
        print(f"make gpu: nothing was run: {reason}. On a machine with a GPU it would run:\n{_list_of(chosen)}")
        return 2
    run = Run(chosen, options.out, commit=options.commit, whole=len(chosen) == len(known))
    try:
        run.all(options.seconds)
    except KeyboardInterrupt:
        print("make gpu: interrupted; the parts that ran are saved", file=sys.stderr)
        return 130  # as shells have it
    run.print_table()
    return run.code


def _named(name: str, known: Sequence[Part]) -> list[Part]:
    """Returns the part of this name, else all whose names contain it."""
    return [part for part in known if name == part.name] or [part for part in known if name in part.name]


def _list_of(chosen: Sequence[Part]) -> str:
    return "\n".join(f"  {part.name:<22} {part.about}" for part in chosen)


def gpu_why_not() -> str | None:
    """Returns why there is no GPU to use, or None; without starting one up."""
    try:
        import torch

        import mmkernels.report  # noqa: F401  # which the table at the end needs
    except ImportError as error:
        return f"{Path(sys.executable).name} can't run it ({error})"
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None and torch.version.hip is None:
        return f"there is no GPU that torch {torch.__version__} can use: it is a CPU build"
    return f"torch {torch.__version__} finds no GPU"


class Run:
    """One run of some parts.

    Args:
        out: folder; None: ``benchmarks/results/<device>``.
        commit: noted where the checkout does not have its own.
        whole: these are all parts.
    """

    def __init__(self, chosen: Sequence[Part], out: Path | None, *, commit: str = "", whole: bool = True) -> None:
        self.chosen, self._out, self._commit = list(chosen), out, commit
        self.parts: dict[str, Result] = {}
        self.report: dict[str, Any] = {
            "kind": "mmkernels gpu",
            "schema": 2,
            "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "parts": self.parts,
            "left_out": [],
        }
        names = [] if whole else [part.name.replace("_", "-") for part in chosen]
        self._name = "-".join([self.report["created"][:10], *names])

    def all(self, seconds: float) -> None:
        """Runs the parts within some seconds, and writes the results after each."""
        end = time.monotonic() + seconds - _RESERVE
        self._describe()
        self.report["gpu_at_the_start"] = self.report["machine"].get("gpu")  # its clocks
        for place, part in enumerate(self.chosen):
            allowed = allowance(self.chosen[place:], end - time.monotonic())
            if allowed < _LEAST:
                self.report["left_out"].append(part.name)
                continue
            print(f"== {part.name}: {part.about} (up to {allowed:.0f} s)", file=sys.stderr, flush=True)
            begin = time.monotonic()
            result = take_turn(part, allowed)
            self.parts[part.name] = result | {"seconds": round(time.monotonic() - begin, 1)}
            for problem in result.get("problems", ()):
                print(f"   FAILED {problem}", file=sys.stderr, flush=True)
            self.write()
        self._describe()
        self.write()

    def _describe(self) -> None:
        found = take_turn(Part("describe", "", 60.0, describe), 60.0)
        machine = found.get("machine") or {}
        machine["commit"] = machine.get("commit") or self._commit or None
        self.report |= {"device": found.get("device"), "slug": found.get("slug"), "machine": machine}

    @property
    def path(self) -> Path:
        """Of the file that is written."""
        return (self._out or FOLDER / "results" / (self.report["slug"] or "unknown-gpu")) / f"{self._name}.json"

    def write(self) -> None:
        """Writes the report as far as it goes."""
        from mmkernels.report import write_json

        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.report)

    @property
    def code(self) -> int:
        failed = any(result.get("problems") for result in self.parts.values())
        unchecked = any(self.parts.get(name, {}).get("left_out") for name in ("tests", "nan"))
        return int(failed or unchecked or bool(self.report["left_out"]))

    def print_table(self) -> None:
        """Prints a line for each part, what it says, and each target beside what was found."""
        from mmkernels.bench.tables import targets
        from mmkernels.report import console, table

        output = console(_WIDTH)
        output.print(f"\n{self.report['device'] or 'GPU'}, {self.report['created']}", markup=False)
        output.print(table(map(self._cells, self.chosen), ["part", "state", "found", "s"], texts=3))
        rows = [row for result in self.parts.values() for row in result.get("rows", ())]
        if rows:
            output.print(targets(rows))
        shown = self.path.relative_to(ROOT) if self.path.is_relative_to(ROOT) else self.path.name
        output.print(f"Written: {shown} (all numbers)", soft_wrap=True)

    def _cells(self, part: Part) -> list[Any]:
        from rich.text import Text

        result = self.parts.get(part.name)
        if result is None:
            return [part.name, "", "left out: the time was up", ""]
        problems, left_out = result.get("problems", ()), result.get("left_out", ())
        lines = [result.get("summary", ""), *result.get("lines", ())]
        lines += [f"FAILED {problem}" for problem in problems[:_MOST_PROBLEMS]]
        if left_out:
            lines.append(f"left out for time: {len(left_out)}, such as {left_out[0]}")
        found = Text("\n".join(filter(None, lines)))  # not as markup
        return [part.name, "FAILED" if problems else "ok", found, f"{result['seconds']:.0f}"]


def take_turn(part: Part, seconds: float) -> Result:
    """Returns a part's result; an error in it is a problem that it found."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            return dict(part.run(Turn(seconds, Path(folder))))
        except Exception as error:  # the other parts go on
            reason = next(iter(str(error).splitlines()), "")
            return {"problems": [f"{part.name}: {type(error).__name__}: {reason}"]}


def allowance(left: Sequence[Part], seconds: float) -> float:
    """Returns the seconds of the first of the parts that are left: all there is, by shares."""
    return max(0.0, seconds) * left[0].seconds / sum(part.seconds for part in left)


if __name__ == "__main__":
    sys.exit(main())
