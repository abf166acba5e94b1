"""The contrastive ops made of their block ops in one process: the pairs are cut into blocks, whose results add up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmkernels.ops.contrastive.formula import NO_PARTNERS
from mmkernels.ops.contrastive.info_nce import block as softmax
from mmkernels.ops.contrastive.info_nce.merging import losses, merge
from mmkernels.ops.contrastive.info_nce.reduction import CLASSES, POSITIVES
from mmkernels.ops.contrastive.inputs import check_ids, check_scalar
from mmkernels.ops.contrastive.retrieval_ranks import block as retrieval
from mmkernels.ops.contrastive.sigmoid_contrastive import block as sigmoid

Cuts = tuple[int, ...]


class Part(NamedTuple):
    """A block: these images and texts."""

    images: slice
    texts: slice

    @property
    def first_text(self) -> int:
        """Of pairs by place. Where none of the block's texts has its partner here, another value says the same."""
        first = self.texts.start - self.images.start
        apart = self.texts.stop <= self.images.start or self.images.stop <= self.texts.start
        return NO_PARTNERS if apart and self.images.start % 2 else first


def spans(count: int, cuts: Cuts) -> list[slice]:
    """Returns the rows between cuts, none of them empty."""
    ends = sorted({0, count, *(cut for cut in cuts if cut < count)})
    return [slice(first, last) for first, last in pairwise(ends)]


def parts(n: int, m: int, cuts: tuple[Cuts, Cuts]) -> Iterator[Part]:
    return (Part(i, j) for i in spans(n, cuts[0]) for j in spans(m, cuts[1]))


class _Rows(NamedTuple):
    """One direction's rows: sums over all blocks, and the best positives."""

    sums: Tensor  # [6, rows]
    best: Tensor
    index: Tensor
    before: Tensor


def info_nce_rows(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    ids: tuple[Tensor | None, Tensor | None],
    ignore: bool,
    smooth: bool,
    stats: bool,
    cuts: tuple[Cuts, Cuts],
    backend: str,
) -> tuple[_Rows, _Rows]:
    """Returns the rows of images and of texts."""
    sides = []
    for x in (image, text):
        none = x.new_full((len(x),), -torch.inf, dtype=_wide(x))
        sums = none.new_zeros(6, len(x))
        sums[0] = -torch.inf
        index = torch.zeros(len(x), dtype=torch.int64)
        sides.append(_Rows(sums, none, index, torch.zeros_like(index)))
    images, texts = sides
    for part in parts(len(image), len(text), cuts) if stats else ():
        args = softmax.BestArguments(*_inputs(image, text, scale, ids, part), ignore)
        image_best, image_index, text_best, text_index = softmax.BEST(args, backend)
        _keep_best(images, part.images, image_best, image_index + part.texts.start)
        _keep_best(texts, part.texts, text_best, text_index + part.images.start)
    for part in parts(len(image), len(text), cuts):
        bests: tuple[Tensor | None, ...] = (None,) * 4
        if stats:
            bests = (
                images.best[part.images], images.index[part.images] - part.texts.start,
                texts.best[part.texts], texts.index[part.texts] - part.images.start,
            )  # fmt: skip
        args = softmax.BlockArguments(*_inputs(image, text, scale, ids, part), ignore, smooth, *bests)
        image_sums, text_sums, image_before, text_before = softmax.BLOCK(args, backend)
        for rows, at, sums, before in (
            (images, part.images, image_sums, image_before), (texts, part.texts, text_sums, text_before),
        ):  # fmt: skip
            rows.sums[:, at] = merge(rows.sums[:, at], sums)
            if stats:
                rows.before[at] += before
    return images, texts


def _inputs(
    image: Tensor, text: Tensor, scale: Tensor, ids: tuple[Tensor | None, Tensor | None], part: Part
) -> tuple[Any, ...]:
    of_images, of_texts = (None if x is None else x[at] for x, at in zip(ids, part, strict=True))
    return image[part.images], text[part.texts], scale, of_images, of_texts, part.first_text


def _keep_best(rows: _Rows, at: slice, best: Tensor, index: Tensor) -> None:
    """Keep the better of two positives; NaN is the best, and of equals the lower index."""
    old, old_index = rows.best[at].clone(), rows.index[at].clone()
    better = (best > old) | (best.isnan() & ~old.isnan())
    rows.best[at] = torch.where(better, best, old)
    rows.index[at] = torch.where(better, index, old_index)


class _Loss(torch.autograd.Function):
    """The rows' losses, whose gradients are the blocks' sums."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, text: Tensor, scale: Tensor, options: dict[str, Any]) -> tuple[Tensor, ...]:
        smoothing, ids = options["label_smoothing"], options["ids"]
        with torch.no_grad():
            sides = info_nce_rows(
                image, text, scale, ids, options["ignore"], smoothing > 0, options["stats"], options["cuts"],
                options["backend"],
            )  # fmt: skip
        options["sides"] = sides
        ctx.options = options
        ctx.save_for_backward(image, text, scale)
        return tuple(losses(x.sums, scale, smoothing).to(_wide(image)) for x in sides)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        image, text, scale = ctx.saved_tensors
        options, wide = ctx.options, _wide(image)
        images, texts = (x.sums[:4] for x in options["sides"])
        of_image, of_text = (torch.zeros(x.shape, dtype=wide) for x in (image, text))
        of_scale = torch.zeros((), dtype=torch.float64)
        for part in parts(len(image), len(text), options["cuts"]):
            args = softmax.BackwardArguments(
                *_inputs(image, text, scale, options["ids"], part), options["ignore"], options["stats"],
                options["label_smoothing"],
                middle_of(images, scale), images[:, part.images], texts[:, part.texts],
                grads[0].to(wide)[part.images], grads[1].to(wide)[part.texts], *ctx.needs_input_grad[:3],
            )  # fmt: skip
            more = softmax.BACKWARD(args, options["backend"])
            for total, at, grad in zip((of_image, of_text, of_scale), (*part, ...), more, strict=True):
                if grad.numel():
                    total[at] += grad
        return of_image.to(image.dtype), of_text.to(text.dtype), of_scale.to(scale.dtype).reshape(scale.shape), None


def middle_of(state: Tensor, scale: Tensor) -> float:
    """Returns a typical dot: between the mean of a row's dots and the largest."""
    reference, total, _, classes = state.double()
    middle = float(((reference + (total / classes).log2()) / (scale.double() * 1.4426950408889634)).mean())
    return middle if abs(middle) < 1e30 else 0.0


