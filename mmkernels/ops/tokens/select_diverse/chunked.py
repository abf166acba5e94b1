"""Diverse selection in plain PyTorch: one matrix-vector product a token, and memory linear in the inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.ops.tokens.select_diverse.spec import (
    NOTHING_NEW,
    Arguments,
    directions,
    images_of,
    squared_lengths,
    symmetric,
)

_ROWS = 1024  # tokens whose similarities to all others are computed together


def forward(args: Arguments) -> Tensor:
    """Returns the kept tokens, int64 [sum of keep]."""
    index = args.x.new_empty(sum(args.keep), dtype=torch.int64)
    start = 0
    for first, last, keep in images_of(args):
        if keep:
            _select(args, first, last, index[start : start + keep])
        start += keep
    return index


def _select(args: Arguments, first: int, last: int, index: Tensor) -> None:
    """Writes the kept tokens of one image."""
    rows, quality, counts = directions(args, first, last)
    by_determinant = args.method == "determinant"
    basis = rows.new_zeros(len(index), rows.shape[1])
    whole = squared_lengths(rows, quality) if by_determinant else torch.ones_like(quality)
    gains = whole.clone() if by_determinant else _nearest(rows, counts)
    chosen = torch.zeros_like(counts)
    for step in range(len(index)):
        values = gains.where(gains > NOTHING_NEW * whole, 0).where(counts, -1).masked_fill(chosen, -2)
        value, best = values.max(0)  # of equal ones `max` may return any
        best = (values == value).to(torch.uint8).argmax()
        index[step], chosen[best] = best + first, True
        direction = rows[best]
        if by_determinant:
            for _ in range(2):  # once more: the first time leaves errors as large as what is subtracted
                direction = direction - basis[:step].mT @ (basis[:step] @ direction)
            direction = direction / direction.norm().where(value > 0, 1)
            basis[step] = direction.where(value > 0, 0)
            gains = gains - (quality * (rows @ basis[step])) ** 2
        else:
            apart = (1 - rows @ direction).where(counts[best], 2.0)
            gains = apart if step == 0 else torch.minimum(gains, apart)


def _nearest(rows: Tensor, counts: Tensor) -> Tensor:
    """Returns the distance of each token from the nearest other one."""
    if len(rows) == 1:
        return rows.new_ones(1)
    found = []
    for first in range(0, len(rows), _ROWS):
        apart = (1 - symmetric(rows[first : first + _ROWS], rows)).masked_fill(~counts, 2.0)
        apart.diagonal(first).fill_(torch.inf)
        found.append(apart.amin(1))
    return torch.cat(found)
