"""A profile as text: two tables and one sentence, at most 100 columns wide."""

from __future__ import annotations

import statistics
import textwrap
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from mmkernels import report as writer
from mmkernels.meters import Timing
from mmkernels.profiling import hf_table, sound_table
from mmkernels.profiling.hf_table import compares_patch
from mmkernels.profiling.options import ORIGINAL, UNREDUCED, VISION_LANGUAGE, baseline_of, name_of
from mmkernels.profiling.pareto import drift_of, drift_text, row_of
from mmkernels.profiling.point import NAIVE_LOSS
from mmkernels.report import MISSING, megabytes, microseconds, milliseconds, plural, ratio

MARK = "*"
"""Beside the drift of a row on the Pareto front."""

_MOST_LETTERS = 60
"""Of a question, in titles."""

_UNSTEADY = 0.1
"""Above this spread, as a share, the table warns."""

_MOST_SAID = 7
"""Rows of a summary; where there are more, it tells those on the Pareto front alone."""

RANDOM = (
    "The weights are random. Time and memory are those of a trained model; drift is not: it shows how much of the "
    "output changes, not how much a trained model would lose."
)
"""What a reader of drift must know where there is no checkpoint."""

_GAINS_LEGEND = (
    "faster: naive time / this backend's time. at most: naive time / time with every op removed (the Amdahl cap)"
    "{share}. memory: this backend's peak / naive peak."
)


def render(report: dict[str, Any]) -> RenderableType:
    """Returns the whole profile but its last sentence."""
    parts: list[RenderableType] = [_heading(report), _measurements(report), Text(legend(report), style="dim")]
    parts += [Text(warning, style="red") for warning in warnings(report)]
    if any(cell["amdahl"] for cell in report["cells"]):
        parts += [Text(), _gains(report), Text(_gains_legend(report), style="dim")]
    return Group(*parts)


def _gains_legend(report: dict[str, Any]) -> str:
    if compares_patch(report):
        return hf_table.GAINS_LEGEND
    return _GAINS_LEGEND.format(share="" if _is_crowded(report) else "; then the share of the cap that is reached")


def compares_rows(report: dict[str, Any]) -> bool:
    """Returns whether drift is that of a row from another one: of reducers, or of pooled sound."""
    return bool(report["settings"].get("reduce")) or is_of_sound(report)


def is_of_sound(report: dict[str, Any]) -> bool:
    """Returns whether the model hears."""
    return "pool" in report["settings"]


def _is_crowded(report: dict[str, Any]) -> bool:
    """Returns whether there is no room for all columns: with reducers and a training step."""
    return compares_rows(report) and report["settings"]["train"]


def warnings(report: dict[str, Any]) -> list[str]:
    """Returns what a reader of the table or of the picture must know: that times vary, or that some are missing."""
    lines = []
    unsteady = _unsteadiness(report)
    if unsteady > _UNSTEADY:
        lines.append(f"Unsteady: repeated times differ by {unsteady:.0%} and more. Is the machine busy?")
    measured = {row_of(cell) for cell in report["cells"]}
    missing = [row for row in rows_of(report) if row not in measured]
    if missing:
        names = " and ".join(f"{row:,}" if isinstance(row, int) else row for row in missing)
        what = " tokens per image" * isinstance(missing[0], int)
        lines.append(f"Interrupted: {names}{what} {'was' if len(missing) == 1 and not what else 'were'} not measured.")
    elif any(cell["failed"] is None and "total" not in cell["seconds"] for cell in report["cells"]):
        lines.append("Interrupted: not all times were measured.")
    return lines


def rows_of(report: dict[str, Any]) -> list[int | str]:
    """Returns what the rows are about: numbers of tokens, or names of reducers."""
    settings = report["settings"]
    return report.get("rows") or settings.get("reduce") or settings["tokens"]  # the first is not in older reports


def _unsteadiness(report: dict[str, Any]) -> float:
    """Returns the median of the stages' spreads: half of the repeated times lie further apart, as a share."""
    samples = [times for cell in report["cells"] for times in cell["samples_seconds"].values()]
    return statistics.median([Timing(tuple(times)).spread for times in samples] or [0.0])


def _heading(report: dict[str, Any]) -> Text:
    s, threads = report["settings"], report["machine"]["torch_threads"]
    text = Text()
    text.append(title_of_model(s), style="bold")
    weights = "random weights" if has_random_weights(s) else "its weights"
    about = report.get("about_size") or s.get("class")
    source = sound_table.part_of(report) if is_of_sound(report) else crops_of(report)
    text.append(
        f", {s['dtype']}, {weights}{f', {about}' * bool(about)}; {source}, {text_of(s)}\n"
        f"{report['device']}, torch {report['machine']['versions']['torch']}, "
        f"{plural(threads, 'thread')}\n"
    )
    return text


