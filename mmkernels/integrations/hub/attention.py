"""Attention as transformers calls that of a Hub kernel: ``attn_implementation="owner/name"``."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mmkernels.integrations.dense_mask import read_mask
from mmkernels.masks import SpanMask
from mmkernels.ops.attention.cross_attention import cross_attention


def supports_flash_attn() -> bool:
    """Returns True: transformers looks for this name beside `flash_attn_forward`, and then makes masks as for SDPA."""
    return True


def flash_attn_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention for transformers' ``AttentionInterface``, whose results are those of its "sdpa".

    The package mmkernels has more: ``mmkernels.integrations.transformers.register`` also makes the masks, without a
    matrix.

    Args:
        module: the model's attention. Where neither a mask nor `is_causal` is given, its attribute ``is_causal``, if
            there is one, says whether query i sees only the keys 0 to i; as in "sdpa" it does without one.
        query: ``[B, Hq, Lq, D]``. key, value: ``[B, Hkv, Lk, D]``.
        attention_mask: broadcastable to ``[B, Hq, Lq, Lk]``, bool or numbers that are added to the scores; or None.
        dropout: the probability of dropping a weight. scaling: of the scores; None: ``1 / sqrt(D)``.
        position_bias: added to the scores, broadcastable to ``[B, Hq, Lq, Lk]``.

    Returns:
        ``[B, Lq, Hq, D]``, and None: the weights are not there.

    Raises:
        ValueError: the model passes what changes attention and is not computed: ``softcap``, sinks, packed sequences.
    """
    for name in ("softcap", "s_aux", "cu_seq_lens_q"):
        if kwargs.get(name) is not None:
            raise ValueError(f"{name} must be None: this attention does not compute it")
    visible = read_mask(attention_mask, query.dtype)
    mask, bias = visible.mask, visible.bias
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is None and causal and query.shape[2] > 1:
        mask = SpanMask.causal(query.shape[2], query.shape[2], query.device)
    if position_bias is not None:
        bias = position_bias if bias is None else bias + position_bias
    out = cross_attention(query, key, value, mask, bias=bias, scale=scaling, dropout_p=dropout)
    return out.transpose(1, 2), None
