"""Strips of logits: some images against all texts, for the backends in plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from mmkernels.ops.common.dtypes import wide_dtype
from mmkernels.ops.contrastive.formula import pairs, queries_of

STRIP_BYTES = 2**22  # of one strip; some six of them are alive at once


class Strips:
    """The tensors of a call; iterating walks over its rows, strip by strip."""

    def __init__(
        self,
        image: Tensor,
        text: Tensor,
        logit_scale: Tensor,
        image_ids: Tensor | None,
        text_ids: Tensor | None,
        ignore: bool = False,
        hard_texts: Tensor | None = None,
    ) -> None:
        self.dtype = wide_dtype(image)
        self.image = queries_of(image)  # [N, Q, d]
        self.scale = logit_scale.reshape(()).to(self.dtype)
        self.text = text.to(self.dtype)
        self.hard = None if hard_texts is None else hard_texts.to(self.dtype)
        self.ids = image_ids, text_ids, ignore

    def __iter__(self) -> Iterator[slice]:
        rows, queries, _ = self.image.shape
        columns = max(len(self.text), 0 if self.hard is None else len(self.hard), 1)
        row_bytes = self.dtype.itemsize * queries * columns
        step = max(1, STRIP_BYTES // row_bytes)
        return (slice(first, min(first + step, rows)) for first in range(0, rows, step))

    def dots(self, at: slice, texts: Tensor) -> tuple[Tensor, Tensor | None]:
        """[rows, columns], and which query gave each; None: there is one."""
        image = self.image[at].to(self.dtype)
        if image.shape[1] == 1:
            return image[:, 0] @ texts.mT, None
        return (image @ texts.mT).max(1)

    def pairs(self, at: slice) -> tuple[Tensor, Tensor | None]:
        columns = (0, self.text.shape[0])
        return pairs(*self.ids, (at.start, at.stop), columns, self.image.device)


def add_products(
    of_dots: Tensor, query: Tensor | None, rows: Tensor, texts: Tensor, of_rows: Tensor, of_texts: Tensor | None
) -> None:
    """Add what flows from a strip's products [rows, columns] to its rows [rows, Q, d] and the texts [columns, d]."""
    for q in range(rows.shape[1]):
        part = of_dots if query is None else of_dots.masked_fill(query != q, 0.0)
        of_rows[:, q] += part @ texts
        if of_texts is not None:
            of_texts += part.mT @ rows[:, q]