def _measurements(report: dict[str, Any]) -> Table:
    total, train = report["total"], report["settings"]["train"]
    reducing = compares_rows(report)
    repeated = [stage for stage in report["stages"] if stage not in total["stages"]]
    times = (
        {stage: stage for stage in total["stages"]} | {"total": total["name"]} | {stage: stage for stage in repeated}
    )
    memories = {"peak_memory_bytes": "memory"}
    if _is_crowded(report) and (report["settings"].get("resolutions") or is_of_sound(report)):
        times = {name: title for name, title in times.items() if name not in repeated}
    if train:
        times["train_step"] = "train"
        memories["train_peak_memory_bytes"] = "train"
    if reducing or compares_patch(report):  # narrow columns
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
    if compares_patch(report):
        drifts.append(Column("same\ntokens", justify="right"))
    elif reducing and not _is_crowded(report) and not is_of_sound(report):
        drifts.append(Column("same\ntoken", justify="right"))
    table = writer.table((), [*_columns(report), *numbers, *drifts])
    for cell, following in zip(report["cells"], [*report["cells"][1:], None], strict=True):
        ends = _ends_section(report, cell, following)
        row = begin(report, cell)
        if cell["failed"]:
            row.append(cell["failed"])
        else:
            row += [milliseconds(cell["seconds"].get(name)) for name in times]
            row += [megabytes(cell[name]) for name in memories]
            row += _drift(report, cell)[: len(drifts)]
        naive_loss = train and cell.get("naive_loss")  # older reports have none
        table.add_row(*row, end_section=ends and not naive_loss)
        if naive_loss:
            row = begin(report, cell | {"backend": NAIVE_LOSS})
            row += [milliseconds(naive_loss.get(name)) if name == "train_step" else "" for name in times]
            row += [megabytes(naive_loss.get(name)) if name in naive_loss else "" for name in memories]
            table.add_row(*row, end_section=ends)
    return table


def _ends_section(report: dict[str, Any], cell: dict[str, Any], following: dict[str, Any] | None) -> bool:
    """Returns whether a line is drawn behind a cell: behind all backends; of one alone, behind each resolution."""
    backends = report["settings"]["backends"]
    by = "sound_seconds" if is_of_sound(report) else "resolution"
    if (len(backends) > 1 and not is_of_sound(report)) or not cell.get(by):
        return bool(cell["backend"] == backends[-1])
    return following is not None and following[by] != cell[by]


def _gains(report: dict[str, Any]) -> Table:
    last = report["total"]["stages"][-1]
    shown = {last: last, "total": report["total"]["name"], "train_step": "training step"}
    if compares_patch(report):
        shown = hf_table.gained(report)
    shown = {name: title for name, title in shown.items() if any(name in cell["amdahl"] for cell in report["cells"])}
    memories = {"peak_memory_bytes": "memory"}
    if report["settings"]["train"]:
        memories["train_peak_memory_bytes"] = "train\nmemory"
    short = _is_crowded(report)
    rows = [
        [
            *begin(report, cell),
            *(_gain(cell["amdahl"].get(name), short=short) for name in shown),
            *(ratio(memory_ratio(report, cell, name)) for name in memories),
        ]
        for cell in report["cells"]
        if cell["amdahl"]
    ]
    faster = "faster" if compares_patch(report) else "faster, of at most"
    titles = [*(f"{title}\n{faster}" for title in shown.values()), *memories.values()]
    return writer.table(rows, [*_columns(report), *(Column(title, justify="right") for title in titles)])


def _columns(report: dict[str, Any]) -> list[Column]:
    """Returns the columns that both tables begin with."""
    if is_of_sound(report):
        return [*(Column(title, justify="right") for title in sound_table.TITLES), Column("backend")]
    columns = [Column("visual\ntokens", justify="right"), Column("patch" if compares_patch(report) else "backend")]
    sides = [Column("side\npx", justify="right")] if report["settings"].get("resolutions") else []
    if not report["settings"].get("reduce"):
        return [*sides, *columns]
    return [*sides, Column("reducer", overflow="fold"), *columns]


def begin(report: dict[str, Any], cell: dict[str, Any]) -> list[str]:
    """Returns what stands in a cell's row in `_columns`."""
    if is_of_sound(report):
        return [*sound_table.begin(cell), name_of(cell["backend"])]
    name = name_of(cell["backend"])
    begin = [tokens(report, cell), name.partition(" ")[0] if compares_patch(report) else name]
    side = [f"{cell['resolution']:,}"] if cell.get("resolution") else []
    return [*side, cell["reducer"], *begin] if cell.get("reducer") else [*side, *begin]


