"""The contrastive loss in plain PyTorch: bands of rows, each against all texts, so that memory is linear."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmkernels.ops.contrastive.formula import LOG2E, Pairs, count_before, ranks
from mmkernels.ops.contrastive.info_nce.reduction import Arguments
from mmkernels.ops.contrastive.strips import LogitStrips, add_products


def _strips(args: Any) -> LogitStrips:
    return LogitStrips(
        args.image, args.text, args.logit_scale, args.image_ids, args.text_ids, args.ignore,
        args.hard_texts, args.hard_text_ids,
    )  # fmt: skip


# Forward.


class RunningSoftmax:
    """The running state of one direction's rows, see `reduction.REFERENCE`, and sums for the loss.

    Blocks of columns may come in any order and from anywhere.
    """

    def __init__(self, rows: int, like: Tensor, dtype: torch.dtype) -> None:
        self.largest = like.new_full((rows,), -torch.inf, dtype=dtype)
        self.sum, self.sum_of_positives, self.sum_of_all, self.positives, self.classes = (
            like.new_zeros(rows, dtype=dtype) for _ in range(5)
        )

    def weights(self, distance: Tensor) -> Tensor:
        """Returns how a pair weighs in a sum whose largest logit is this far away."""
        return distance.exp()

    def add(self, at: slice, logits: Tensor, pairs: Pairs | None) -> None:
        """Add a block of columns to the rows `at`.

        Args:
            logits: [rows, columns].
            pairs: None: all are negatives.
        """
        visible = logits if pairs is None else pairs.visible(logits, -torch.inf)
        largest = torch.maximum(self.largest[at], visible.amax(1))
        base = largest.masked_fill(largest == -torch.inf, 0.0)
        total = self.weights(visible - base[:, None]).sum(1)
        self.sum[at] = self.sum[at] * self.weights(self.largest[at] - base) + total
        self.largest[at] = largest
        if pairs is not None:
            self.sum_of_positives[at] += logits.masked_fill(~pairs.positive, 0.0).sum(1)
            self.positives[at] += pairs.positive.sum(1)
        self.sum_of_all[at] += (logits if pairs is None else pairs.visible(logits, 0.0)).sum(1)
        self.classes[at] += logits.shape[1] if pairs is None else pairs.classes()

    def loss(self, label_smoothing: float) -> Tensor:
        """Returns [rows], 0 where a row has no positive."""
        # Relative to the largest logit, which cancels exactly: a loss near 0 is exact only then.
        target = self.sum_of_positives / self.positives.clamp(min=1) - self.largest
        if label_smoothing > 0.0:
            mean = self.sum_of_all / self.classes - self.largest
            target = (1.0 - label_smoothing) * target + label_smoothing * mean
        return torch.where(self.positives > 0, self.sum.log() - target, 0.0)

    def state(self) -> Tensor:
        """Returns [4, rows]."""
        return torch.stack([self.largest * LOG2E, self.sum, self.positives, self.classes])


def forward(args: Arguments) -> tuple[Tensor, ...]:
    """Returns `Results` but for the loss."""
    strips = _strips(args)
    images, texts = (RunningSoftmax(len(x), x, strips.dtype) for x in (args.image, args.text))
    all_texts = slice(0, len(args.text))
    for at in strips:
        pairs = strips.pairs(at)
        logits = strips.logits(at, strips.text)
        images.add(at, logits, pairs)
        texts.add(all_texts, logits.mT, pairs.transposed())
        if strips.hard is not None:
            images.add(at, strips.logits(at, strips.hard), strips.hard_pairs(at))
    losses = images.loss(args.label_smoothing), texts.loss(args.label_smoothing)
    no_ranks = (args.image.new_empty(0, dtype=torch.int64) for _ in range(2))
    return *losses, images.state(), texts.state(), *(_ranks(strips) if args.stats else no_ranks)


# Ranks.


class TextPositives(NamedTuple):
    """The positives of all texts, [M]: how many there are, the best one's logit and its image."""

    counts: Tensor
    best: Tensor
    best_image: Tensor


def _ranks(strips: LogitStrips) -> tuple[Tensor, Tensor]:
    """Returns the ranks of images and texts. Texts take a second pass: their best positives must be known first."""
    image_ranks, positives = _image_ranks(strips)
    return image_ranks, _text_ranks(strips, positives)


def _image_ranks(strips: LogitStrips) -> tuple[Tensor, TextPositives]:
    """Returns the ranks [N], and what the texts' ranks need."""
    device, texts = strips.image.device, len(strips.text)
    image_ranks = torch.empty(len(strips.image), dtype=torch.int64, device=device)
    best = torch.full((texts,), -torch.inf, dtype=strips.dtype, device=device)
    best_image, counts = (torch.zeros(texts, dtype=torch.int64, device=device) for _ in range(2))
    for at in strips:
        pairs = strips.pairs(at)
        logits = strips.logits(at, strips.text)
        positives = logits.masked_fill(~pairs.positive, -torch.inf)
        image_ranks[at] = _ranks_of_strip(strips, at, logits, pairs)
        text_best = positives.amax(0)
        better = (text_best > best) | text_best.isnan()
        best_image = torch.where(better, positives.argmax(0) + at.start, best_image)
        best = torch.where(better, text_best, best)
        counts += pairs.positive.sum(0)
    return image_ranks, TextPositives(counts, best, best_image)


