"""Attention of BLIP's image encoder and of its text model, which reads the image and keeps keys in a cache."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mmkernels.integrations.patching.attend import (
    CACHE,
    KeyValue,
    attend_recorded,
    chance,
    hides_a_row,
    keys_and_values,
    split_heads,
)
from mmkernels.integrations.patching.changes import Known
from mmkernels.integrations.patching.classes import original_method

Output = tuple[Tensor, "Tensor | None"]


def image_attention(module: Any, hidden_states: Tensor, **kwargs: Any) -> Output:
    """Returns ``[B, L, C]`` of ``[B, L, C]``, and the weights where transformers records them."""
    batch, tokens = hidden_states.shape[:2]
    projected = module.qkv(hidden_states).view(batch, tokens, 3, module.num_heads, -1)
    query, key, value = projected.transpose(1, 3).unbind(2)  # [B, H, L, D]
    dropout = chance(module.dropout)
    out, weights = attend_recorded(module, query, key, value, scale=module.scale, dropout=dropout)
    if weights is not None and dropout:  # theirs are the weights after dropout
        result: Output = original_method(module, "forward")(hidden_states, **kwargs)
        return result
    return module.projection(out), weights


def text_attention(
    module: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    cache: Any = None,
    *,
    past_key_values: Any = None,
    **kwargs: Any,
) -> Output:
    """Returns ``[B, L, C]`` of ``[B, L, C]``, and the weights where transformers records them.

    Args:
        hidden_states: of the text.
        attention_mask: added to the scores of text to text.
        encoder_hidden_states: of the image, ``[B, Lk, C']``, in a layer that reads it.
        encoder_attention_mask: added to the scores of text to image.
        cache, past_key_values: the cache, by its name since transformers 5.24 and before.
    """
    is_cross = encoder_hidden_states is not None
    states = hidden_states if encoder_hidden_states is None else encoder_hidden_states
    mask = encoder_attention_mask if is_cross else attention_mask
    if hides_a_row(mask):
        caches = {} if cache is None else {"cache": cache}
        caches |= {} if past_key_values is None else {"past_key_values": past_key_values}
        own = original_method(module, "forward")
        result: Output = own(
            hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, **caches, **kwargs
        )
        return result
    size = module.attention_head_size

    def project(x: Tensor) -> KeyValue:
        return split_heads(module.key(x), size), split_heads(module.value(x), size)

    query = split_heads(module.query(hidden_states), size)
    update = {} if cache is None else {"kwargs": kwargs}
    cache = past_key_values if cache is None else cache
    key, value = keys_and_values(module, states, is_cross, cache, project, update)
    mask = None if mask is None else mask.to(query.device)
    return attend_recorded(module, query, key, value, mask, dropout=chance(module.dropout))


_TEXT = ("hidden_states", "attention_mask", "encoder_hidden_states", "encoder_attention_mask")

BLIP = (
    Known(
        "transformers.models.blip.modeling_blip.BlipAttention",
        {"forward": image_attention},
        {"forward": ("hidden_states", "kwargs")},
        what="attention",
        op="cross_attention",
        effect="no score matrix",
        attributes=("qkv", "projection", "num_heads", "scale", "dropout"),
    ),
    Known(
        "transformers.models.blip.modeling_blip_text.BlipTextSelfAttention",
        {"forward": text_attention},
        {"forward": tuple((*_TEXT, cache, "kwargs") for cache in CACHE)},
        what="attention",
        op="cross_attention",
        effect="no score matrix",
        attributes=("query", "key", "value", "dropout", "attention_head_size", "layer_idx"),
    ),
)