def _gain(bound: dict[str, float] | None, *, short: bool) -> str:
    if bound is None:
        return MISSING
    if "cap" not in bound:
        return ratio(bound["speedup"])
    gain = f"{bound['speedup']:.2f}x of {bound['cap']:.2f}x"
    return gain if short else f"{gain} {bound['share_of_cap']:4.0%}"


def legend(report: dict[str, Any]) -> str:
    """Returns what the columns are, in lines."""
    s = report["settings"]
    hidden = _is_crowded(report) and bool(s.get("resolutions") or is_of_sound(report))
    lines = [
        f"{stage}: {about}{'; in the JSON alone' * (hidden and stage not in report['total']['stages'])}."
        for stage, about in report["stages"].items()
    ]
    lines.append(f"{report['total']['name']}: {' + '.join(report['total']['stages'])}.")
    memory = report["memory_why_not"] or "measured peak above weights and inputs, over all stages"
    lines.append(f"memory: {memory}.")
    wide = any("relative_l2_to_fp32" in (cell["drift"] or {}) for cell in report["cells"])
    if s["train"] and any(cell.get("naive_loss") for cell in report["cells"]):
        lines.append(f"{NAIVE_LOSS}: fused but for the training loss, which is made from all logits.")
    if compares_patch(report):
        lines += hf_table.legend(report)
    elif is_of_sound(report):
        lines += sound_table.legend(report, name_of(_baseline(report)) if not wide else "naive float32")
        lines += [RANDOM] * (not s.get("folder"))
    elif s.get("reduce"):
        lines += _reducing_legend(report, wide)
    elif any(cell["drift"] for cell in report["cells"]):
        lines.append(
            f"drift: relative L2 distance of all logits from {'naive float32' if wide else 'naive'}'s, "
            "and how many next tokens agree where not all do."
        )
    return "\n".join(lines)


def _reducing_legend(report: dict[str, Any], wide: bool) -> list[str]:
    """Returns what must be known of rows that are about reducers."""
    baseline = "naive float32" if wide else name_of(baseline_of(report["settings"]["backends"], reducing=True))
    first = rows_of(report)[0]
    sides = bool(report["settings"].get("resolutions"))
    in_text = report["settings"]["model"] in VISION_LANGUAGE
    every = "all" if in_text else "all patches and a class token, which every reducer keeps"
    of_each = "of each image" if sides else "images x tokens of each"
    lines = [f"visual tokens: {of_each}; without a reducer ({UNREDUCED}) those are {every}."]
    if sides:
        lines.append("side: each image is scaled to at most as many pixels as a square of this side has.")
    largest = ", the largest images with all tokens" if sides else ""
    where = " of text tokens" if in_text else ""
    lines.append(
        f"drift: relative L2 distance of all logits{where} from those of {first}{largest}, {baseline}"
        + ("" if _is_crowded(report) else "; same token: how often the most likely next token is the same")
        + (f". The other rows of {first} show rounding alone." if len(report["settings"]["backends"]) > 1 else ".")
    )
    if report.get("pareto"):
        lines.append(
            f"{MARK}: on the Pareto front: no other row has an earlier {report['total']['name']} and less drift."
        )
    if not report["settings"].get("folder"):
        lines.append(RANDOM)
    learned = [name for name, about in report["reducers"].items() if about["learned"]]
    if learned:
        lines.append(f"No drift of {', '.join(learned)}: with random weights of its own it says nothing.")
    return lines


def _drift(report: dict[str, Any], cell: dict[str, Any]) -> list[str]:
    """Returns what stands in the last columns."""
    if compares_patch(report):
        return hf_table.drift(cell)
    found, reducing = drift_of(cell), compares_rows(report)
    if found is None:
        text = "-" if cell.get("reducer") and report["reducers"][str(row_of(cell))]["learned"] else MISSING
        return [text] * (1 + reducing)
    distance, agreement = found
    mark = MARK if is_best(report, cell) else ""
    if "relative_l2_to_fp32" not in cell["drift"] and _is_baseline(report, cell):
        return ["-" + mark] + ["-"] * reducing
    if reducing:
        return [drift_text(distance) + mark, f"{agreement:.1%}"]
    return [f"{distance:.0e}" + (f" {agreement:.1%}" if agreement < 1 else "")]


def is_best(report: dict[str, Any], cell: dict[str, Any]) -> bool:
    """Returns whether a cell is on the Pareto front, which is that of the first backend."""
    return cell["backend"] == report["settings"]["backends"][0] and row_of(cell) in report.get("pareto", ())


def _is_baseline(report: dict[str, Any], cell: dict[str, Any]) -> bool:
    """Returns whether drift is measured from this cell."""
    if cell["backend"] != _baseline(report):
        return False
    if is_of_sound(report):
        return bool(cell["pool"] == 1)
    return not compares_rows(report) or row_of(cell) == rows_of(report)[0]


