"""Sums of rows over blocks of columns: how blocks from anywhere add up, and the losses of their total."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.ops.contrastive.formula import LOG2E
from mmkernels.ops.contrastive.info_nce.reduction import REFERENCE, SUM

POSITIVE_DOTS, ALL_DOTS = 4, 5
"""Rows of sums ``[6, rows]`` after those of a state, see `reduction.REFERENCE`: the sum of the positives' dots (which
the scale has not multiplied), and that of all visible pairs, which is 0 where no label smoothing needs it. A row that
sees nothing has the reference -inf and the sum 0."""


def merge(a: Tensor, b: Tensor) -> Tensor:
    """Returns the sums [6, rows] of the same rows over the columns of two blocks.

    Args:
        a, b: float32 or float64 [6, rows].
    """
    top = torch.maximum(a[REFERENCE], b[REFERENCE])
    base = top.masked_fill(top == -torch.inf, 0.0)
    merged = a + b
    merged[REFERENCE] = top
    merged[SUM] = sum(x[SUM] * torch.exp2(x[REFERENCE] - base) for x in (a, b))
    return merged


def losses(sums: Tensor, logit_scale: Tensor, label_smoothing: float) -> Tensor:
    """Returns each row's cross-entropy, float64 [rows]; 0 where a row has no positive, and for a single class.

    Args:
        sums: float32 or float64 [6, rows], over all columns.
        logit_scale: one element.
    """
    reference, total, positives, classes, positive_dots, all_dots = sums.double()
    target = (1.0 - label_smoothing) * positive_dots / positives.clamp(min=1)
    if label_smoothing > 0.0:
        target = target + label_smoothing * all_dots / classes.clamp(min=1)
    # Both terms may be near 100 and their difference near 0.
    target = logits_in_base_2(target, logit_scale, narrow=sums.dtype != torch.float64)
    loss = (reference + total.log2() - target) / LOG2E
    # A cross-entropy is at least 0: anything else is rounding, but NaN stays.
    loss = torch.where((loss <= 0.0) | ((classes == 1.0) & ~loss.isnan()), 0.0, loss)
    return torch.where(positives > 0, loss, 0.0)


def logits_in_base_2(dots: Tensor, logit_scale: Tensor, narrow: bool) -> Tensor:
    """Returns float64 logits, in the order of operations in which references are computed.

    Args:
        dots: float32 or float64.
        narrow: as float32 kernels have them: a whole number, as float32 rounds it, and a fraction. From logits of
            millions on there is none, so that a dot's logit cancels against its own row's reference whatever its size.
    """
    scale = logit_scale.reshape(()).double()
    exact = (scale * dots.double()) * LOG2E
    if not narrow:
        return exact
    factor = (scale * LOG2E).float()  # towards 0, as in csrc/contrastive/launch.h
    too_large = factor.double().abs() > (scale * LOG2E).abs()
    factor = torch.where(too_large, factor.nextafter(torch.zeros_like(factor)), factor)
    whole = (dots.float() * factor).round().double()
    fraction = exact - whole
    return whole + torch.where(fraction.abs() <= 0.75, fraction, 0.0)