def info_nce_by_blocks(cuts: tuple[Cuts, Cuts]) -> Callable[..., Any]:
    """Returns `info_nce` made of blocks."""

    def call(
        image: Tensor,
        text: Tensor,
        logit_scale: Tensor,
        *,
        image_ids: Tensor | None = None,
        text_ids: Tensor | None = None,
        same_id: str = "positive",
        label_smoothing: float = 0.0,
        image_weight: float = 0.5,
        reduction: str = "mean",
        return_stats: bool = False,
        backend: str = "",
    ) -> Any:
        ids = check_ids(image_ids, text_ids, image, text, paired=False)
        scale = check_scalar("logit_scale", logit_scale, image)
        options: dict[str, Any] = {
            "ids": ids, "ignore": same_id == "ignore", "label_smoothing": label_smoothing, "stats": return_stats,
            "cuts": cuts, "backend": backend,
        }  # fmt: skip
        rows = _Loss.apply(image, text, scale, options)
        sides = options["sides"]
        counts = [(x.sums[POSITIVES] > 0).sum() for x in sides]
        loss: Any = rows
        if reduction != "none":
            weights = (image_weight, 1.0 - image_weight)
            sums = [
                x.sum() / n.clamp(min=1) if reduction == "mean" else x.sum() for x, n in zip(rows, counts, strict=True)
            ]
            loss = sum(w * x for w, x in zip(weights, sums, strict=True))
        if not return_stats:
            return loss
        stats = [statistics(x, count) for x, count in zip(sides, counts, strict=True)]
        return loss, tuple(x for pair in zip(*stats, strict=True) for x in pair)

    return call


def statistics(rows: _Rows, count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns accuracy, mean rank, and how many rows have no positive."""
    found = rows.sums[POSITIVES] > 0
    negatives = (rows.sums[CLASSES] - rows.sums[POSITIVES]).long()
    rank = torch.where(rows.best.isnan(), negatives, rows.before)
    wide = rows.sums.dtype
    mean = torch.where(found, rank, 0).sum().to(wide) / count
    return ((rank == 0) & found).sum().to(wide) / count, mean, len(found) - count


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class _Sigmoid(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, ids: Any, cuts: Any, backend: str
    ) -> Tensor:
        wide, inputs = _wide(image), (image, text, scale, bias)
        loss = torch.zeros((), dtype=wide)
        totals = [torch.zeros(x.shape, dtype=wide) for x in inputs]
        keep = ctx.needs_input_grad[:4]
        for part in parts(len(image), len(text), cuts):
            x, y, _, x_ids, y_ids, first_text = _inputs(image, text, scale, ids, part)
            args = sigmoid.BlockArguments(x, y, scale, bias, x_ids, y_ids, first_text, float(len(image)), *keep)
            more, *grads = sigmoid.BLOCK(args, backend)
            loss += more
            for total, at, grad in zip(totals, (*part, ..., ...), grads, strict=True):
                if grad.numel():
                    total[at] += grad
        ctx.save_for_backward(*(total.to(x.dtype) for total, x in zip(totals, inputs, strict=True)))
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return (*(x * grad.to(x.dtype) for x in ctx.saved_tensors), None, None, None)


def sigmoid_by_blocks(cuts: tuple[Cuts, Cuts]) -> Callable[..., Any]:
    """Returns `sigmoid_contrastive` made of blocks."""

    def call(
        image: Tensor,
        text: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor,
        *,
        image_ids: Tensor | None = None,
        text_ids: Tensor | None = None,
        backend: str = "",
    ) -> Tensor:
        ids = check_ids(image_ids, text_ids, image, text, paired=False)
        scale, bias = (check_scalar("x", x, image) for x in (logit_scale, logit_bias))
        loss: Tensor = _Sigmoid.apply(image, text, scale, bias, ids, cuts, backend)
        return loss

    return call


def ranks_by_blocks(cuts: tuple[Cuts, Cuts]) -> Callable[..., Any]:
    """Returns `retrieval_ranks` made of blocks."""

    def call(query: Tensor, gallery: Tensor, target: Tensor, *, backend: str = "") -> Tensor:
        ranks, nan = torch.zeros_like(target), torch.zeros(len(target), dtype=torch.bool)
        right = gallery[target]
        for part in parts(len(query), len(gallery), cuts):
            index = target[part.images] - part.texts.start
            args = retrieval.BlockArguments(query[part.images], gallery[part.texts], right[part.images], index)
            before = retrieval.BLOCK(args, backend)
            nan[part.images] |= before < 0
            ranks[part.images] += before
        return torch.where(nan, len(gallery) - 1, ranks)

    return call
