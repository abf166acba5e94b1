"""Masks that a model builds as a matrix, bool or to be added to the scores, for `cross_attention`; no value is read.

On a GPU nothing waits for the device, so that these are for models that make a new matrix in each layer.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mmkernels.masks import SpanMask
from mmkernels.runtime.checks import can_look

_HIDES = 5000.0
"""How far below a query's largest bias one is that hides: models write -10,000, or the dtype's least number."""


class Visible(NamedTuple):
    """A matrix as arguments of `cross_attention`."""

    mask: SpanMask | Tensor | None = None
    bias: Tensor | None = None


def read_mask(mask: Tensor | None, dtype: torch.dtype) -> Visible:
    """Returns what a matrix hides, and what it adds to the scores.

    Args:
        mask: ``[B or 1, H or 1, Lq or 1, Lk]``: bool, True = visible; or numbers that are added to the scores. One that
            is more than 5,000 below the largest of its query hides its key, whose weight would be 0. Where all keys of
            a query have the same, none is hidden, as in a softmax.
        dtype: the query's, to which a bias is converted unless it is float32.
    """
    if mask is None:
        return Visible()
    bias = None
    if mask.dtype == torch.bool:
        visible = mask
    else:
        largest = mask.detach().amax(-1, keepdim=True)
        visible = mask.detach() > largest - _HIDES
        bias = torch.where(visible, mask - largest, 0.0)  # a shift of a query's scores changes no weight
        if not bias.requires_grad and bias.device.type == "cpu" and can_look(bias) and not bias.any():
            bias = None
        elif bias.dtype not in (dtype, torch.float32):
            bias = bias.to(dtype)
    if visible.shape[1:3] == (1, 1):
        return Visible(SpanMask.from_key_mask(visible[:, 0, 0]), bias)
    return Visible(visible, bias)
