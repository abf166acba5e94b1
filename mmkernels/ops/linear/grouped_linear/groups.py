"""Groups of rows that lie one after the other: their sizes where Python may look at them, else each row's group."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.runtime.checks import can_look

__all__ = ["bounds_of", "groups_of_rows", "sizes_of"]


def sizes_of(lengths: Tensor, rows: int) -> list[int] | None:
    """Returns the rows of each group; None: their number lies on a device, or is not known yet.

    Raises:
        ValueError: a number is negative, or together they are more than `rows`.
    """
    if not lengths.is_cpu or not can_look(lengths):
        return None
    sizes: list[int] = lengths.tolist()
    total = sum(sizes)
    if sizes and min(sizes) < 0:
        raise ValueError(f"lengths must be 0 or more, got {min(sizes)}")
    if total > rows:
        raise ValueError(f"lengths must sum to at most {rows}, the rows of x, got {total}")
    return sizes


def bounds_of(lengths: Tensor, rows: int) -> Tensor:
    """Returns int64 [G], the row behind each group's last one; what is wrong in lengths is cut, unseen."""
    return lengths.long().clamp(0, rows).cumsum(0).clamp(max=rows)


def groups_of_rows(lengths: Tensor, rows: int) -> Tensor:
    """Returns int64 [rows], each row's group; the number of groups for rows behind the last one."""
    index = torch.arange(rows, device=lengths.device)
    return torch.searchsorted(bounds_of(lengths, rows), index, right=True)
