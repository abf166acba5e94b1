"""A block of the contrastive loss in plain PyTorch: bands of rows, each against all of the block's texts.

Exponents are differences of dots times the scale, not of logits: what multiplying rounds in a logit of 100 is lost from
no exponential, and where dots meet those of other blocks, in the rows' references, there is float64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmkernels.ops.common.results import or_empty
from mmkernels.ops.contrastive.formula import LOG2E, count_before
from mmkernels.ops.contrastive.info_nce.chunked import LogitGradient, RunningSoftmax
from mmkernels.ops.contrastive.info_nce.merging import logits_in_base_2
from mmkernels.ops.contrastive.info_nce.reduction import CLASSES
from mmkernels.ops.contrastive.strips import LogitStrips, add_products

_LARGE = 2.0**22  # a logit to the base 2
_SMALLEST = 1.2e-38  # of a scale: 0 would turn the -inf of hidden pairs into NaN


class _Strips(LogitStrips):
    """The bands of a block's record."""

    def __init__(self, args: Any) -> None:
        super().__init__(
            args.image, args.text, args.logit_scale, args.image_ids, args.text_ids, args.ignore,
            first_text=args.first_text,
        )  # fmt: skip
        self.sign = self.scale.sign()

    def scores(self, at: slice) -> Tensor:
        """Returns the dots [rows, M] times the scale's sign: in the order of logits."""
        return self.dots(at, self.text)[0].mul_(self.sign)


class _RunningScores(RunningSoftmax):
    """The running state of rows to which scores are added instead of logits."""

    def __init__(self, rows: int, strips: _Strips) -> None:
        super().__init__(rows, strips.text, strips.dtype)
        self.sign, self.scale = strips.sign, strips.scale
        self.factor = strips.scale.abs().clamp(min=_SMALLEST)

    def weights(self, distance: Tensor) -> Tensor:
        return (distance * self.factor).exp()

    def sums(self, smooth: bool) -> Tensor:
        """Returns [6, rows], see `merging.POSITIVE_DOTS`. In float32 the reference is a whole number."""
        dtype = self.sum.dtype
        narrow = dtype != torch.float64
        logits = logits_in_base_2(self.largest * self.sign, self.scale, narrow)
        logits = torch.where(self.largest == -torch.inf, -torch.inf, logits)
        reference, total = logits, self.sum.double()
        if narrow:
            reference = logits.round().to(dtype).double()
            total = total * torch.exp2(torch.where(logits == reference, 0.0, logits - reference))
        of_positives, of_all = self.sum_of_positives * self.sign, self.sum_of_all * self.sign
        if not smooth:
            of_all = torch.zeros_like(of_all)
        return torch.stack([reference.to(dtype), total.to(dtype), self.positives, self.classes, of_positives, of_all])


class _DotGradient(LogitGradient):
    """The gradient of one direction's losses, to which dots are given instead of logits.

    Args:
        state: [4, rows].
        grad: [rows]. A single class has the probability 1 whatever its logit is, and no gradient.
        scale: 0-D, in the state's dtype.
    """

    def __init__(self, state: Tensor, grad: Tensor, label_smoothing: float, scale: Tensor) -> None:
        super().__init__(state, torch.where(state[CLASSES] == 1.0, 0.0, grad), label_smoothing)
        factor, reference = scale.double() * LOG2E, self.reference.double()
        # The dot of the reference, as it is represented, and what is left of the reference.
        dot = torch.where(factor == 0.0, 0.0, reference / factor).to(scale.dtype)
        dot = torch.where(dot.isfinite(), dot, 0.0)
        self.dot, self.rest = dot, (dot.double() * factor - reference).to(scale.dtype)
        self.scale, self.factor, self.narrow = scale, factor.to(scale.dtype), scale.dtype != torch.float64
        # In float64 there are digits enough; beyond millions a dot's last digit is more than a unit of its logit.
        self.rounded = not self.narrow or bool((self.reference.abs() >= _LARGE).any())

    def exponents(self, at: slice, dots: Tensor) -> Tensor:
        if self.rounded:
            logits = logits_in_base_2(dots, self.scale, self.narrow)
            return (logits - self.reference[at, None].double()).to(dots.dtype)
        return (dots - self.dot[at, None]).mul_(self.factor).add_(self.rest[at, None])


