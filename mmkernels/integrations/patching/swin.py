"""Attention within windows, with a learned bias for each pair of places: Donut's image encoder, CLAP's for audio."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mmkernels.integrations.patching.attend import attend, chance, split_heads
from mmkernels.integrations.patching.changes import Known
from mmkernels.integrations.patching.classes import original_method


def window_attention(
    module: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, output_attentions: bool | None = False
) -> tuple[Tensor, ...]:
    """Returns ``([B * W, n, C],)``.

    Args:
        hidden_states: ``[B * W, n, C]``: W windows of each image.
        attention_mask: ``[W, n, n]``, added to the scores of each image's windows.
        output_attentions: the class's own method runs.
    """
    if output_attentions:
        own = original_method(module, "forward")
        result: tuple[Tensor, ...] = own(hidden_states, attention_mask, output_attentions)
        return result
    windows, tokens, _ = hidden_states.shape
    bias = module.relative_position_bias_table[module.relative_position_index.view(-1)]
    bias = bias.view(tokens, tokens, -1).permute(2, 0, 1).contiguous()[None]  # [1, H, n, n]
    if attention_mask is not None:
        bias = bias + attention_mask[:, None]  # [W, H, n, n]
        bias = bias.repeat(windows // attention_mask.shape[0], 1, 1, 1)
    size = module.attention_head_size
    out = attend(
        module,
        split_heads(module.query(hidden_states), size),
        split_heads(module.key(hidden_states), size),
        split_heads(module.value(hidden_states), size),
        bias=bias,
        dropout=chance(module.dropout),
    )
    return (out,)


def _row(path: str) -> Known:
    return Known(
        f"transformers.models.{path}",
        {"forward": window_attention},
        {"forward": ("hidden_states", "attention_mask", "output_attentions")},
        what="attention",
        op="cross_attention",
        effect="no score matrix",
        attributes=(
            "query",
            "key",
            "value",
            "dropout",
            "attention_head_size",
            "relative_position_bias_table",
            "relative_position_index",
        ),
    )


SWIN = (
    _row("donut.modeling_donut_swin.DonutSwinSelfAttention"),
    _row("clap.modeling_clap.ClapAudioSelfAttention"),
    _row("maskformer.modeling_maskformer_swin.MaskFormerSwinSelfAttention"),
)
