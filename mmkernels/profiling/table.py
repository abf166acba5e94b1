"""A profile as text: two tables and one sentence, at most 100 columns wide."""

from __future__ import annotations

import statistics
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from mmkernels import report as writer
from mmkernels.meters import Timing
from mmkernels.profiling.options import UNREDUCED, Row, baseline_of, name_of
from mmkernels.profiling.point import NAIVE_LOSS
from mmkernels.report import MISSING, megabytes, microseconds, milliseconds, plural, ratio

_UNSTEADY = 0.1
"""Above this spread, as a share, the table warns."""

_GAINS_LEGEND = (
    "faster: naive time / this backend's time. at most: naive time / time with every op removed (the Amdahl cap)"
    "{share}. memory: this backend's peak / naive peak."
)


def render(report: dict[str, Any]) -> RenderableType:
    """Returns the whole profile but its last sentence."""
    parts: list[RenderableType] = [_heading(report), _measurements(report), Text(_legend(report), style="dim")]
    parts += [Text(warning, style="red") for warning in warnings(report)]
    if any(cell["amdahl"] for cell in report["cells"]):
        parts += [Text(), _gains(report), Text(_gains_legend(report), style="dim")]
    return Group(*parts)


def _gains_legend(report: dict[str, Any]) -> str:
    return _GAINS_LEGEND.format(share="" if _is_crowded(report) else "; then the share of the cap that is reached")


def _is_crowded(report: dict[str, Any]) -> bool:
    """Returns whether there is no room for all columns: with reducers and a training step."""
    return bool(report["settings"].get("reduce")) and report["settings"]["train"]


def warnings(report: dict[str, Any]) -> list[str]:
    """Returns what a reader of the table or of the picture must know: that times vary, or that some are missing."""
    lines = []
    unsteady = _unsteadiness(report)
    if unsteady > _UNSTEADY:
        lines.append(f"Unsteady: repeated times differ by {unsteady:.0%} and more. Is the machine busy?")
    measured = {row_of(cell) for cell in report["cells"]}
    missing = [row for row in rows_of(report["settings"]) if row not in measured]
    if missing:
        names = " and ".join(f"{row:,}" if isinstance(row, int) else row for row in missing)
        what = " tokens per image" * isinstance(missing[0], int)
        lines.append(f"Interrupted: {names}{what} {'was' if len(missing) == 1 and not what else 'were'} not measured.")
    elif any(cell["failed"] is None and "total" not in cell["seconds"] for cell in report["cells"]):
        lines.append("Interrupted: not all times were measured.")
    return lines


def rows_of(settings: dict[str, Any]) -> list[Row]:
    """Returns what the rows are about: numbers of tokens, or reducers."""
    return settings.get("reduce") or settings["tokens"]


def row_of(cell: dict[str, Any]) -> Row:
    """Returns what the row of a cell is about."""
    return cell.get("reducer") or cell["tokens_per_image"]


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
    reducing = bool(report["settings"].get("reduce"))
    repeated = [stage for stage in report["stages"] if stage not in total["stages"]]
    times = (
        {stage: stage for stage in total["stages"]} | {"total": total["name"]} | {stage: stage for stage in repeated}
    )
    memories = {"peak_memory_bytes": "memory"}
    if train:
        times["train_step"] = "train"
        memories["train_peak_memory_bytes"] = "train"
    if reducing:  # narrow columns
        times["total"] = times["total"].replace(" ", "\n")
    numbers = [
        Column(
            f"{title}\n{unit}",
            justify="right",
            style="bold" if name in ("total", "peak_memory_bytes") else "",
        )
        for unit, columns in (("ms", times), ("MB", memories))
        for name, title in columns.items()
    ]
    drifts = [Column("drift", justify="right")]
    if reducing and not _is_crowded(report):
        drifts.append(Column("same\ntoken", justify="right"))
    table = writer.table((), [*_columns(report), *numbers, *drifts])
    last = report["settings"]["backends"][-1]
    for cell in report["cells"]:
        row = _begin(report, cell)
        if cell["failed"]:
            row.append(cell["failed"])
        else:
            row += [milliseconds(cell["seconds"].get(name)) for name in times]
            row += [megabytes(cell[name]) for name in memories]
            row += _drift(report, cell)[: len(drifts)]
        naive_loss = train and cell.get("naive_loss")  # older reports have none
        table.add_row(*row, end_section=cell["backend"] == last and not naive_loss)
        if naive_loss:
            row = _begin(report, cell | {"backend": NAIVE_LOSS})
            row += [milliseconds(naive_loss.get(name)) if name == "train_step" else "" for name in times]
            row += [megabytes(naive_loss.get(name)) if name in naive_loss else "" for name in memories]
            table.add_row(*row, end_section=cell["backend"] == last)
    return table


