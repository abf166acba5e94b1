"""Which rows of a profile are worth choosing: those that no other row beats in both time and drift."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from mmkernels.profiling.options import Choice, Excerpt, Side


class Trade(NamedTuple):
    """What one row costs, and what it changes.

    Attributes:
        seconds: to the first token.
        drift: of the output; see `drift_of`.
    """

    seconds: float
    drift: float


def row_of(cell: dict[str, Any]) -> int | str:
    """Returns what the row of a cell is about: a number of tokens, or the name of a `Choice`, `Excerpt` or `Side`."""
    if "sound_seconds" in cell:
        return str(Excerpt(cell["sound_seconds"], cell["pool"]))
    if not cell.get("reducer"):
        side = cell.get("resolution")
        return str(Side(side)) if side else int(cell["tokens_per_image"])
    return str(Choice(cell["reducer"], cell.get("resolution")))  # older reports have no resolution


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


def trades(cells: Iterable[dict[str, Any]], backend: str) -> dict[str, Trade]:
    """Returns by row what was measured of reducers, run by one backend."""
    found = {}
    for cell in cells:
        drift = drift_of(cell)
        if cell["backend"] == backend and cell.get("reducer") and drift is not None and "total" in cell["seconds"]:
            found[str(row_of(cell))] = Trade(cell["seconds"]["total"], drift[0])
    return found


def dominates(a: Trade, b: Trade) -> bool:
    """Returns whether `a` is as good in both, and better in one."""
    return a != b and a.seconds <= b.seconds and a.drift <= b.drift


def front(cells: Sequence[dict[str, Any]], backends: Sequence[str]) -> list[str]:
    """Returns the rows on the Pareto front of time to the first token and drift, the fastest first.

    Args:
        cells: of the report.
        backends: that were measured; the front is that of the first.

    Example:
        >>> def cell(name, seconds, drift):
        ...     about = {"reducer": name, "backend": "fused", "seconds": {"total": seconds}}
        ...     return about | {"drift": {"relative_l2": drift, "top1_agreement": 1.0}}
        >>> front([cell("none", 3.0, 0.0), cell("pool:2", 1.0, 0.3), cell("tome:0.25", 2.0, 0.4)], ["fused"])
        ['pool:2', 'none']
    """
    found = trades(cells, backends[0]) if backends else {}
    best = [name for name, trade in found.items() if not any(dominates(other, trade) for other in found.values())]
    return sorted(best, key=lambda name: found[name])
