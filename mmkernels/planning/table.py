"""What ``mmkernels plan contrastive`` prints."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from mmkernels.planning.check import Check, Checked
from mmkernels.planning.model import Prediction
from mmkernels.planning.ring import gathered_bytes
from mmkernels.report import megabytes, milliseconds, number, percent, table

__all__ = ["ACCURACY", "checked_table", "plan_table"]

_UNSTEADY = 0.05  # the spread from which a check says so

ACCURACY = (
    "Published results see the gain in accuracy end near a batch of 32k: SigLIP's authors went up to one million and "
    "found 32k sufficient (Zhai et al., 2023, arXiv 2303.15343, abstract). What a larger batch buys "
    "here is exactness and memory, not accuracy."
)
_LEGEND = (
    "memory: of the loss on one rank, its features and their gradients included, without the encoders; work: what is "
    "neither. gather: with open_clip's gather and its local loss, which takes 8 bytes (12 in float32) for each "
    "of n x N logits and twice that under autocast. sent: by one rank, in a step; the gather sends about as much. "
    "compute, wire: what each takes alone; a step takes the longer of the two, visit by visit. binds: which it is; "
    "memory where the loss alone does not fit; calls where what a visit costs whatever its size is more than half of "
    "compute."
)


def plan_table(predictions: Sequence[Prediction], encoder_seconds: float | None) -> RenderableType:
    """Returns the table of a plan.

    Args:
        encoder_seconds: of a rank's encoders for one pair, to which the loss is then compared.
    """
    titles = ["pairs\na rank", "memory\nMB", "work\nMB", "gather\nMB", "sent\nMB", "compute\nms", "wire\nms"]
    titles += ["step\nms", "binds", *["of the\nwhole"] * (encoder_seconds is not None)]
    rows = []
    for made in predictions:
        step = made.step
        row = [
            f"{step.batch:,}",
            f"{step.rows:,}",
            megabytes(made.memory_bytes),
            megabytes(made.memory_bytes - made.memory["features"] - made.memory["gradients"]),
            megabytes(gathered_bytes(step) + made.memory["features"] + made.memory["gradients"]),
            megabytes(made.sent),
            milliseconds(made.compute_seconds),
            milliseconds(made.wire_seconds),
            milliseconds(made.seconds),
            made.binds,
        ]
        if encoder_seconds is not None:
            row.append(percent(made.seconds / (made.seconds + encoder_seconds * step.rows)))
        rows.append(row)
    return Group(table(rows, ["batch", *titles]), Text(_LEGEND, style="dim"))


def checked_table(check: Check) -> RenderableType:
    """Returns what was predicted beside what was measured."""
    checked, left_out, spread = check
    rows = []
    for one in checked:
        memory = ["n/a"] * 3
        if one.memory_bytes is not None and one.memory_error is not None:
            memory = [*map(megabytes, one.memory_bytes), _signed(one.memory_error)]
        times = [*map(milliseconds, one.seconds), _signed(one.time_error)]
        rows.append([f"{one.step.ranks}", f"{one.step.batch:,}", *times, *memory])
    titles = ["ranks", "batch", "predicted\nms", "measured\nms", "error", "predicted\nMB", "measured\nMB", "error"]
    parts: list[RenderableType] = [table(rows, titles, texts=0)]
    if checked:
        parts.append(Text(_worst(checked)))
    if left_out:
        names = ", ".join(f"{step.batch:,} on {step.ranks}" for step in left_out)
        parts.append(Text(f"Left out, as the time was up: {names}."))
    if spread > _UNSTEADY:
        parts.append(Text(f"Unsteady: repeated times differ by {percent(spread)} and more. Is the machine busy?"))
    return Group(*parts)


def _worst(checked: Sequence[Checked]) -> str:
    times = max(abs(one.time_error) for one in checked)
    memories = [abs(one.memory_error) for one in checked if one.memory_error is not None]
    memory = f", in memory {percent(max(memories))}" if memories else ""
    return f"Worst error in time {percent(times)}{memory}."


def _signed(share: float) -> str:
    return f"{share:+.0%}"


def rate(bytes_per_second: float) -> str:
    """Such as "40.0 GB/s"."""
    return f"{number(bytes_per_second / 1e9)} GB/s"
