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

_LARGE = 2.0**22  # from these logits on the CPU kernels take float32's rounded logit, which is a whole number


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
    target = _base_2(target, logit_scale.reshape(()).double(), rounded=sums.dtype != torch.float64)
    loss = (reference + total.log2() - target) / LOG2E
    # A cross-entropy is at least 0: anything else is rounding, but NaN stays.
    loss = torch.where((loss <= 0.0) | ((classes == 1.0) & ~loss.isnan()), 0.0, loss)
    return torch.where(positives > 0, loss, 0.0)


def _base_2(dots: Tensor, scale: Tensor, rounded: bool) -> Tensor:
    """Returns the logits to the base 2, in the order of operations in which `reduction.REFERENCE` is computed.

    Args:
        dots, scale: float64.
        rounded: as float32 has them where they are large.
    """
    logits = (scale * dots) * LOG2E
    if not rounded:
        return logits
    exact = scale * LOG2E
    factor = exact.float()
    factor = torch.where(factor.double().abs() > exact.abs(), factor.nextafter(torch.zeros_like(factor)), factor)
    near = (dots.float() * factor).double()
    return torch.where((near.abs() > _LARGE) & ((logits - near).abs() > 0.75), near, logits)
