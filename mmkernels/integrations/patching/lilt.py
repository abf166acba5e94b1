"""Attention of LiLT: one matrix of scores of the text and of its layout, by which both read."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mmkernels.integrations.patching.attend import attend, chance, hides_a_row, split_heads
from mmkernels.integrations.patching.changes import Known
from mmkernels.integrations.patching.classes import original_method


def layout_attention(
    module: Any,
    hidden_states: Tensor,
    layout_inputs: Tensor,
    attention_mask: Tensor | None = None,
    output_attentions: bool | None = False,
) -> tuple[Tensor, ...]:
    """Returns what text and layout read, ``[B, L, C]`` and ``[B, L, C / r]``.

    The scores are the sum of two products, so that queries and keys of both, one behind the other, give them by one.

    Args:
        hidden_states: ``[B, L, C]`` of the text.
        layout_inputs: ``[B, L, C / r]`` of the layout.
        attention_mask: added to the scores.
        output_attentions: the class's own method runs.
    """
    if output_attentions or hides_a_row(attention_mask):
        own = original_method(module, "forward")
        result: tuple[Tensor, ...] = own(hidden_states, layout_inputs, attention_mask, output_attentions)
        return result
    text, layout = module.attention_head_size, module.attention_head_size // module.channel_shrink_ratio
    query, key, value = (split_heads(f(hidden_states), text) for f in (module.query, module.key, module.value))
    layers = (module.layout_query, module.layout_key, module.layout_value)
    layout_query, layout_key, layout_value = (split_heads(f(layout_inputs), layout) for f in layers)
    query = torch.cat([query / math.sqrt(text), layout_query / math.sqrt(layout)], dim=-1)
    key = torch.cat([key, layout_key], dim=-1)
    dropout = chance(module.dropout)
    if dropout:  # of each by itself
        return tuple(
            attend(module, query, key, x, attention_mask, scale=1.0, dropout=dropout) for x in (value, layout_value)
        )
    out = attend(module, query, key, torch.cat([value, layout_value], dim=-1), attention_mask, scale=1.0)
    both = out.unflatten(-1, (-1, text + layout)).split((text, layout), dim=-1)
    return both[0].flatten(2), both[1].flatten(2)


LILT = (
    Known(
        "transformers.models.lilt.modeling_lilt.LiltSelfAttention",
        {"forward": layout_attention},
        {"forward": ("hidden_states", "layout_inputs", "attention_mask", "output_attentions")},
        what="attention",
        op="cross_attention",
        effect="one score matrix for both, which is never built",
        attributes=("query", "key", "value", "layout_query", "layout_key", "layout_value", "channel_shrink_ratio"),
    ),
)
