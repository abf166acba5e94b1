"""The contrastive loss in plain PyTorch: strips of rows, each against all texts, so that memory is linear."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmkernels.ops.contrastive.formula import LOG2E, ranks
from mmkernels.ops.contrastive.info_nce.reduction import Arguments
from mmkernels.ops.contrastive.strips import Strips, add_products


class Softmax:
    """The running state of one direction's rows, as `reduction.REFERENCE` says, and sums for the loss.

    Blocks of columns may come in any order and from anywhere.
    """

    def __init__(self, rows: int, like: Tensor, dtype: torch.dtype) -> None:
        self.largest = like.new_full((rows,), -torch.inf, dtype=dtype)
        self.sum, self.of_positives, self.of_all, self.positives, self.classes = (
            like.new_zeros(rows, dtype=dtype) for _ in range(5)
        )

    def add(self, at: slice, logits: Tensor, positive: Tensor | None, hidden: Tensor | None) -> None:
        """A block of columns for the rows `at`: logits [rows, columns]; positive None: there is none among them."""
        seen = logits if hidden is None else logits.masked_fill(hidden, -torch.inf)
        largest = torch.maximum(self.largest[at], seen.amax(1))
        base = largest.masked_fill(largest == -torch.inf, 0.0)
        total = (seen - base[:, None]).exp().sum(1)
        self.sum[at] = self.sum[at] * (self.largest[at] - base).exp() + total
        self.largest[at] = largest
        if positive is not None:
            self.of_positives[at] += logits.masked_fill(~positive, 0.0).sum(1)
            self.positives[at] += positive.sum(1)
        self.of_all[at] += (logits if hidden is None else logits.masked_fill(hidden, 0.0)).sum(1)
        self.classes[at] += logits.shape[1] if hidden is None else (~hidden).sum(1)

    def loss(self, label_smoothing: float) -> Tensor:
        """[rows], 0 where a row has no positive."""
        # Relative to the largest, of which a mean takes as much away as it adds: near 0 nothing else is exact.
        target = self.of_positives / self.positives.clamp(min=1) - self.largest
        if label_smoothing > 0.0:
            even = self.of_all / self.classes - self.largest
            target = (1.0 - label_smoothing) * target + label_smoothing * even
        return torch.where(self.positives > 0, self.sum.log() - target, 0.0)

    def state(self) -> Tensor:
        """[4, rows]."""
        return torch.stack([self.largest * LOG2E, self.sum, self.positives, self.classes])


def forward(args: Arguments) -> tuple[Tensor, ...]:
    """Returns the rows of both directions."""
    image, text, logit_scale, hard_texts = args.image, args.text, args.logit_scale, args.hard_texts
    image_ids, text_ids, ignore, label_smoothing = args.image_ids, args.text_ids, args.ignore, args.label_smoothing
    strips = Strips(image, text, logit_scale, image_ids, text_ids, ignore, hard_texts)
    sides = [Softmax(n, image, strips.dtype) for n in (image.shape[0], text.shape[0])]
    every = slice(0, text.shape[0])
    for at in strips:
        positive, hidden = strips.pairs(at)
        logits = strips.dots(at, strips.text)[0].mul_(strips.scale)
        sides[0].add(at, logits, positive, hidden)
        sides[1].add(every, logits.mT, positive.mT, None if hidden is None else hidden.mT)
        if strips.hard is not None and len(strips.hard):
            sides[0].add(at, strips.dots(at, strips.hard)[0].mul_(strips.scale), None, None)
    found = _ranks(strips) if args.stats else [image.new_empty(0, dtype=torch.int64) for _ in sides]
    return (*(side.loss(label_smoothing) for side in sides), *(side.state() for side in sides), *found)


def _ranks(strips: Strips) -> list[Tensor]:
    """Of both directions, -1 where a row has no positive: the columns' best positives must be known before counting."""
    device, count = strips.image.device, strips.text.shape[0]
    image_ranks = torch.empty(strips.image.shape[0], dtype=torch.int64, device=device)
    best = torch.full((count,), -torch.inf, dtype=strips.dtype, device=device)
    place, has = (torch.zeros(count, dtype=torch.int64, device=device) for _ in range(2))
    for at in strips:
        positive, hidden = strips.pairs(at)
        logits = strips.dots(at, strips.text)[0].mul_(strips.scale)
        only = logits.masked_fill(~positive, -torch.inf)
        of_rows, of_columns = only.amax(1), only.amax(0)
        more = (of_columns > best) | of_columns.isnan()
        place = torch.where(more, only.argmax(0) + at.start, place)
        best = torch.where(more, of_columns, best)
        has += positive.sum(0)
        negative = ~positive if hidden is None else ~(positive | hidden)
        found, negatives = ranks(logits, of_rows, only.argmax(1), negative), negative.sum(1)
        if strips.hard is not None and len(strips.hard):
            of_hard = strips.dots(at, strips.hard)[0].mul_(strips.scale)
            every = torch.ones_like(of_hard, dtype=torch.bool)
            found += ranks(of_hard, of_rows, only.argmax(1), every, count)
            negatives += len(strips.hard)
        found = torch.where(of_rows.isnan(), negatives, found)
        image_ranks[at] = torch.where(positive.any(1), found, -1)
    text_ranks, negatives = (torch.zeros(count, dtype=torch.int64, device=device) for _ in range(2))
    for at in strips:
        positive, hidden = strips.pairs(at)
        negative = ~positive if hidden is None else ~(positive | hidden)
        logits = strips.dots(at, strips.text)[0].mul_(strips.scale)
        text_ranks += ranks(logits.mT, best, place, negative.mT, at.start)
        negatives += negative.sum(0)
    text_ranks = torch.where(best.isnan(), negatives, text_ranks)
    return [image_ranks, torch.where(has > 0, text_ranks, -1)]


