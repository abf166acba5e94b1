"""What a profile of a transformers model says in other words: before and after `mmkernels.patch`."""

from __future__ import annotations

from typing import Any

from mmkernels.profiling.options import ORIGINAL, PATCHED
from mmkernels.profiling.pareto import drift_text
from mmkernels.report import MISSING, megabytes, milliseconds, plural, ratio

GAINS_LEGEND = "faster: time before the patch / time after it. memory: peak after the patch / before it."


def compares_patch(report: dict[str, Any]) -> bool:
    """Returns whether the rows are those of a transformers model before and after the patch."""
    return "class" in report["settings"]


def drift(cell: dict[str, Any]) -> list[str]:
    """Returns what stands in the last columns: the largest difference, and how many tokens are the same."""
    found = cell["drift"]
    if found is None:
        return ["-"] * 2 if cell["backend"] == ORIGINAL else [MISSING] * 2
    return [drift_text(found["max_abs"]) if found["max_abs"] else "0", f"{found['same_tokens']} of {found['tokens']}"]


def gained(report: dict[str, Any]) -> dict[str, str]:
    """Returns the times that are compared, with their titles."""
    total = report["total"]
    repeated = [stage for stage in report["stages"] if stage not in total["stages"]]
    shown = (
        {stage: stage for stage in total["stages"]} | {"total": total["name"]} | {stage: stage for stage in repeated}
    )
    return shown | {"train_step": "training step"} if report["settings"]["train"] else shown


def legend(report: dict[str, Any]) -> list[str]:
    """Returns what the columns are that other profiles have not, and what could not be found."""
    lines = [
        f"visual tokens: {report['about_tokens']}.",
        f"side: {report['about_sides']}.",
        "drift: the largest difference of the scores from those before the patch, of each generated token up to the "
        "first that differs; same tokens: how many first ones do not.",
    ]
    lines += [f"Found: {what}: {module}." for what, module in report["parts"].items()]
    lines += [f"Not found: {line}." for line in report["not_found"]]
    return [*lines, *report["notes"], *replaced(report)]


def replaced(report: dict[str, Any]) -> list[str]:
    """Returns what the patch replaced and what it left, in lines."""
    if report["patch_why_not"]:
        return [f"Not patched: {report['patch_why_not']}."]
    patched, left = dict[tuple[str, str], list[str]](), dict[tuple[str, str], list[str]]()
    for rows, found, why in ((report["replaced"], patched, "op"), (report["left"], left, "why")):
        for row in rows:
            found.setdefault((row["what"], row[why]), []).append(f"{row['count']} {row['module']}")
    lines = [f"Patched: {what} ({op}) of {', '.join(modules)}." for (what, op), modules in patched.items()]
    return [*lines, *(f"Left: {what} of {', '.join(modules)}: {why}." for (what, why), modules in left.items())]


def summary(report: dict[str, Any]) -> str:
    """Returns one sentence: what the largest row costs, and what the patch changes."""
    cells = [cell for cell in report["cells"] if "total" in cell["seconds"]]
    if not cells:
        fitted = any(cell["failed"] is None for cell in report["cells"])
        return "Not all times were measured." if fitted else "Nothing fitted into memory."
    last = cells[-1]
    total = report["total"]["name"]
    when = "after" if last["backend"] == PATCHED else "before"
    parts = [
        f"{plural(last['tokens_per_image'], 'visual token')}, {when} the patch: {total} in "
        f"{milliseconds(last['seconds']['total'])} ms, then "
        f"{milliseconds(last['seconds']['decode'])} ms a token, {megabytes(last['peak_memory_bytes'])} MB"
    ]
    gains = last["amdahl"]
    if "total" in gains:
        parts.append(f"{ratio(gains['total']['speedup'])} as fast as before to the {total}")
    if "train_step" in gains:
        parts.append(f"{ratio(gains['train_step']['speedup'])} as fast in a training step")
    if last["drift"]:
        parts.append(f"{last['drift']['same_tokens']} of {last['drift']['tokens']} first tokens the same")
    slope = report["marginal_seconds_per_visual_token"].get(last["backend"], {}).get("total", 0.0)
    if slope > 0:  # else less than the noise
        parts.append(f"a visual token costs {slope * 1e6:.3g} us until the {total}")
    return "; ".join(parts) + "."