def _gains(report: dict[str, Any]) -> Table:
    last = report["total"]["stages"][-1]
    shown = {last: last, "total": report["total"]["name"], "train_step": "training step"}
    shown = {name: title for name, title in shown.items() if any(name in cell["amdahl"] for cell in report["cells"])}
    memories = {"peak_memory_bytes": "memory"}
    if report["settings"]["train"]:
        memories["train_peak_memory_bytes"] = "train\nmemory"
    short = _is_crowded(report)
    rows = [
        [
            *_begin(report, cell),
            *(_gain(cell["amdahl"].get(name), short=short) for name in shown),
            *(ratio(memory_ratio(report, cell, name)) for name in memories),
        ]
        for cell in report["cells"]
        if cell["amdahl"]
    ]
    titles = [*(f"{title}\nfaster, of at most" for title in shown.values()), *memories.values()]
    return writer.table(rows, [*_columns(report), *(Column(title, justify="right") for title in titles)])


def _columns(report: dict[str, Any]) -> list[Column]:
    """Returns the columns that both tables begin with."""
    columns = [Column("visual\ntokens", justify="right"), Column("backend")]
    return [Column("reducer", overflow="fold"), *columns] if report["settings"].get("reduce") else columns


def _begin(report: dict[str, Any], cell: dict[str, Any]) -> list[str]:
    """Returns what stands in a cell's row in `_columns`."""
    begin = [tokens(report, cell), name_of(cell["backend"])]
    return [cell["reducer"], *begin] if cell.get("reducer") else begin


def _gain(bound: dict[str, float] | None, *, short: bool) -> str:
    if bound is None:
        return MISSING
    gain = f"{bound['speedup']:.2f}x of {bound['cap']:.2f}x"
    return gain if short else f"{gain} {bound['share_of_cap']:4.0%}"


def _legend(report: dict[str, Any]) -> str:
    s = report["settings"]
    lines = [f"{stage}: {about}." for stage, about in report["stages"].items()]
    lines.append(f"{report['total']['name']}: {' + '.join(report['total']['stages'])}.")
    memory = report["memory_why_not"] or "measured peak above weights and inputs, over all stages"
    lines.append(f"memory: {memory}.")
    wide = any("relative_l2_to_fp32" in (cell["drift"] or {}) for cell in report["cells"])
    if s["train"] and any(cell.get("naive_loss") for cell in report["cells"]):
        lines.append(f"{NAIVE_LOSS}: fused but for the training loss, which is made from all logits.")
    if s.get("reduce"):
        lines += _reducing_legend(report, wide)
    elif any(cell["drift"] for cell in report["cells"]):
        lines.append(
            f"drift: relative L2 distance of all logits from {'naive float32' if wide else 'naive'}'s, "
            "and how many next tokens agree where not all do."
        )
    return "\n".join(lines)