def backward(args: Any) -> tuple[Tensor, ...]:
    """Returns the gradients of image, text, logit_scale and hard_texts."""
    image, text, logit_scale, hard_texts = args.image, args.text, args.logit_scale, args.hard_texts
    image_ids, text_ids, ignore, label_smoothing = args.image_ids, args.text_ids, args.ignore, args.label_smoothing
    strips = Strips(image, text, logit_scale, image_ids, text_ids, ignore, hard_texts)
    of_image = torch.empty_like(strips.image, memory_format=torch.contiguous_format) if args.need_image else None
    of_text = torch.zeros_like(strips.text) if args.need_text else None
    of_hard = torch.zeros_like(strips.hard) if args.need_hard_texts and strips.hard is not None else None
    of_scale = torch.zeros((), dtype=strips.dtype, device=image.device)
    gradients = [
        None if grad is None else _Gradient(state, grad, label_smoothing)
        for state, grad in ((args.image_state, args.grad_image_loss), (args.text_state, args.grad_text_loss))
    ]
    every = slice(0, text.shape[0])
    for at in strips:
        rows = strips.image[at].to(strips.dtype)
        mine = torch.zeros_like(rows)
        for hard, texts, into in ((False, strips.text, of_text), (True, strips.hard, of_hard)):
            if texts is None or not len(texts):
                continue
            dots, query = strips.dots(at, texts)
            logits, of_logits = dots * strips.scale, torch.zeros_like(dots)
            positive, hidden = (None, None) if hard else strips.pairs(at)
            if gradients[0] is not None:
                gradients[0].add(of_logits, at, logits, positive, hidden)
            if gradients[1] is not None and not hard:
                turned = (None if x is None else x.mT for x in (positive, hidden))
                gradients[1].add(of_logits.mT, every, logits.mT, *turned)
            of_scale += (of_logits * dots).sum()
            of_logits *= strips.scale
            add_products(of_logits, query, rows, texts, mine, into)
        if of_image is not None:
            of_image[at] = mine.to(image.dtype)
    grads = (
        None if of_image is None else of_image.reshape(image.shape),
        None if of_text is None else of_text.to(text.dtype),
        of_scale.to(logit_scale.dtype).reshape(logit_scale.shape) if args.need_logit_scale else None,
        None if of_hard is None or hard_texts is None else of_hard.to(hard_texts.dtype),
    )
    return tuple(image.new_empty(0) if x is None else x for x in grads)


class _Gradient:
    """Of one direction's losses by its logits."""

    def __init__(self, state: Tensor, grad: Tensor, label_smoothing: float) -> None:
        self.reference, total, positives, classes = state
        grad = torch.where(positives > 0, grad.to(total.dtype), 0.0)
        self.of_softmax = grad / total
        self.of_positive = (1.0 - label_smoothing) * grad / positives.clamp(min=1)
        self.of_class = label_smoothing * grad / classes if label_smoothing > 0.0 else None

    def add(self, to: Tensor, at: slice, logits: Tensor, positive: Tensor | None, hidden: Tensor | None) -> None:
        """Add the rows `at` for a block of columns to `to` [rows, columns]."""
        found = torch.exp2(logits * LOG2E - self.reference[at, None]) * self.of_softmax[at, None]
        if self.of_class is not None:
            found -= self.of_class[at, None]
        if positive is not None:
            found -= self.of_positive[at, None] * positive
        if hidden is not None:
            found.masked_fill_(hidden, 0.0)
        to += torch.where(self.of_softmax[at, None] == 0.0, 0.0, found)
