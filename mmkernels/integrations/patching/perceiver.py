"""Attention of few latents to many inputs: Perceiver, and the resampler of IDEFICS."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmkernels.integrations.patching.attend import attend, chance, hides_a_row, split_heads
from mmkernels.integrations.patching.changes import Known
from mmkernels.integrations.patching.classes import original_method


def latent_attention(
    module: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    inputs: Tensor | None = None,
    inputs_mask: Tensor | None = None,
    output_attentions: bool | None = False,
) -> tuple[Tensor, ...]:
    """Perceiver's. Returns ``([B, Lq, C],)``.

    Args:
        hidden_states: of the latents.
        attention_mask: added to the scores of latents to latents.
        inputs: ``[B, Lk, C']``, which the latents read; None: they read themselves.
        inputs_mask: added to the scores of latents to inputs.
        output_attentions: the class's own method runs.
    """
    if output_attentions or hides_a_row(attention_mask if inputs is None else inputs_mask):
        own = original_method(module, "forward")
        result: tuple[Tensor, ...] = own(hidden_states, attention_mask, inputs, inputs_mask, output_attentions)
        return result
    latents = module.layernorm1(hidden_states)
    states, mask = latents, attention_mask
    if inputs is not None:
        states, mask = module.layernorm2(inputs), inputs_mask
    out = attend(
        module,
        split_heads(module.query(latents), module.qk_channels_per_head),
        split_heads(module.key(states), module.qk_channels_per_head),
        split_heads(module.value(states), module.v_channels_per_head),
        mask,
        dropout=chance(module.dropout),
    )
    return (out,)


def resampler_attention(module: Any, context: Tensor, latents: Tensor) -> Tensor:
    """IDEFICS'. Returns ``[B, Lq, C]`` for latents ``[B, Lq, C]``, which read ``context [B, Lk, C]`` and themselves."""
    context, latents = module.context_layer_norm(context), module.latents_layer_norm(latents)
    states = torch.cat([context, latents], dim=-2)
    query = split_heads(module.q_proj(latents), module.head_dim)
    key = split_heads(module.k_proj(states), module.head_dim)
    if module.qk_layer_norms:
        query, key = module.q_layer_norm(query), module.k_layer_norm(key)
    value = split_heads(module.v_proj(states), module.head_dim)
    out: Tensor = module.output_proj(attend(module, query, key, value, scale=module.qk_scale))
    return out


PERCEIVER = (
    Known(
        "transformers.models.perceiver.modeling_perceiver.PerceiverSelfAttention",
        {"forward": latent_attention},
        {"forward": ("hidden_states", "attention_mask", "inputs", "inputs_mask", "output_attentions")},
        what="attention",
        op="cross_attention",
        effect="no score matrix",
        attributes=(
            "layernorm1",
            "layernorm2",
            "query",
            "key",
            "value",
            "dropout",
            "qk_channels_per_head",
            "v_channels_per_head",
        ),
    ),
    Known(
        "transformers.models.idefics.perceiver.IdeficsPerceiverAttention",
        {"forward": resampler_attention},
        {"forward": ("context", "latents")},
        what="attention",
        op="cross_attention",
        effect="no score matrix",
        attributes=(
            "context_layer_norm",
            "latents_layer_norm",
            "q_proj",
            "k_proj",
            "v_proj",
            "output_proj",
            "head_dim",
        ),
    ),
)