def _reducing_legend(report: dict[str, Any], wide: bool) -> list[str]:
    baseline = "naive float32" if wide else name_of(baseline_of(report["settings"]["backends"], reducing=True))
    lines = [
        f"visual tokens: images x tokens of each; without a reducer ({UNREDUCED}) those are all patches and a class "
        "token, which every reducer keeps.",
        f"drift: relative L2 distance of all logits from those of {UNREDUCED}, {baseline}"
        + ("" if _is_crowded(report) else "; same token: how often the most likely next token is the same")
        + f". The other rows of {UNREDUCED} show rounding alone.",
        "The weights are random. Time and memory are those of a trained model; drift is not: it shows how much of the "
        "output a reducer changes, not how much a trained model would lose.",
    ]
    learned = [name for name, about in report["reducers"].items() if about["learned"]]
    if learned:
        lines.append(f"No drift of {', '.join(learned)}: with random weights of its own it says nothing.")
    return lines


def drift_of(cell: dict[str, Any]) -> tuple[float, float] | None:
    """Returns a cell's drift, from float32 where another dtype was measured, and its agreement; None: neither."""
    drift = cell["drift"]
    if not drift:
        return None
    if "relative_l2_to_fp32" in drift:
        return drift["relative_l2_to_fp32"], drift["top1_agreement_with_fp32"]
    return drift["relative_l2"], drift["top1_agreement"]


def drift_text(distance: float) -> str:
    """Such as "0.31", "0.0042" and "3e-07"."""
    return f"{distance:.2g}" if distance >= 1e-3 else f"{distance:.0e}"


def _drift(report: dict[str, Any], cell: dict[str, Any]) -> list[str]:
    """Returns what stands in the last columns."""
    found, reducing = drift_of(cell), bool(cell.get("reducer"))
    if found is None:
        text = "-" if reducing and report["reducers"][cell["reducer"]]["learned"] else MISSING
        return [text] * (1 + reducing)
    distance, agreement = found
    if "relative_l2_to_fp32" not in cell["drift"] and _is_baseline(report, cell):
        return ["-"] * (1 + reducing)
    if reducing:
        return [drift_text(distance), f"{agreement:.1%}"]
    return [f"{distance:.0e}" + (f" {agreement:.1%}" if agreement < 1 else "")]


def _is_baseline(report: dict[str, Any], cell: dict[str, Any]) -> bool:
    """Returns whether drift is measured from this cell."""
    reducer = cell.get("reducer")
    baseline = baseline_of(report["settings"]["backends"], reducing=reducer is not None)
    return cell["backend"] == baseline and reducer in (None, UNREDUCED)


def summary(report: dict[str, Any]) -> str:
    """Returns one sentence: what the largest profile shows; or what each reducer does."""
    if report["settings"].get("reduce"):
        return _reducing_summary(report)
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


def _reducing_summary(report: dict[str, Any]) -> str:
    """Returns how each reducer changes time and output, by the first backend that has the unreduced model too."""
    backends = report["settings"]["backends"]
    rows = [cell for cell in report["cells"] if "total" in cell["seconds"]]
    backend = next((name for name in backends if any(_unreduced(cell, name) for cell in rows)), None)
    if backend is None:
        fitted = any(cell["failed"] is None for cell in report["cells"])
        return "Not all times were measured." if fitted else "Nothing fitted into memory."
    cells = [cell for cell in rows if cell["backend"] == backend]
    whole = cells[0]["seconds"]["total"]
    parts = [f"{name_of(backend)}, all {cells[0]['tokens_per_image']:,} tokens: {report['total']['name']} after "
             f"{milliseconds(whole)} ms"]  # fmt: skip
    for cell in cells[1:]:
        text = f"{cell['reducer']} {ratio(whole / cell['seconds']['total'])} as fast"
        found = drift_of(cell)
        parts.append(text if found is None else f"{text} (drift {drift_text(found[0])})")
    return "; ".join(parts) + "."


def _unreduced(cell: dict[str, Any], backend: str) -> bool:
    return cell["backend"] == backend and cell["reducer"] == UNREDUCED


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
    """Returns peak memory over the naive baseline's in the same row; None where either wasn't measured."""
    for other in report["cells"]:
        same = other["backend"] == "reference" and row_of(other) == row_of(cell)
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