def best(args: Any) -> tuple[Tensor, ...]:
    """Returns `block.Best`: a score is a dot times the scale's sign."""
    strips, (n, m) = _Strips(args), (len(args.image), len(args.text))
    image_best, image_index = strips.text.new_empty(n), torch.empty(n, dtype=torch.int64, device=args.image.device)
    text_best = strips.text.new_full((m,), -torch.inf)
    text_index = torch.zeros(m, dtype=torch.int64, device=args.image.device)
    for at in strips:
        scores = strips.scores(at).masked_fill_(~strips.pairs(at).positive, -torch.inf)
        image_best[at], image_index[at] = scores.amax(1), scores.argmax(1)
        score, index = scores.amax(0), scores.argmax(0) + at.start
        better = (score > text_best) | (score.isnan() & ~text_best.isnan())
        text_index = torch.where(better, index, text_index)
        text_best = torch.where(better, score, text_best)
    return image_best, image_index, text_best, text_index


def block(args: Any) -> tuple[Tensor, ...]:
    """Returns `block.Block`."""
    strips, (n, m) = _Strips(args), (len(args.image), len(args.text))
    images, texts = (_RunningScores(rows, strips) for rows in (n, m))
    counted = args.image_best is not None
    image_before, text_before = (args.image.new_zeros(x if counted else 0, dtype=torch.int64) for x in (n, m))
    for at in strips:
        scores, pairs = strips.scores(at), strips.pairs(at)
        images.add(at, scores, pairs)
        texts.add(slice(0, m), scores.mT, pairs.transposed())
        if counted:
            negative = pairs.negative
            image_before[at] = count_before(scores, args.image_best[at], args.image_index[at], negative)
            text_before += count_before(scores.mT, args.text_best, args.text_index, negative.mT, first=at.start)
    return images.sums(args.smooth), texts.sums(args.smooth), image_before, text_before


def backward(args: Any) -> tuple[Tensor, ...]:
    """Returns `block.BlockGradients`."""
    strips = _Strips(args)
    of_image = strips.text.new_empty(strips.image.shape) if args.need_image else None
    of_text = torch.zeros_like(strips.text) if args.need_text else None
    of_scale = torch.zeros((), dtype=torch.float64, device=args.image.device)
    of_images, of_texts = (
        None if grad is None else _DotGradient(state.to(strips.dtype), grad, args.label_smoothing, strips.scale)
        for state, grad in ((args.image_state, args.grad_image_loss), (args.text_state, args.grad_text_loss))
    )
    for at in strips:
        dots, winner = strips.dots(at, strips.text)
        pairs, gradient = strips.pairs(at), torch.zeros_like(dots)
        if of_images is not None:
            of_images.add(gradient, at, dots, pairs)
        if of_texts is not None:
            of_texts.add(gradient.mT, slice(0, len(args.text)), dots.mT, pairs.transposed())
        if args.need_logit_scale:
            of_scale += (gradient * (dots - args.middle)).sum(dtype=torch.float64)
        if of_image is None and of_text is None:
            continue
        rows = strips.image[at].to(strips.dtype)
        row_grad = torch.zeros_like(rows)
        add_products(gradient.mul_(strips.scale), winner, rows, strips.text, row_grad, of_text)
        if of_image is not None:
            of_image[at] = row_grad
    found = (
        None if of_image is None else of_image.reshape(args.image.shape),
        of_text,
        of_scale.to(strips.dtype) if args.need_logit_scale else None,
    )
    return tuple(or_empty(x, strips.text) for x in found)
