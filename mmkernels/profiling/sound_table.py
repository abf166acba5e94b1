"""What a profile of sound says in other words than one of images: columns, legend, and the last sentence."""

from __future__ import annotations

from typing import Any

from mmkernels.profiling.options import name_of
from mmkernels.profiling.pareto import drift_of, drift_text
from mmkernels.report import milliseconds, ratio

TITLES = ("s", "by", "tokens")
"""The columns that say what a row is about."""


def begin(cell: dict[str, Any]) -> list[str]:
    """Returns what stands in a cell's row below `TITLES`."""
    return [f"{cell['sound_seconds']:g}", f"{cell['pool']}", f"{cell['tokens']:,}"]


def part_of(report: dict[str, Any]) -> str:
    """Such as "the first 5, 10 and 30 s of speech.wav"."""
    times = [f"{seconds:g}" for seconds in report["settings"]["seconds"]]
    listed = f"{', '.join(times[:-1])} and {times[-1]}" if len(times) > 1 else times[0]
    return f"the first {listed} s of {report['sound']['name']}"


def legend(report: dict[str, Any], baseline: str) -> list[str]:
    """Returns what the columns are that other profiles have not.

    Args:
        baseline: from whose outputs drift is measured.
    """
    pooled = any(pool > 1 for pool in report["settings"]["pool"])
    alone = "s: seconds of sound, without the silence that fills them up to 30 s in transformers."
    lines = [
        alone if report["padded_elsewhere"] else "s: seconds of sound.",
        "by: so many neighbouring features become one token, their mean.",
        f"tokens: {report['about_tokens']}.",
    ]
    about = "relative L2 distance of all logits from those of the same sound that is not pooled" if pooled else (
        "relative L2 distance of all logits"
    )  # fmt: skip
    lines.append(f"drift: {about}, {baseline}.")
    return lines


def summary(report: dict[str, Any]) -> str:
    """Returns one sentence: what the longest sound costs, and how time grows with the sound and with pooling."""
    backends = report["settings"]["backends"]
    rows = [cell for cell in report["cells"] if "total" in cell["seconds"]]
    backend = next((name for name in backends if any(cell["backend"] == name for cell in rows)), None)
    if backend is None:
        fitted = any(cell["failed"] is None for cell in report["cells"])
        return "Not all times were measured." if fitted else "Nothing fitted into memory."
    cells = [cell for cell in rows if cell["backend"] == backend]
    whole = [cell for cell in cells if cell["pool"] == 1]
    last, total = whole[-1], report["total"]["name"]
    parts = [
        f"{name_of(backend)}, {last['sound_seconds']:g} s of sound in {last['tokens']:,} tokens: {total} after "
        f"{milliseconds(last['seconds']['total'])} ms, then {milliseconds(last['seconds']['decode'])} ms a token"
    ]
    if "total" in last["amdahl"]:
        parts.append(f"{ratio(last['amdahl']['total']['speedup'])} as fast as naive")
    slope = report["seconds_per_second_of_sound"].get(backend, 0.0)
    if slope > 0:  # else less than the noise
        parts.append(f"a second of sound costs {milliseconds(slope)} ms until the {total}")
    for cell in cells:
        if cell["sound_seconds"] == last["sound_seconds"] and cell["pool"] > 1:
            faster = last["seconds"]["total"] / cell["seconds"]["total"]
            step = last["seconds"]["decode"] / cell["seconds"]["decode"]
            found = drift_of(cell)
            drift = "" if found is None else f", drift {drift_text(found[0])}"
            parts.append(f"pooled by {cell['pool']} {ratio(faster)} as fast, {ratio(step)} a token{drift}")
    return "; ".join(parts) + "."
