"""What the contrastive ops share: pairs, scores and ranks, as the definition has them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LOG2E = 1.4426950408889634


def scaled(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """``x * factor`` in `dtype`, factor a tensor of no dims that keeps its own."""
    if x.device.type == "cpu":  # where such a factor is never rounded to x's dtype
        return torch.mul(x, factor).to(dtype)
    return torch.mul(x, factor.reshape([1] * x.dim()), out=x.new_empty(x.shape, dtype=dtype))


def queries_of(image: Tensor) -> Tensor:
    """``[N, Q, d]``: image features of one query each get a Q of 1."""
    return image if image.dim() == 3 else image[:, None]


class Pairs(NamedTuple):
    """Which of some images and texts belong together.

    Args:
        positive: bool [rows, columns].
        hidden: bool [rows, columns], pairs that take no part; None: none.
    """

    positive: Tensor
    hidden: Tensor | None

    def turned(self) -> Pairs:
        """Rows as columns."""
        return Pairs(self.positive.mT, None if self.hidden is None else self.hidden.mT)


def pairs(
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    ignore: bool,
    rows: tuple[int, int],
    columns: tuple[int, int],
    device: torch.device,
) -> Pairs:
    """Of images ``rows[0] <= i < rows[1]`` and texts ``columns[0] <= j < columns[1]``.

    Args:
        ignore: text i is image i's positive, and other pairs of one id are hidden; else one id makes a pair positive.
    """
    place = torch.arange(*rows, device=device)[:, None] == torch.arange(*columns, device=device)
    if image_ids is None or text_ids is None:
        return Pairs(place, None)
    same = image_ids[rows[0] : rows[1], None] == text_ids[columns[0] : columns[1]]
    return Pairs(place, same & ~place) if ignore else Pairs(same, None)


def best_scores(image: Tensor, text: Tensor) -> Tensor:
    """``[N, M]``: inner products, of an image's queries the largest; image [N, d] or [N, Q, d], text [M, d]."""
    if image.dim() == 2:
        return image @ text.mT
    return (image @ text.mT).max(1).values


def ranks(scores: Tensor, best: Tensor, place: Tensor, counted: Tensor, first: int = 0) -> Tensor:
    """How many of the `counted` columns stand before each row's right answer, in a stable descending sort.

    Args:
        scores: [rows, columns].
        best, place: [rows], the right answer's score and column.
        counted: bool [rows, columns].
        first: the first column's number.
    """
    column = torch.arange(first, first + scores.shape[1], device=scores.device)
    before = (scores > best[:, None]) | ((scores == best[:, None]) & (column < place[:, None]))
    return (before & counted).sum(1)
