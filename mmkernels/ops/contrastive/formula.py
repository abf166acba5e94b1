"""What the contrastive ops share: pairs, scores and ranks, as their definitions have them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LOG2E = 1.4426950408889634
NO_PARTNERS = -(2**31 - 16)
"""The `first_text` of a block in which no text belongs to an image by its index: text j would be image
``first_text + j``'s, which is below 0."""


def queries_of(image: Tensor) -> Tensor:
    """Returns image features as [N, Q, d]; [N, d] get a Q of 1."""
    return image if image.dim() == 3 else image[:, None]


class Pairs(NamedTuple):
    """Which of some rows and columns belong together.

    Args:
        positive: bool [rows, columns].
        hidden: bool [rows, columns], pairs that take no part; None: there are none.
    """

    positive: Tensor
    hidden: Tensor | None

    def transposed(self) -> Pairs:
        return Pairs(self.positive.mT, None if self.hidden is None else self.hidden.mT)

    def with_hard_texts(self, count: int, hard: Pairs | None) -> Pairs:
        """Returns the pairs with `count` further columns, which are `hard`; None: negatives."""
        if count == 0:
            return self

        def widened(of_batch: Tensor, more: Tensor | None) -> Tensor:
            return F.pad(of_batch, (0, count)) if more is None else torch.cat([of_batch, more], 1)

        positive, hidden = (None, None) if hard is None else hard
        return Pairs(widened(self.positive, positive), None if self.hidden is None else widened(self.hidden, hidden))

    @property
    def negative(self) -> Tensor:
        """Bool [rows, columns]."""
        return ~self.positive if self.hidden is None else ~(self.positive | self.hidden)

    def visible(self, x: Tensor, fill: float) -> Tensor:
        """Returns x [rows, columns] with `fill` in place of hidden pairs."""
        return x if self.hidden is None else x.masked_fill(self.hidden, fill)

    def classes(self) -> Tensor:
        """Returns int64 [rows], how many columns each row's softmax compares."""
        rows, columns = self.positive.shape
        if self.hidden is None:
            return torch.full((rows,), columns, device=self.positive.device)
        return columns - self.hidden.sum(1)


def pairs(
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    *,
    ignore: bool,
    images: slice,
    texts: slice,
    device: torch.device,
    first_text: int = 0,
) -> Pairs:
    """Returns how some images (rows) and texts (columns) belong together.

    Args:
        image_ids, text_ids: [N] and [M], of all of them.
        ignore: partners are positive, and other pairs with equal ids are hidden; else all pairs with equal ids are
            positive.
        first_text: text j is the partner of image first_text + j, if there is one.
    """
    i, j = (torch.arange(x.start, x.stop, device=device) for x in (images, texts))
    diagonal = i[:, None] == j + first_text
    if image_ids is None or text_ids is None:
        return Pairs(diagonal, None)
    same = image_ids[images, None] == text_ids[texts]
    return Pairs(diagonal, same & ~diagonal) if ignore else Pairs(same, None)


def hard_pairs(image_ids: Tensor | None, hard_text_ids: Tensor | None, ignore: bool) -> Pairs | None:
    """Returns how some images (rows) and all hard texts (columns) belong together; None: all are negatives.

    Args:
        image_ids, hard_text_ids: [rows] and [K].
        ignore: pairs with equal ids are hidden; else they are positive.
    """
    if image_ids is None or hard_text_ids is None:
        return None
    same = image_ids[:, None] == hard_text_ids
    return Pairs(torch.zeros_like(same), same) if ignore else Pairs(same, None)


def best_scores(image: Tensor, text: Tensor) -> Tensor:
    """Returns inner products [N, M], the largest over an image's queries; image [N, d] or [N, Q, d], text [M, d]."""
    if image.dim() == 2:
        return image @ text.mT
    return (image @ text.mT).max(1).values


def score_gradients(scores_grad: Tensor, winner: Tensor, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the gradients of image and text from those of their best scores.

    Args:
        scores_grad: [N, M].
        winner: int64 [N, M], the query of each image with the largest score.
        image: [N, d] or [N, Q, d].
        text: [M, d].
    """
    queries = queries_of(image)
    dots_grad = scores_grad.new_zeros(queries.shape[0], queries.shape[1], text.shape[0])
    dots_grad.scatter_(1, winner[:, None], scores_grad[:, None])
    return (dots_grad @ text).reshape(image.shape), torch.einsum("nqm,nqd->md", dots_grad, queries)


def count_before(scores: Tensor, best: Tensor, index: Tensor, counted: Tensor, first: int = 0) -> Tensor:
    """Returns how many of the `counted` columns come before each row's right answer in a stable descending sort.

    Args:
        scores: [rows, columns].
        best, index: [rows], the right answer's score and column.
        counted: bool [rows, columns].
        first: the first column's number.
    """
    column = torch.arange(first, first + scores.shape[1], device=scores.device)
    before = (scores > best[:, None]) | ((scores == best[:, None]) & (column < index[:, None]))
    return (before & counted).sum(1)


def ranks(before: Tensor, best: Tensor, negatives: Tensor | int, has_positive: Tensor | None = None) -> Tensor:
    """Returns int64 [rows]: -1 without a positive, else `before`, or all negatives if the best positive is NaN.

    Args:
        before: [rows], the negatives that come before the best positive.
        best: [rows], the best positive's score.
        negatives: [rows], how many there are.
        has_positive: bool [rows]; None: all rows have one.
    """
    rank = torch.where(best.isnan(), negatives, before)
    return rank if has_positive is None else torch.where(has_positive, rank, -1)
