"""Rows of tokens composed from two tensors, in plain PyTorch, and the maps that say which row goes where."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["compose", "home_of", "source_of_mask", "source_of_positions"]


def source_of_mask(mask: Tensor, count: int) -> Tensor:
    """Returns int64 [tokens]: 0, 1, 2, ... where a mask is true, as long as they are below `count`; else -1."""
    flat = mask.flatten()
    number = flat.cumsum(0) - 1
    return torch.where(flat & (number < count), number, -1)


def source_of_positions(positions: Tensor, tokens: int) -> Tensor:
    """Returns int64 [tokens]: which entry of `positions` names a token, the last one of several; -1: none does.

    Positions that name no token count for nothing.
    """
    inside = (positions >= 0) & (positions < tokens)
    numbers = torch.arange(len(positions), device=positions.device)
    source = torch.full((tokens + 1,), -1, dtype=torch.int64, device=positions.device)
    return source.scatter_reduce(0, torch.where(inside, positions, tokens), numbers, "amax")[:tokens]


def home_of(source: Tensor, count: int) -> Tensor:
    """Returns the map back, int64 [count]: where in `source` each number stands, none twice; -1: nowhere."""
    rows = torch.arange(len(source), device=source.device)
    home = torch.full((count + 1,), -1, dtype=torch.int64, device=source.device)
    return home.scatter(0, torch.where(source >= 0, source, count), rows)[:count]


def compose(base: Tensor | None, picked: Tensor | None, source: Tensor, *, add: bool = False) -> Tensor:
    """Returns [rows, C]: row ``source[r]`` of `picked`, plus row r of `base` if `add`; where it is -1, row r of `base`.

    A tensor that is None is zero.
    """
    there = (source >= 0)[:, None]
    if picked is None or not len(picked):
        assert base is not None
        return torch.where(there, 0, base)
    rows = picked[source.clamp(min=0)]
    if base is None:
        return torch.where(there, rows, 0)
    return torch.where(there, base + rows if add else rows, base)
