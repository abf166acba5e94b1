"""Attention after BART's, in models of images and text: TrOCR's decoder, GroupViT."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mmkernels.integrations.patching.attend import (
    CACHE,
    KeyValue,
    attend,
    attend_recorded,
    hides_a_row,
    keys_and_values,
    split_heads,
)
from mmkernels.integrations.patching.changes import Known
from mmkernels.integrations.patching.classes import original_method

Output = tuple[Tensor, "Tensor | None"]

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj", "head_dim", "dropout")


def decoder_attention(
    module: Any,
    hidden_states: Tensor,
    key_value_states: Tensor | None = None,
    cache: Any = None,
    attention_mask: Tensor | None = None,
    output_attentions: bool | None = False,
    *,
    past_key_values: Any = None,
    **kwargs: Any,
) -> Output:
    """TrOCR's. Returns ``[B, L, C]`` of ``[B, L, C]``, and None for the weights.

    Args:
        hidden_states: of the text.
        key_value_states: of the image, ``[B, Lk, C']``, in a layer that reads it.
        cache, past_key_values: the cache, by its name since transformers 5.24 and before.
        attention_mask: added to the scores.
        output_attentions: the class's own method runs.
    """
    caches = {name: x for name, x in (("cache", cache), ("past_key_values", past_key_values)) if x is not None}
    if output_attentions or hides_a_row(attention_mask):
        further = {"attention_mask": attention_mask, "output_attentions": output_attentions, **caches, **kwargs}
        result: Output = original_method(module, "forward")(hidden_states, key_value_states, **further)
        return result
    size = module.head_dim

    def project(x: Tensor) -> KeyValue:
        return split_heads(module.k_proj(x), size), split_heads(module.v_proj(x), size)

    query = split_heads(module.q_proj(hidden_states), size)
    is_cross = key_value_states is not None
    states = hidden_states if key_value_states is None else key_value_states
    update = {} if cache is None else {"kwargs": kwargs}
    key, value = keys_and_values(module, states, is_cross, past_key_values if cache is None else cache, project, update)
    dropout = module.dropout if module.training else 0.0
    out = attend(module, query, key, value, attention_mask, scale=module.scaling, dropout=dropout)
    return module.out_proj(out), None


def recorded_attention(
    module: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    **kwargs: Any,
) -> Output:
    """GroupViT's. Returns ``[B, L, C]`` of ``[B, L, C]``, and the weights where transformers records them."""
    if hides_a_row(attention_mask):
        result: Output = original_method(module, "forward")(
            hidden_states, attention_mask, encoder_hidden_states, **kwargs
        )
        return result
    states = hidden_states if encoder_hidden_states is None else encoder_hidden_states
    out, weights = attend_recorded(
        module,
        split_heads(module.q_proj(hidden_states), module.head_dim),
        split_heads(module.k_proj(states), module.head_dim),
        split_heads(module.v_proj(states), module.head_dim),
        attention_mask,
        scale=module.scale,
        dropout=module.dropout if module.training else 0.0,
    )
    return module.out_proj(out), weights


BART_LIKE = (
    Known(
        "transformers.models.trocr.modeling_trocr.TrOCRAttention",
        {"forward": decoder_attention},
        {
            "forward": tuple(
                ("hidden_states", "key_value_states", cache, "attention_mask", "output_attentions", "kwargs")
                for cache in CACHE
            )
        },
        what="attention",
        op="cross_attention",
        effect="no score matrix",
        attributes=(*_PROJECTIONS, "scaling", "layer_idx"),
    ),
    Known(
        "transformers.models.groupvit.modeling_groupvit.GroupViTAttention",
        {"forward": recorded_attention},
        {"forward": ("hidden_states", "attention_mask", "encoder_hidden_states", "kwargs")},
        what="attention",
        op="cross_attention",
        effect="no score matrix",
        attributes=(*_PROJECTIONS, "scale"),
    ),
)
