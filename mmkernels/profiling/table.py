"""A profile as text: two tables and one sentence, at most 100 columns wide."""

from __future__ import annotations

import statistics
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from mmkernels import report as writer
from mmkernels.meters import Timing
from mmkernels.profiling.options import name_of
from mmkernels.report import MISSING, megabytes, microseconds, milliseconds, plural, ratio

_UNSTEADY = 0.1
"""Above this spread, as a share, the table warns."""

_GAINS_LEGEND = (
    "faster: naive time / this backend's time. at most: naive time / time with every op removed (the Amdahl cap); "
    "then the share of the cap that is reached. memory: this backend's peak / naive peak."
)


def render(report: dict[str, Any]) -> RenderableType:
    """Returns the whole profile but its last sentence."""
    parts: list[RenderableType] = [_heading(report), _measurements(report), Text(_legend(report), style="dim")]
    parts += [Text(warning, style="red") for warning in warnings(report)]
    if any(cell["amdahl"] for cell in report["cells"]):
        parts += [Text(), _gains(report), Text(_GAINS_LEGEND, style="dim")]
    return Group(*parts)


def warnings(report: dict[str, Any]) -> list[str]:
    """Returns what a reader of the table or of the picture must know: that times vary, or that some are missing."""
    lines = []
    unsteady = _unsteadiness(report)
    if unsteady > _UNSTEADY:
        lines.append(f"Unsteady: repeated times differ by {unsteady:.0%} and more. Is the machine busy?")
    measured = {cell["tokens_per_image"] for cell in report["cells"]}
    missing = [f"{tokens:,}" for tokens in report["settings"]["tokens"] if tokens not in measured]
    if missing:
        lines.append(f"Interrupted: {' and '.join(missing)} tokens per image were not measured.")
    return lines


def _unsteadiness(report: dict[str, Any]) -> float:
    """Returns the median of the stages' spreads: half of the repeated times lie further apart, as a share."""
    samples = [times for cell in report["cells"] for times in cell["samples_seconds"].values()]
    return statistics.median([Timing(tuple(times)).spread for times in samples] or [0.0])


def _heading(report: dict[str, Any]) -> Text:
    s, threads = report["settings"], report["machine"]["torch_threads"]
    text = Text()
    text.append(f"{s['model']} {s['size']}", style="bold")
    text.append(
        f", {s['dtype']}, random weights; {crops_of(s)}, {s['text_length']:,} text tokens\n"
        f"{report['device']}, torch {report['machine']['versions']['torch']}, "
        f"{plural(threads, 'thread')}\n"
    )
    return text


def _measurements(report: dict[str, Any]) -> Table:
    total, train = report["total"], report["settings"]["train"]
    repeated = [stage for stage in report["stages"] if stage not in total["stages"]]
    times = (
        {stage: stage for stage in total["stages"]} | {"total": total["name"]} | {stage: stage for stage in repeated}
    )
    memories = {"peak_memory_bytes": "memory"}
    if train:
        times["train_step"] = "train"
        memories["train_peak_memory_bytes"] = "train"
    numbers = [
        Column(f"{title}\n{unit}", justify="right", style="bold" if name in ("total", "peak_memory_bytes") else "")
        for unit, columns in (("ms", times), ("MB", memories))
        for name, title in columns.items()
    ]
    table = writer.table((), [*_columns(), *numbers, Column("drift", justify="right")])
    for cell in report["cells"]:
        row = [tokens(report, cell), name_of(cell["backend"])]
        if cell["failed"]:
            row.append(cell["failed"])
        else:
            row += [milliseconds(cell["seconds"].get(name)) for name in times]
            row += [megabytes(cell[name]) for name in memories]
            row.append(_drift(cell))
        table.add_row(*row, end_section=cell["backend"] == report["settings"]["backends"][-1])
    return table


def _gains(report: dict[str, Any]) -> Table:
    last = report["total"]["stages"][-1]
    shown = {last: last, "total": report["total"]["name"], "train_step": "training step"}
    shown = {name: title for name, title in shown.items() if any(name in cell["amdahl"] for cell in report["cells"])}
    memories = {"peak_memory_bytes": "memory"}
    if report["settings"]["train"]:
        memories["train_peak_memory_bytes"] = "train\nmemory"
    rows = [
        [
            tokens(report, cell),
            name_of(cell["backend"]),
            *(_gain(cell["amdahl"].get(name)) for name in shown),
            *(ratio(memory_ratio(report, cell, name)) for name in memories),
        ]
        for cell in report["cells"]
        if cell["amdahl"]
    ]
    titles = [*(f"{title}\nfaster, of at most" for title in shown.values()), *memories.values()]
    return writer.table(rows, [*_columns(), *(Column(title, justify="right") for title in titles)])


