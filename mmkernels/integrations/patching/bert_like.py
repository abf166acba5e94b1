"""Attention of encoders after BERT's, whose layers return weights if an argument asks for them.

Each function here stands for the ``forward`` of the classes that its rows name. The class's
own method runs where weights are asked for, or where a query sees no key.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mmkernels.integrations.patching.attend import attend, chance, hides_a_row, split_heads
from mmkernels.integrations.patching.changes import Known
from mmkernels.integrations.patching.classes import original_method

Output = tuple[Tensor, ...]

_PROJECTIONS = ("query", "key", "value", "dropout", "attention_head_size")
_SELF = ("hidden_states", "attention_mask", "output_attentions")


def self_attention(
    module: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, output_attentions: bool | None = False
) -> Output:
    """Returns ``([B, L, C],)`` of ``[B, L, C]``."""
    if output_attentions or hides_a_row(attention_mask):
        return _their(module, hidden_states, attention_mask, output_attentions)
    return (_attend(module, hidden_states, hidden_states, hidden_states, attention_mask),)


def context_attention(
    module: Any,
    hidden_states: Tensor,
    context: Tensor,
    attention_mask: Tensor | None = None,
    output_attentions: bool | None = False,
) -> Output:
    """LXMERT's: queries of one stream, keys and values of the same one or of the other."""
    if output_attentions or hides_a_row(attention_mask):
        return _their(module, hidden_states, context, attention_mask, output_attentions)
    return (_attend(module, hidden_states, context, context, attention_mask),)


def normed_attention(
    module: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, output_attentions: bool | None = None
) -> Output:
    """TVP's: with the projection behind the heads, the residual and the norm."""
    if output_attentions or hides_a_row(attention_mask):
        return _their(module, hidden_states, attention_mask, output_attentions)
    x = _attend(module, hidden_states, hidden_states, hidden_states, attention_mask, module.attn_dropout)
    return (module.layer_norm(module.dropout(module.dense(x)) + hidden_states),)


def three_way_attention(
    module: Any,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    attention_mask: Tensor | None = None,
    output_attentions: bool | None = False,
) -> Output:
    """OmDet-Turbo's: with the projection behind the heads."""
    if output_attentions or hides_a_row(attention_mask):
        return _their(module, queries, keys, values, attention_mask, output_attentions)
    return (module.out_proj(_attend(module, queries, keys, values, attention_mask)),)


def _attend(
    module: Any, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, dropout: Any = None
) -> Tensor:
    size = module.attention_head_size
    return attend(
        module,
        split_heads(module.query(queries), size),
        split_heads(module.key(keys), size),
        split_heads(module.value(values), size),
        mask,
        dropout=chance(module.dropout if dropout is None else dropout),
    )


def _their(module: Any, *arguments: Any) -> Output:
    result: Output = original_method(module, "forward")(*arguments)
    return result


def _row(path: str, method: Any, arguments: tuple[str, ...], *attributes: str) -> Known:
    return Known(
        f"transformers.models.{path}",
        {"forward": method},
        {"forward": arguments},
        what="attention",
        op="cross_attention",
        effect="no score matrix",
        attributes=(*_PROJECTIONS, *attributes),
    )


BERT_LIKE = (
    _row(
        "lxmert.modeling_lxmert.LxmertAttention",
        context_attention,
        ("hidden_states", "context", "attention_mask", "output_attentions"),
    ),
    _row("visual_bert.modeling_visual_bert.VisualBertSelfAttention", self_attention, _SELF),
    _row("vilt.modeling_vilt.ViltSelfAttention", self_attention, _SELF),
    _row("flava.modeling_flava.FlavaSelfAttention", self_attention, _SELF),
    _row("tvp.modeling_tvp.TvpAttention", normed_attention, _SELF, "attn_dropout", "dense", "layer_norm"),
    _row(
        "omdet_turbo.modeling_omdet_turbo.OmDetTurboMultiheadAttention",
        three_way_attention,
        ("queries", "keys", "values", "attention_mask", "output_attentions"),
        "out_proj",
    ),
)
