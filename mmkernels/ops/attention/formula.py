"""The definition that all attention ops share: softmax(Q K' * scale + bias) over the keys that a query sees."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.ops.attention.inputs import Scores
from mmkernels.ops.common.dtypes import wide_dtype
from mmkernels.runtime.checks import can_look

_HIDDEN = float("-inf")


def visible_keys(scores: Scores) -> Tensor | None:
    """Returns the mask as bool, broadcastable to [B, Hq, Lq, Lk]; None: everything is visible."""
    visible = scores.dense
    if scores.start is not None and scores.end is not None:
        key = torch.arange(scores.key.shape[2], dtype=torch.int32, device=scores.key.device)
        spans = (scores.start[..., None] <= key) & (key < scores.end[..., None])  # [B or 1, Lq or 1, Lk]
        visible = spans[:, None] if visible is None else visible & spans[:, None]
    if scores.key_valid is not None:
        valid = scores.key_valid[:, None, None, :]
        visible = valid if visible is None else visible & valid
    return visible


def all_finite(*tensors: Tensor | None) -> bool:
    """Whether no element is NaN or inf, in one pass each. Syncs. (A sum that overflows reads as not finite.)

    False too where Python may not look at values, as within ``torch.vmap``.
    """
    return all(x is None or (can_look(x) and bool(x.sum(dtype=wide_dtype(x)).isfinite())) for x in tensors)


def probabilities(
    query: Tensor,  # [B, Hq, Lq, D]
    key: Tensor,  # [B or 1, Hq, Lk, D], heads repeated
    visible: Tensor | None,
    bias: Tensor | None,
    scale: float,
    need_lse: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Attention's probabilities, 0 where hidden, [B, Hq, Lq, Lk]; the log-sum-exp; and the whole visible mask."""
    visible = shown_by_bias(visible, bias)
    scores, finite = pair_scores(query, key, visible, bias, scale)
    weights, lse = masked_softmax(scores, visible, finite, need_lse)
    return weights, lse, visible


def shown_by_bias(visible: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """Returns the mask without the pairs whose bias is -inf; None: everything is visible."""
    if bias is None or (can_look(bias) and not bool(torch.isneginf(bias).any())):
        return visible
    shown = ~torch.isneginf(bias)
    return shown if visible is None else visible & shown


def pair_scores(
    query: Tensor, key: Tensor, visible: Tensor | None, bias: Tensor | None, scale: float
) -> tuple[Tensor, bool]:
    """Returns the scores [B, Hq, Lq, Lk] and whether query and key are known to be finite; else what is hidden is 0."""
    finite = visible is None or all_finite(query, key)
    if visible is None or finite:
        scores = (query @ key.transpose(-1, -2)) * scale
    else:  # element by element, so that a hidden NaN reaches neither the result nor a gradient
        seen = visible[..., None]
        pairs = torch.where(seen, query[..., :, None, :], 0) * torch.where(seen, key[..., None, :, :], 0)
        scores = pairs.sum(-1) * scale
    return scores if bias is None else (scores + bias).to(query.dtype), finite


def masked_softmax(
    scores: Tensor, visible: Tensor | None, finite: bool, need_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Returns the softmax over the visible scores, 0 where hidden, and the log-sum-exp, -inf where all are hidden.

    Args:
        finite: no score is NaN or inf.
    """
    lse = None
    if visible is None:
        lse = torch.logsumexp(scores.to(wide_dtype(scores)), -1) if need_lse else None
        return scores.softmax(-1), lse
    sees = visible.any(-1, keepdim=True)
    scores = torch.where(visible, scores, torch.where(sees, _HIDDEN, 0.0).to(scores.dtype))
    if need_lse:
        lse = torch.logsumexp(scores.to(wide_dtype(scores)), -1)
        lse = torch.where(sees[..., 0], lse, _HIDDEN)
    weights = scores.softmax(-1) * sees
    return weights if finite else torch.where(visible, weights, 0.0), lse


def weighted_values(weights: Tensor, value: Tensor, visible: Tensor | None) -> Tensor:
    """weights @ value where a non-finite value reaches only the rows that see it."""
    if visible is None or all_finite(value):
        return weights @ value
    seen = torch.where(visible[..., None], value[..., None, :, :], 0)  # [B, H, Lq, Lk, Dv]
    return (weights[..., None] * seen).sum(-2)
