"""Bands of rows of the logits, each against all texts, for the backends in plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from mmkernels.ops.common.dtypes import wide_dtype
from mmkernels.ops.contrastive.formula import Pairs, hard_pairs, pairs, queries_of

STRIP_BYTES = 2**22  # of one band; about six of them are alive at once


class LogitStrips:
    """The tensors of a call. Iterating yields its rows, as many at a time as STRIP_BYTES allows.

    Args:
        image: [N, d] or [N, Q, d].
        text: [M, d].
        image_ids, text_ids, ignore: see `formula.pairs`.
        hard_texts: [K, d]; None and K = 0 are the same.
        hard_text_ids: [K].
        first_text: see `formula.pairs`.
    """

    def __init__(
        self,
        image: Tensor,
        text: Tensor,
        logit_scale: Tensor,
        image_ids: Tensor | None,
        text_ids: Tensor | None,
        ignore: bool = False,
        hard_texts: Tensor | None = None,
        hard_text_ids: Tensor | None = None,
        first_text: int = 0,
    ) -> None:
        self.dtype = wide_dtype(image)
        self.image = queries_of(image)  # [N, Q, d]
        self.scale = logit_scale.reshape(()).to(self.dtype)
        self.text = text.to(self.dtype)
        self.hard = None if hard_texts is None or not len(hard_texts) else hard_texts.to(self.dtype)
        self.image_ids, self.text_ids, self.ignore = image_ids, text_ids, ignore
        self.hard_text_ids = hard_text_ids
        self.first_text = first_text

    def __iter__(self) -> Iterator[slice]:
        rows, queries, _ = self.image.shape
        columns = max(len(self.text), 0 if self.hard is None else len(self.hard), 1)
        row_bytes = self.dtype.itemsize * queries * columns
        step = max(1, STRIP_BYTES // row_bytes)
        return (slice(first, min(first + step, rows)) for first in range(0, rows, step))

    def dots(self, at: slice, texts: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns the largest dot products [rows, columns], and the winners; None: images have one query."""
        image = self.image[at].to(self.dtype)
        if image.shape[1] == 1:
            return image[:, 0] @ texts.mT, None
        return (image @ texts.mT).max(1)

    def logits(self, at: slice, texts: Tensor) -> Tensor:
        """Returns [rows, columns]."""
        return self.dots(at, texts)[0].mul_(self.scale)

    def pairs(self, at: slice) -> Pairs:
        """Returns how the images `at` and all texts belong together."""
        return pairs(
            self.image_ids, self.text_ids, ignore=self.ignore,
            images=at, texts=slice(0, self.text.shape[0]), device=self.image.device,
            first_text=self.first_text,
        )  # fmt: skip

    def hard_pairs(self, at: slice) -> Pairs | None:
        """Returns how the images `at` and all hard texts belong together; None: all are negatives."""
        return hard_pairs(None if self.image_ids is None else self.image_ids[at], self.hard_text_ids, self.ignore)


def add_products(
    dots_grad: Tensor, winner: Tensor | None, rows: Tensor, texts: Tensor, row_grad: Tensor, text_grad: Tensor | None
) -> None:
    """Add the gradients of a strip's features, from those of its dot products.

    Args:
        dots_grad: [rows, columns].
        winner: [rows, columns] or None, see `LogitStrips.dots`.
        rows, row_grad: [rows, Q, d].
        texts, text_grad: [columns, d].
    """
    for q in range(rows.shape[1]):
        of_query = dots_grad if winner is None else dots_grad.masked_fill(winner != q, 0.0)
        row_grad[:, q] += of_query @ texts
        if text_grad is not None:
            text_grad += of_query.mT @ rows[:, q]
