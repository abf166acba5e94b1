"""`make gpu`: everything that only a machine with a GPU can tell, in one run of at most eight minutes.

python benchmarks/gpu.py [PART,...] [--seconds 480] [--out FOLDER]

The parts (gpu_parts.py) run pytest, `mmkernels bench` and a few checks in processes of their own, so that one that
crashes, hangs or breaks the GPU's context loses nothing of the others. Results are written after each part to
``benchmarks/results/<device>/<date>.json`` (chosen parts alone: ``<date>-<parts>.json``); a short table comes last.

Exit code 0: all that ran is right, and every part had its turn. 1: a build, test, check or part failed. 2: there is no
GPU, or no such part. A missed target of speed is reported, and is no failure.
"""

from __future__ import annotations

import argparse
import datetime
import json
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description="Build, test and measure on a GPU.")
    parser.add_argument("parts", nargs="?", default="", help="comma-separated; default: all; help: list them")
    parser.add_argument("--seconds", type=float, default=_SECONDS, help="for everything together")
    parser.add_argument("--out", type=Path, help="folder for the JSON; default: benchmarks/results/<device>")
    parser.add_argument("--commit", default="", help="what to note as the commit, where there is no repository")
    options = parser.parse_args(arguments)
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
    run = Run(chosen, options.seconds, options.out, commit=options.commit, whole=len(chosen) == len(known))
    run.all()
    print(run.table())
    return run.code


def _named(name: str, known: Sequence[Part]) -> list[Part]:
    """Returns the part of this name, else all whose names contain it."""
    return [part for part in known if name == part.name] or [part for part in known if name in part.name]


def _list_of(chosen: Sequence[Part]) -> str:
    lines = [f"  {part.name:<22} {part.about}" for part in chosen]
    return "\n".join(lines)


def gpu_why_not() -> str | None:
    """Returns why there is no GPU to use, or None; without starting one up."""
    try:
        import torch
    except ImportError as error:
        return f"{Path(sys.executable).name} has no torch ({error})"
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None and torch.version.hip is None:
        return f"there is no GPU that torch {torch.__version__} can use: it is a CPU build"
    return f"torch {torch.__version__} finds no GPU"


class Run:
    """One run of some parts.

    Args:
        seconds: for all of them.
        out: folder; None: ``benchmarks/results/<device>``.
        commit: noted where the checkout does not know its own.
        whole: these are all parts.
        describe: returns "device", "slug" and "machine".
    """

    def __init__(self, chosen: Sequence[Part], seconds: float, out: Path | None, *, commit: str = "",
                 whole: bool = True, describe: Any = describe) -> None:  # fmt: skip
        self.chosen, self.out, self._commit, self._whole, self._machine = list(chosen), out, commit, whole, describe
        self._end = time.monotonic() + max(0.0, seconds - _RESERVE)
        self.report: dict[str, Any] = {
            "kind": "mmkernels gpu",
            "schema": 1,
            "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "parts": {},
            "left_out": [],
        }
        self.path: Path | None = None

    def all(self) -> None:
        """Run the parts, and write what is known after each."""
        for place, part in enumerate(self.chosen):
            seconds = allowance(self.chosen[place:], self._end - time.monotonic())
            if seconds < _LEAST:
                self.report["left_out"].append(part.name)
                continue
            print(f"== {part.name}: {part.about} (up to {seconds:.0f} s)", file=sys.stderr, flush=True)
            begin = time.monotonic()
            result = take_turn(part, seconds)
            result["seconds"] = round(time.monotonic() - begin, 1)
            self.report["parts"][part.name] = result
            for problem in result.get("problems", ()):
                print(f"   FAILED {problem}", file=sys.stderr, flush=True)
            if "machine" not in self.report and part.name != "build":
                self._describe()
            self.write()
        self._describe(again=True)
        self.write()

    def _describe(self, again: bool = False) -> None:
        """The machine, with the clocks early in the run, and once more at its end."""
        found = take_turn(Part("describe", "", 60.0, self._machine), 60.0)
        if not again or "machine" not in self.report:
            self.report |= {name: found.get(name) for name in ("device", "slug", "machine")}
            machine = self.report["machine"]
            if machine is not None and machine.get("commit") is None:
                machine["commit"] = self._commit or None
        if again:
            self.report["gpu_at_the_end"] = (found.get("machine") or {}).get("gpu")

    def write(self) -> None:
        """Write the report as far as it goes."""
        if "machine" not in self.report and self.out is None:
            return  # it is described after the first part
        folder = self.out or FOLDER / "results" / (self.report["slug"] or "unknown-gpu")
        folder.mkdir(parents=True, exist_ok=True)
        names = "" if self._whole else "-" + "-".join(part.name.replace("_", "-") for part in self.chosen)
        self.path = folder / f"{self.report['created'][:10]}{names}.json"
        self.path.write_text(json.dumps(self.report, indent=1) + "\n")

    @property
    def code(self) -> int:
        results = self.report["parts"]
        failed = any(result.get("problems") for result in results.values())
        unchecked = any(results.get(name, {}).get("left_out") for name in ("tests", "nan"))
        return int(failed or unchecked or bool(self.report["left_out"]))

    def table(self) -> str:
        """Returns the short table: a line for each part, then each target beside its figure."""
        lines = [f"\n{self.report.get('device') or 'GPU'}, {self.report['created']}"]
        for part in self.chosen:
            result = self.report["parts"].get(part.name)
            if result is None:
                lines.append(f"  {part.name:<20}      left out: the time was up")
                continue
            state = "FAILED" if result.get("problems") else "ok"
            lines.append(f"  {part.name:<20} {result['seconds']:4.0f} s  {state:<6} {result.get('summary', '')}")
            lines += [f"      {line}" for line in result.get("lines", ())]
            lines += [f"      FAILED {problem}" for problem in result.get("problems", ())][:8]
            left_out = result.get("left_out", ())
            if left_out:
                lines.append(f"      left out for time: {len(left_out)}, such as {left_out[0]}")
        targets = [target for result in self.report["parts"].values() for target in result.get("targets", ())]
        if targets:
            lines.append(f"  {'target':<58} {'than':<10} {'target':>7} {'found':>7}")
            lines += map(target_line, targets)
        if self.path is not None:
            shown = self.path.relative_to(ROOT) if self.path.is_relative_to(ROOT) else self.path.name
            lines.append(f"Written: {shown} (all numbers)")
        return "\n".join(lines)


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


def target_line(target: dict[str, Any]) -> str:
    """Returns the line of the table for a target."""
    found, at_most = target["found"], "most" in target
    bound = target["most"] if at_most else target["least"]
    reached = found is not None and (found <= bound if at_most else found >= bound)
    shown = "n/a" if found is None else _number(found)
    limit = ("<= " if at_most else "") + _number(bound)
    verdict = "" if found is None else "met" if reached else "missed"
    return f"  {target['what']:<58} {target['than']:<10} {limit:>7} {shown:>7} {verdict}"


def _number(x: float) -> str:
    return f"{x:,.0f}" if x >= 100 else f"{x:.2f}"


if __name__ == "__main__":
    sys.exit(main())
