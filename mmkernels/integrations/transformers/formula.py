"""Attention in PyTorch's own operators, for what differentiates those alone: torch.func and forward mode."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from mmkernels.integrations.transformers.model_mask import Visible
from mmkernels.masks import SpanMask


def attention_formula(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Visible,
    bias: Tensor | None,
    s_aux: Tensor | None,
    scale: float | None,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """Attention with the scores' matrix, without a branch on values, so that it runs under ``torch.vmap`` too.

    A query that sees nothing gives 0, as in `cross_attention`. A NaN in a hidden value reaches all queries, as in
    ``"eager"``.

    Args:
        query: ``[B, Hq, Lq, D]``. key: ``[B or 1, Hkv, Lk, D]``. value: ``[B or 1, Hkv, Lk, Dv]``.
        visible: spans or bool, broadcastable to ``[B, Hq, Lq, Lk]``; None: everything is visible.
        bias: added to the scores; -inf hides. s_aux: ``[Hq]``, one more score for each query, whose value is 0.
        scale: of the scores; None: ``1 / sqrt(D)``. dropout: the probability of dropping a weight.

    Returns:
        ``[B, Lq, Hq, Dv]`` and the probabilities before dropout, ``[B, Hq, Lq, Lk]``, in query's dtype.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))  # [B, Hq, Lk, D]
    scores = (query @ key.mT).float() if query.dtype in (torch.float16, torch.bfloat16) else query @ key.mT
    scores = scores * (1.0 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if bias is not None:
        scores = scores + bias
    if isinstance(visible, SpanMask):
        visible = visible.to_dense(key.shape[2])
    shown = ~torch.isneginf(scores)
    shown = shown if visible is None else shown & visible
    scores = torch.where(shown, scores, torch.finfo(scores.dtype).min)
    if s_aux is not None:
        sinks = s_aux.to(scores.dtype).reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], -1)
    weights = scores.softmax(-1)[..., : key.shape[2]]
    weights = torch.where(shown, weights, 0.0).to(query.dtype)
    return (F.dropout(weights, dropout) @ value).transpose(1, 2), weights
