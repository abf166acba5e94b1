"""A profile as text: two tables and one sentence, at most 100 columns wide."""

from __future__ import annotations

import statistics
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from mmkernels.meters import Timing

WIDTH = 100
"""Columns where the output is no terminal."""

_UNSTEADY = 0.1
"""Above this spread, as a share, the table warns."""

_NAMES = {"reference": "naive"}


def name_of(backend: str) -> str:
    """What people read for a backend: "reference" is the naive baseline."""
    return _NAMES.get(backend, backend)


def console(width: int = WIDTH) -> Console:
    """For results, on standard output: as wide as the terminal, else `width`."""
    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=width)


def render(report: dict[str, Any]) -> RenderableType:
    """The whole profile but its last sentence."""
    parts: list[RenderableType] = [_heading(report), _measurements(report), Text(_legend(report), style="dim")]
    unsteady = _unsteadiness(report)
    if unsteady > _UNSTEADY:
        parts.append(
            Text(f"Unsteady: repeated times differ by {unsteady:.0%} and more. Is the machine busy?", style="red")
        )
    if any(cell["amdahl"] for cell in report["cells"]):
        parts += [Text(), _gains(report), Text(_GAINS_LEGEND, style="dim")]
    return Group(*parts)


def _unsteadiness(report: dict[str, Any]) -> float:
    """Half of all stages' repeated times lie further apart than this, as a share of their median."""
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
    table = _new_table()
    train = report["settings"]["train"]
    total = report["total"]
    for stage in total["stages"]:
        table.add_column(f"{stage}\nms", justify="right")
    table.add_column(f"{total['name']}\nms", justify="right", style="bold")
    for stage in report["stages"]:
        if stage not in total["stages"]:
            table.add_column(f"{stage}\nms", justify="right")
    if train:
        table.add_column("train\nms", justify="right")
    table.add_column("memory\nMB", justify="right", style="bold")
    if train:
        table.add_column("train\nMB", justify="right")
    table.add_column("drift", justify="right")
    for cell in report["cells"]:
        table.add_row(*_row(report, cell), end_section=cell["backend"] == report["settings"]["backends"][-1])
    return table


def _row(report: dict[str, Any], cell: dict[str, Any]) -> list[str]:
    total, seconds, train = report["total"], cell["seconds"], report["settings"]["train"]
    times = [*total["stages"], "total", *(stage for stage in report["stages"] if stage not in total["stages"])]
    row = [tokens(report, cell), name_of(cell["backend"])]
    if cell["failed"]:
        return [*row, cell["failed"]]
    row += [milliseconds(seconds.get(name)) for name in times + ["train_step"] * train]
    row.append(megabytes(cell["peak_memory_bytes"]))
    row += [megabytes(cell["train_peak_memory_bytes"])] * train
    return [*row, _drift(cell)]


def _gains(report: dict[str, Any]) -> Table:
    last = report["total"]["stages"][-1]
    shown = {last: last, "total": report["total"]["name"], "train_step": "training step"}
    shown = {name: title for name, title in shown.items() if any(name in cell["amdahl"] for cell in report["cells"])}
    memories = ["peak_memory_bytes"] + ["train_peak_memory_bytes"] * report["settings"]["train"]
    table = _new_table()
    for title in shown.values():
        table.add_column(f"{title}\nfaster, of at most", justify="right")
    for title in ("memory", "train\nmemory")[: len(memories)]:
        table.add_column(f"{title}", justify="right")
    for cell in report["cells"]:
        if cell["amdahl"]:
            gains = [_gain(cell["amdahl"].get(name)) for name in shown]
            shares = [ratio(memory_ratio(report, cell, name)) for name in memories]
            table.add_row(tokens(report, cell), name_of(cell["backend"]), *gains, *shares)
    return table


def _new_table() -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("visual\ntokens", justify="right")
    table.add_column("backend")
    return table


def _gain(bound: dict[str, float] | None) -> str:
    if bound is None:
        return "n/a"
    return f"{bound['speedup']:.2f}x of {bound['cap']:.2f}x {bound['share_of_cap']:4.0%}"


_GAINS_LEGEND = (
    "faster: naive time / own time. at most: naive time / time with every op removed (the Amdahl cap); "
    "then the share of the cap that is reached. memory: own peak / naive peak."
)


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
        return "n/a"
    if "relative_l2_to_fp32" in drift:
        off, agreement = drift["relative_l2_to_fp32"], drift["top1_agreement_with_fp32"]
    elif cell["backend"] == "reference":
        return "-"
    else:
        off, agreement = drift["relative_l2"], drift["top1_agreement"]
    return f"{off:.0e}" + (f" {agreement:.1%}" if agreement < 1 else "")


def summary(report: dict[str, Any]) -> str:
    """What the largest profile shows, in one sentence."""
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
        parts.append(f"peak memory {memory:.2f}x")
    elif cell["peak_memory_bytes"] is not None:
        parts.append(f"peak memory {megabytes(cell['peak_memory_bytes'])} MB")
    beside = "against the naive baseline " if cell["amdahl"] else ""
    return f"{per_image}: {beside}{', '.join(parts)}{_cost_of_a_token(report, cell['backend'])}."


def _cost_of_a_token(report: dict[str, Any], backend: str) -> str:
    slopes = report["marginal_seconds_per_visual_token"]
    if backend not in slopes:
        return ""
    own, last = slopes[backend], report["total"]["stages"][-1]
    if own[last] <= 0:  # less than the noise
        return ""
    text = f"; a visual token costs {microseconds(own[last])} of {last}"
    naive = slopes.get("reference") if backend != "reference" else None
    if naive:
        text += f" (naive {microseconds(naive[last])})"
    text += f" and {microseconds(own['total'])} until the {report['total']['name']}"
    return text + (f" ({microseconds(naive['total'])})" if naive else "")


def memory_ratio(report: dict[str, Any], cell: dict[str, Any], name: str = "peak_memory_bytes") -> float | None:
    """Peak memory over the naive baseline's at the same number of tokens; None where either wasn't measured."""
    for other in report["cells"]:
        same = other["backend"] == "reference" and other["tokens_per_image"] == cell["tokens_per_image"]
        if same and other is not cell and other[name] and cell[name] is not None:
            return cell[name] / other[name]
    return None


# Numbers for people, three digits or so.


def plural(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def crops_of(settings: dict[str, Any]) -> str:
    return f"{plural(settings['images'], 'crop')} of {settings['image']}"


def tokens(report: dict[str, Any], cell: dict[str, Any]) -> str:
    return f"{report['settings']['images']} x {cell['tokens_per_image']:,}"


def milliseconds(seconds: float | None) -> str:
    if seconds is None:
        return "n/a"
    value = seconds * 1e3
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} us" if abs(seconds) >= 1e-5 else f"{seconds * 1e6:.1f} us"


def megabytes(size: int | None) -> str:
    if size is None:
        return "n/a"
    return f"{size / 1e6:,.0f}" if size >= 1e7 else f"{size / 1e6:.1f}"


def compared(speedup: float) -> str:
    """Such as "1.9x faster"; differences below the noise of a measurement are none."""
    if abs(speedup - 1) < 0.05:
        return "as fast"
    return f"{max(speedup, 1 / speedup):.1f}x {'faster' if speedup > 1 else 'slower'}"


def ratio(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.2f}x"