def _columns() -> list[Column]:
    return [Column("visual\ntokens", justify="right"), Column("backend")]


def _gain(bound: dict[str, float] | None) -> str:
    if bound is None:
        return MISSING
    return f"{bound['speedup']:.2f}x of {bound['cap']:.2f}x {bound['share_of_cap']:4.0%}"


def _legend(report: dict[str, Any]) -> str:
    lines = [f"{stage}: {about}." for stage, about in report["stages"].items()]
    lines.append(f"{report['total']['name']}: {' + '.join(report['total']['stages'])}.")
    memory = report["memory_why_not"] or "measured peak above weights and inputs, over all stages"
    lines.append(f"memory: {memory}.")
    if any(cell["drift"] for cell in report["cells"]):
        wide = any("relative_l2_to_fp32" in (cell["drift"] or {}) for cell in report["cells"])
        lines.append(
            f"drift: relative L2 distance of all logits from {'naive float32' if wide else 'naive'}'s, "
            "and how many next tokens agree where not all do."
        )
    return "\n".join(lines)


def _drift(cell: dict[str, Any]) -> str:
    drift = cell["drift"]
    if drift is None:
        return MISSING
    if "relative_l2_to_fp32" in drift:
        distance, agreement = drift["relative_l2_to_fp32"], drift["top1_agreement_with_fp32"]
    elif cell["backend"] == "reference":
        return "-"
    else:
        distance, agreement = drift["relative_l2"], drift["top1_agreement"]
    return f"{distance:.0e}" + (f" {agreement:.1%}" if agreement < 1 else "")


def summary(report: dict[str, Any]) -> str:
    """Returns one sentence: what the largest profile shows."""
    cells = {cell["backend"]: cell for cell in report["cells"] if cell["failed"] is None}  # the last of each stays
    if not cells:
        return "Nothing fitted into memory."
    cell = cells.get("fused", next(iter(cells.values())))
    per_image = f"{cell['tokens_per_image']:,} tokens x {plural(report['settings']['images'], 'image')}"
    parts = []
    last = report["total"]["stages"][-1]
    for name, title in ((last, last), ("train_step", "training step")):
        if name in cell["amdahl"]:
            parts.append(f"{title} {compared(cell['amdahl'][name]['speedup'])}")
        elif name in cell["seconds"]:
            parts.append(f"{title} {milliseconds(cell['seconds'][name])} ms")
    memory = memory_ratio(report, cell)
    if memory is not None:
        parts.append(f"peak memory {ratio(memory)}")
    elif cell["peak_memory_bytes"] is not None:
        parts.append(f"peak memory {megabytes(cell['peak_memory_bytes'])} MB")
    beside = "against the naive baseline " if cell["amdahl"] else ""
    return f"{per_image}: {beside}{', '.join(parts)}{_cost_of_a_token(report, cell['backend'])}."


def _cost_of_a_token(report: dict[str, Any], backend: str) -> str:
    slopes = report["marginal_seconds_per_visual_token"]
    if backend not in slopes:
        return ""
    slope, last = slopes[backend], report["total"]["stages"][-1]
    if slope[last] <= 0:  # less than the noise
        return ""
    text = f"; a visual token costs {microseconds(slope[last])} of {last}"
    naive = slopes.get("reference") if backend != "reference" else None
    if naive:
        text += f" (naive {microseconds(naive[last])})"
    text += f" and {microseconds(slope['total'])} until the {report['total']['name']}"
    return text + (f" ({microseconds(naive['total'])})" if naive else "")


def memory_ratio(report: dict[str, Any], cell: dict[str, Any], name: str = "peak_memory_bytes") -> float | None:
    """Returns peak memory over the naive baseline's at the same number of tokens; None where either wasn't measured."""
    for other in report["cells"]:
        same = other["backend"] == "reference" and other["tokens_per_image"] == cell["tokens_per_image"]
        if same and other is not cell and other[name] and cell[name] is not None:
            return cell[name] / other[name]
    return None


def crops_of(settings: dict[str, Any]) -> str:
    return f"{plural(settings['images'], 'crop')} of {settings['image']}"


def tokens(report: dict[str, Any], cell: dict[str, Any]) -> str:
    return f"{report['settings']['images']} x {cell['tokens_per_image']:,}"


def compared(speedup: float) -> str:
    """Such as "1.9x faster"; a difference below the noise of a measurement is none."""
    if abs(speedup - 1) < 0.05:
        return "as fast"
    return f"{max(speedup, 1 / speedup):.1f}x {'faster' if speedup > 1 else 'slower'}"