def _ranks_of_strip(strips: LogitStrips, at: slice, logits: Tensor, pairs: Pairs) -> Tensor:
    """Returns the ranks of a strip's images, [rows], from the batch's logits and pairs [rows, M]."""
    if strips.hard is not None:
        logits = torch.cat([logits, strips.logits(at, strips.hard)], 1)
        pairs = pairs.with_hard_texts(len(strips.hard), strips.hard_pairs(at))
    positives = logits.masked_fill(~pairs.positive, -torch.inf)
    best, index, negative = positives.amax(1), positives.argmax(1), pairs.negative
    return ranks(count_before(logits, best, index, negative), best, negative.sum(1), pairs.positive.any(1))


def _text_ranks(strips: LogitStrips, positives: TextPositives) -> Tensor:
    """Returns the ranks [M]."""
    before, negatives = torch.zeros_like(positives.counts), torch.zeros_like(positives.counts)
    for at in strips:
        pairs = strips.pairs(at).transposed()
        logits = strips.logits(at, strips.text).mT
        negative = pairs.negative
        before += count_before(logits, positives.best, positives.best_image, negative, first=at.start)
        negatives += negative.sum(1)
    return ranks(before, positives.best, negatives, positives.counts > 0)


# Backward.


class LogitGradient:
    """The gradient of one direction's losses by its logits."""

    def __init__(self, state: Tensor, grad: Tensor, label_smoothing: float) -> None:
        self.reference, total, positives, classes = state
        grad = torch.where(positives > 0, grad.to(total.dtype), 0.0)
        self.of_softmax = grad / total
        self.of_positive = (1.0 - label_smoothing) * grad / positives.clamp(min=1)
        self.of_class = label_smoothing * grad / classes if label_smoothing > 0.0 else None

    def exponents(self, at: slice, logits: Tensor) -> Tensor:
        """Returns the logits of the rows `at` to the base 2, less their references."""
        return logits * LOG2E - self.reference[at, None]

    def add(self, into: Tensor, at: slice, logits: Tensor, pairs: Pairs | None) -> None:
        """Add the gradient of a block of columns of the rows `at` to `into`; see `RunningSoftmax.add`."""
        gradient = torch.exp2(self.exponents(at, logits)) * self.of_softmax[at, None]
        if self.of_class is not None:
            gradient -= self.of_class[at, None]
        if pairs is not None:
            gradient -= self.of_positive[at, None] * pairs.positive
            if pairs.hidden is not None:
                gradient.masked_fill_(pairs.hidden, 0.0)
        into += torch.where(self.of_softmax[at, None] == 0.0, 0.0, gradient)


_Block = tuple[Tensor, Pairs | None, Tensor | None, LogitGradient | None]
"""Texts, how they and some images belong together, their gradient, and the gradient of their direction's logits."""


def backward(args: Any) -> tuple[Tensor, ...]:
    """Returns the gradients of image, text, logit_scale and hard_texts, empty where none is needed."""
    strips = _strips(args)
    image_grad = torch.empty_like(strips.image, memory_format=torch.contiguous_format) if args.need_image else None
    text_grad = strips.text.new_zeros(strips.text.shape) if args.need_text else None
    hard_grad = strips.hard.new_zeros(strips.hard.shape) if args.need_hard_texts and strips.hard is not None else None
    scale_grad = torch.zeros((), dtype=strips.dtype, device=args.image.device)
    of_images, of_texts = (
        None if grad is None else LogitGradient(state, grad, args.label_smoothing)
        for state, grad in (
            (args.image_state, args.grad_image_loss),
            (args.text_state, args.grad_text_loss),
        )
    )
    all_texts = slice(0, len(args.text))
    for at in strips:
        rows = strips.image[at].to(strips.dtype)
        row_grad = torch.zeros_like(rows)
        blocks: list[_Block] = [(strips.text, strips.pairs(at), text_grad, of_texts)]
        if strips.hard is not None:
            blocks.append((strips.hard, strips.hard_pairs(at), hard_grad, None))
        for texts, pairs, grad, of_columns in blocks:
            dots, winner = strips.dots(at, texts)
            logits, logits_grad = dots * strips.scale, torch.zeros_like(dots)
            if of_images is not None:
                of_images.add(logits_grad, at, logits, pairs)
            if of_columns is not None:
                assert pairs is not None
                of_columns.add(logits_grad.mT, all_texts, logits.mT, pairs.transposed())
            scale_grad += (logits_grad * dots).sum()
            add_products(logits_grad.mul_(strips.scale), winner, rows, texts, row_grad, grad)
        if image_grad is not None:
            image_grad[at] = row_grad.to(args.image.dtype)
    if args.need_hard_texts and args.hard_texts is not None and hard_grad is None:
        hard_grad = torch.zeros_like(args.hard_texts)  # [0, d]
    grads = (
        None if image_grad is None else image_grad.reshape(args.image.shape),
        None if text_grad is None else text_grad.to(args.text.dtype),
        scale_grad.to(args.logit_scale.dtype).reshape(args.logit_scale.shape) if args.need_logit_scale else None,
        None if hard_grad is None else hard_grad.to(args.image.dtype),
    )
    return tuple(args.image.new_empty(0) if x is None else x for x in grads)
