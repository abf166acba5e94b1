"""A block of the contrastive loss in plain PyTorch: products in the features' wide dtype, all else in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmkernels.ops.contrastive.formula import LOG2E, Pairs, count_before
from mmkernels.ops.contrastive.info_nce.chunked import LogitGradient, RunningSoftmax
from mmkernels.ops.contrastive.info_nce.reduction import CLASSES
from mmkernels.ops.contrastive.strips import LogitStrips, add_products


class _Strips(LogitStrips):
    """The bands of a block's record."""

    def __init__(self, args: Any) -> None:
        super().__init__(
            args.image, args.text, args.logit_scale, args.image_ids, args.text_ids, args.ignore,
            first_text=args.first_text,
        )  # fmt: skip
        self.wide_scale = args.logit_scale.reshape(()).double()
        self.sign = self.wide_scale.sign().to(self.dtype)

    def block(self, at: slice) -> tuple[Tensor, Tensor, Pairs]:
        """Returns the dots of a band, their logits in float64, and the pairs, [rows, M]."""
        dots = self.dots(at, self.text)[0]
        return dots, self.wide_scale * dots.double(), self.pairs(at)


def best(args: Any) -> tuple[Tensor, ...]:
    """Returns `block.Best`: a score is a dot times the scale's sign."""
    strips, (n, m) = _Strips(args), (len(args.image), len(args.text))
    image_best, image_index = strips.text.new_empty(n), torch.empty(n, dtype=torch.int64, device=args.image.device)
    text_best = strips.text.new_full((m,), -torch.inf)
    text_index = torch.zeros(m, dtype=torch.int64, device=args.image.device)
    for at in strips:
        dots = strips.dots(at, strips.text)[0].mul_(strips.sign)
        scores = dots.masked_fill_(~strips.pairs(at).positive, -torch.inf)
        image_best[at], image_index[at] = scores.amax(1), scores.argmax(1)
        score, index = scores.amax(0), scores.argmax(0) + at.start
        better = (score > text_best) | (score.isnan() & ~text_best.isnan())
        text_index = torch.where(better, index, text_index)
        text_best = torch.where(better, score, text_best)
    return image_best, image_index, text_best, text_index


def block(args: Any) -> tuple[Tensor, ...]:
    """Returns `block.Block`."""
    strips, (n, m) = _Strips(args), (len(args.image), len(args.text))
    images, texts = (RunningSoftmax(rows, args.image, torch.float64) for rows in (n, m))
    counted = args.image_best is not None
    image_before, text_before = (args.image.new_zeros(x if counted else 0, dtype=torch.int64) for x in (n, m))
    for at in strips:
        dots, logits, pairs = strips.block(at)
        wide = dots.double()
        images.add(at, logits, pairs, wide)
        texts.add(slice(0, m), logits.mT, pairs.transposed(), wide.mT)
        if counted:
            scores, negative = dots.mul_(strips.sign), pairs.negative
            image_before[at] = count_before(scores, args.image_best[at], args.image_index[at], negative)
            text_before += count_before(scores.mT, args.text_best, args.text_index, negative.mT, first=at.start)
    sums = (_sums(x, args.smooth, strips.dtype) for x in (images, texts))
    return (*sums, image_before, text_before)


def _sums(rows: RunningSoftmax, smooth: bool, dtype: torch.dtype) -> Tensor:
    """Returns sums [6, rows], see `merging.POSITIVE_DOTS`. In float32 their reference is a whole number."""
    reference, total = rows.largest * LOG2E, rows.sum
    if dtype != torch.float64:
        whole = reference.round().to(dtype).double()
        total = total * torch.exp2(torch.where(reference == whole, 0.0, reference - whole))
        reference = whole
    of_all = rows.sum_of_all if smooth else torch.zeros_like(total)
    return torch.stack([reference, total, rows.positives, rows.classes, rows.sum_of_positives, of_all]).to(dtype)


def backward(args: Any) -> tuple[Tensor, ...]:
    """Returns `block.BlockGradients`."""
    strips = _Strips(args)
    of_image = strips.text.new_empty(strips.image.shape) if args.need_image else None
    of_text = torch.zeros_like(strips.text) if args.need_text else None
    of_scale = strips.wide_scale.new_zeros(())
    of_images, of_texts = (
        None if grad is None else _gradient(state.double(), grad.double(), args.label_smoothing)
        for state, grad in ((args.image_state, args.grad_image_loss), (args.text_state, args.grad_text_loss))
    )
    for at in strips:
        dots, winner = strips.dots(at, strips.text)
        logits, pairs = strips.wide_scale * dots.double(), strips.pairs(at)
        gradient = torch.zeros_like(logits)
        if of_images is not None:
            of_images.add(gradient, at, logits, pairs)
        if of_texts is not None:
            of_texts.add(gradient.mT, slice(0, len(args.text)), logits.mT, pairs.transposed())
        of_scale += (gradient * (dots.double() - args.middle)).sum()
        if of_image is None and of_text is None:
            continue
        rows = strips.image[at].to(strips.dtype)
        row_grad = torch.zeros_like(rows)
        add_products((strips.wide_scale * gradient).to(strips.dtype), winner, rows, strips.text, row_grad, of_text)
        if of_image is not None:
            of_image[at] = row_grad
    none = strips.text.new_empty(0)
    return (
        none if of_image is None else of_image.reshape(args.image.shape),
        none if of_text is None else of_text,
        of_scale.to(strips.dtype) if args.need_logit_scale else none,
    )


def _gradient(state: Tensor, grad: Tensor, label_smoothing: float) -> LogitGradient:
    """Returns the gradient of one direction's losses; a single class has the probability 1 whatever its logit is."""
    return LogitGradient(state, torch.where(state[CLASSES] == 1.0, 0.0, grad), label_smoothing)