def _baseline(report: dict[str, Any]) -> str:
    """Returns the backend from whose outputs drift is measured."""
    return baseline_of(report["settings"]["backends"], reducing=compares_rows(report))


def summary(report: dict[str, Any]) -> str:
    """Returns one sentence: what the largest profile shows; or what each reducer does."""
    if compares_patch(report):
        return hf_table.summary(report)
    if is_of_sound(report):
        return sound_table.summary(report)
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
    """Returns how each row changes time and output, by the first backend that has the first row too."""
    backends, first = report["settings"]["backends"], rows_of(report)[0]
    rows = [cell for cell in report["cells"] if "total" in cell["seconds"]]
    backend = next((name for name in backends if any(_is_row(cell, first, name) for cell in rows)), None)
    if backend is None:
        fitted = any(cell["failed"] is None for cell in report["cells"])
        return "Not all times were measured." if fitted else "Nothing fitted into memory."
    cells = [cell for cell in rows if cell["backend"] == backend]
    whole = cells[0]["seconds"]["total"]
    parts = [f"{name_of(backend)}, all {cells[0]['tokens_per_image']:,} tokens: {report['total']['name']} after "
             f"{milliseconds(whole)} ms"]  # fmt: skip
    shown = cells[1:]
    if len(shown) > _MOST_SAID:  # those worth choosing
        shown = [cell for cell in shown if is_best(report, cell)]
    for cell in shown:
        text = f"{row_of(cell)} {ratio(whole / cell['seconds']['total'])} as fast"
        found = drift_of(cell)
        parts.append(text if found is None else f"{text} (drift {drift_text(found[0])})")
    return "; ".join(parts) + "."


def _is_row(cell: dict[str, Any], row: int | str, backend: str) -> bool:
    return cell["backend"] == backend and row_of(cell) == row


def _cost_of_a_token(report: dict[str, Any], backend: str) -> str:
    slopes = report["marginal_seconds_per_visual_token"]
    if backend not in slopes:
        return ""
    naive: dict[str, float] = slopes.get("reference", {}) if backend != "reference" else {}
    last = report["total"]["stages"][-1]
    parts = []
    for name, what, beside in ((last, f"of {last}", "naive "), ("total", f"until the {report['total']['name']}", "")):
        slope, of_naive = slopes[backend][name], naive.get(name, 0.0)
        if slope > 0:  # else less than the noise
            parts.append(f"{microseconds(slope)} {what}" + f" ({beside}{microseconds(of_naive)})" * (of_naive > 0))
    return f"; a visual token costs {' and '.join(parts)}" if parts else ""


def memory_ratio(report: dict[str, Any], cell: dict[str, Any], name: str = "peak_memory_bytes") -> float | None:
    """Returns peak memory over the baseline's in the same row; None where either wasn't measured."""
    baseline = ORIGINAL if compares_patch(report) else "reference"
    for other in report["cells"]:
        same = other["backend"] == baseline and row_of(other) == row_of(cell)
        if same and other is not cell and other[name] and cell[name] is not None:
            return cell[name] / other[name]
    return None


def title_of_model(settings: dict[str, Any]) -> str:
    """Such as "flamingo small", or the model and the checkpoint's folder; of any model of transformers the folder."""
    if "class" in settings:
        return str(settings["folder"])
    return f"{settings['model']} {settings.get('folder') or settings['size']}"


def has_random_weights(settings: dict[str, Any]) -> bool:
    """Returns whether the weights are no checkpoint's."""
    return bool(settings.get("random")) or not settings.get("folder")


def crops_of(report: dict[str, Any]) -> str:
    s = report["settings"]
    if s["images"] == 1 and not report.get("square", True):
        return str(s["image"])
    return f"{plural(s['images'], 'crop')} of {s['image']}"


def text_of(settings: dict[str, Any]) -> str:
    """Such as "512 text tokens", or the beginning of the question."""
    prompt = settings.get("prompt")
    if prompt is None:
        return f"{settings['text_length']:,} text tokens"
    return f'"{textwrap.shorten(prompt, _MOST_LETTERS, placeholder=" ...")}"'


def tokens(report: dict[str, Any], cell: dict[str, Any]) -> str:
    """Returns images x tokens of each; where each row has its resolution, for which there must be room, the latter."""
    count = f"{cell['tokens_per_image']:,}"
    return count if report["settings"].get("resolutions") else f"{report['settings']['images']} x {count}"


def compared(speedup: float) -> str:
    """Such as "1.9x faster"; a difference below the noise of a measurement is none."""
    if abs(speedup - 1) < 0.05:
        return "as fast"
    return f"{max(speedup, 1 / speedup):.1f}x {'faster' if speedup > 1 else 'slower'}"
