"""`make gpu`: everything that only a machine with a GPU can tell, in one run of at most eight minutes.

python benchmarks/gpu.py [PART,...] [--seconds 480] [--out FOLDER]

Each part runs in a process of its own (gpu_parts.py), so that one that crashes, hangs or poisons the GPU's context
loses nothing of the others. Results are written after each part to
``benchmarks/results/<device>/<date>.json`` (chosen parts alone: ``<date>-<parts>.json``); a short table comes last.

Exit code 0: all that ran is right, and every part had its turn. 1: a build, test, check or part failed. 2: there is no
GPU, or no such part. A missed target of speed is reported, and is no failure.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent

Result = dict[str, Any]
"""What a part found: "summary", a line for people; "problems", each a failure; "left_out", for want of time; "targets",
each with "what", "than", "least" and "found"; and figures of its own."""


@dataclass(frozen=True)
class Part:
    """Args:
    name: what PART= takes.
    about: for people.
    seconds: its share of the time; what it does not use goes to the parts after it.
    """

    name: str
    about: str
    seconds: float


_BENCH_SECONDS = {"cross_attention": 200.0}
_ALIASES = {"attention": "cross_attention", "received": "attention_received", "weights": "attention_weights",
            "merge": "merge_attention"}  # fmt: skip
_SECONDS = 480.0
_STDERR = 2  # where the parts' own output goes
_RESERVE = 15.0  # for the start, the description of the machine and the table
_LEAST = 5.0  # below this a part is not begun
_GRACE = 15.0  # beyond its time, for a part to notice


def parts() -> list[Part]:
    """All of them, in the order in which they run; an op's bench file is a part."""
    found = (path.stem.removeprefix("bench_") for path in FOLDER.glob("bench_*.py"))
    ops = sorted(op for op in found if (ROOT / "mmkernels" / "ops" / op).is_dir())
    ops.sort(key=lambda op: -_BENCH_SECONDS.get(op, 0.0))
    return [
        Part("build", "the extensions, in place, against the torch that is there", 50),
        Part("ceilings", "what the GPU gives at best: copy, bfloat16 matrix product", 12),
        Part("tests", "every test marked gpu", 90),
        Part("nan", "forward and backward on lengths with L % 128 == 64, every kind of mask", 35),
        *(Part(op, f"bench_{op}.py with its peers on a GPU", _BENCH_SECONDS.get(op, 10.0)) for op in ops),
        Part("flamingo", "Flamingo base, 5 images: prefill and training step beside the Amdahl cap", 40),
        Part("host", "CPU time of a call, eager and compiled, beside SDPA and FlexAttention", 35),
        Part("ncu", "occupancy and tensor-pipe use of each main kernel, where Nsight Compute is", 25),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Answers the exit code."""
    options = _parse(arguments)
    known = {part.name: part for part in parts()}
    names = [_ALIASES.get(name, name) for name in re.split(r"[,\s]+", options.parts) if name]
    if names == ["help"]:
        print(_list_of(list(known.values())))
        return 0
    wrong = [name for name in names if name not in known]
    if wrong:
        print(f"no part is called {', '.join(wrong)}; there are:\n{_list_of(list(known.values()))}", file=sys.stderr)
        return 2
    chosen = [part for part in known.values() if not names or part.name in names]
    reason = gpu_why_not()
    if reason is not None:
        print(f"make gpu: nothing was run: {reason}. On a machine with a GPU it would run:\n{_list_of(chosen)}")
        return 2
    run = Run(chosen, options.seconds, Path(options.out) if options.out else None, child, commit=options.commit)
    run.all()
    print(run.table())
    return run.code


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Build, test and measure on a GPU.")
    parser.add_argument("parts", nargs="?", default="", help="comma-separated; default: all; help: list them")
    parser.add_argument("--seconds", type=float, default=_SECONDS, help="for everything together")
    parser.add_argument("--out", default="", help="folder for the JSON; default: benchmarks/results/<device>")
    parser.add_argument("--commit", default="", help="what to note as the commit, where there is no repository")
    return parser.parse_args(arguments)


def _list_of(chosen: Sequence[Part]) -> str:
    names = {full: f" ({short})" for short, full in _ALIASES.items()}
    return "\n".join(f"  {part.name + names.get(part.name, ''):<30} {part.about}" for part in chosen)


def gpu_why_not() -> str | None:
    """Why there is no GPU to use, or None; without starting one up."""
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
        run_part: takes a part's name and its seconds, answers its result.
        commit: noted where the checkout does not know its own.
    """

    def __init__(
        self,
        chosen: Sequence[Part],
        seconds: float,
        out: Path | None,
        run_part: Callable[[str, float], Result],
        *,
        commit: str = "",
    ) -> None:
        self.chosen, self.out, self._run_part, self._commit = list(chosen), out, run_part, commit
        self._end = time.monotonic() + max(0.0, seconds - _RESERVE)
        self.whole = len(chosen) == len(parts())
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
            result = self._run_part(part.name, seconds)
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
        found = self._run_part("describe", 60.0)
        if not again or "machine" not in self.report:
            self.report |= {name: found.get(name) for name in ("device", "slug", "machine")}
            machine = self.report["machine"]
            if machine is not None and machine.get("commit") is None:
                machine["commit"] = self._commit or None
        if again:
            self.report["gpu_at_the_end"] = (found.get("machine") or {}).get("gpu")

    def write(self) -> None:
        if "machine" not in self.report and self.out is None:
            return  # it is described after the first part
        folder = self.out or FOLDER / "results" / (self.report["slug"] or "unknown-gpu")
        folder.mkdir(parents=True, exist_ok=True)
        date = self.report["created"][:10]
        names = "" if self.whole else "-" + "-".join(part.name.replace("_", "-") for part in self.chosen)
        self.path = folder / f"{date}{names}.json"
        self.path.write_text(json.dumps(self.report, indent=1) + "\n")

    @property
    def code(self) -> int:
        parts = self.report["parts"]
        failed = any(result.get("problems") for result in parts.values())
        unchecked = any(parts.get(name, {}).get("left_out") for name in ("tests", "nan"))
        return int(failed or unchecked or bool(self.report["left_out"]))

    def table(self) -> str:
        """The short table: a line for each part, then each target beside its figure."""
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
            lines += [_target(target) for target in targets]
        if self.path is not None:
            shown = self.path.relative_to(ROOT) if self.path.is_relative_to(ROOT) else self.path.name
            lines.append(f"Written: {shown} (all numbers)")
        return "\n".join(lines)


def _target(target: dict[str, Any]) -> str:
    found = target["found"]
    shown = "n/a" if found is None else f"{found:,.0f}" if found >= 100 else f"{found:.2f}"
    at_most = "most" in target
    bound = target["most"] if at_most else target["least"]
    limit = ("<= " if at_most else "") + (f"{bound:,.0f}" if bound >= 100 else f"{bound:.2f}")
    reached = found is not None and (found <= bound if at_most else found >= bound)
    verdict = "" if found is None else "met" if reached else "missed"
    return f"  {target['what']:<58} {target['than']:<10} {limit:>7} {shown:>7} {verdict}"


def allowance(left: Sequence[Part], seconds: float) -> float:
    """Seconds of the first of the parts that are left: all there is, by shares."""
    return max(0.0, seconds) * left[0].seconds / sum(part.seconds for part in left)


def child(name: str, seconds: float) -> Result:
    """Run a part in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [sys.executable, str(FOLDER / "gpu_parts.py"), name, "--seconds", f"{seconds:.1f}", "--out", str(out)]
        code = run_command(command, seconds + _GRACE)
        result: Result = json.loads(out.read_text()) if out.exists() else {}
    if code is None:
        result.setdefault("problems", []).append(f"{name}: cut off after {seconds + _GRACE:.0f} s")
    elif code != 0:
        result.setdefault("problems", []).append(f"{name}: ended with exit code {code}, see above")
    return result


def run_command(command: Sequence[str], seconds: float) -> int | None:
    """The exit code; None: it took longer, and was ended with all that it had started. Its output goes to stderr."""
    paths = [str(ROOT), str(FOLDER), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=_STDERR, start_new_session=True) as process:
        try:
            return process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
