"""How Hugging Face's BLIP-2 and InstructBLIP classes name the fields and the tensors of a `BLIP2`."""

from __future__ import annotations

import re

from torch import Tensor

from mmkernels.models.blocks.checkpoint import Names
from mmkernels.models.blocks.salesforce import VISION_FIELDS, add_logit_scale, split_qkv, vision_names
from mmkernels.models.qwen_vl_weights import decoder_names

ARCHITECTURES = {
    "blip-2": "Blip2ForConditionalGeneration",
    "instructblip": "InstructBlipForConditionalGeneration",
}
"""Model type -> architecture, of `BLIP2`."""

RETRIEVAL_ARCHITECTURES = {"blip-2": "Blip2ForImageTextRetrieval"}
"""Model type -> architecture, of `BLIP2Retrieval`."""

BRIDGE_FIELDS = VISION_FIELDS | {
    "qformer_width": "qformer_config.hidden_size",
    "qformer_layers": "qformer_config.num_hidden_layers",
    "qformer_heads": "qformer_config.num_attention_heads",
    "qformer_mlp": "qformer_config.intermediate_size",
    "qformer_activation": "qformer_config.hidden_act",
    "qformer_eps": "qformer_config.layer_norm_eps",
    "qformer_dropout": "qformer_config.attention_probs_dropout_prob",
    "qformer_residual_dropout": "qformer_config.hidden_dropout_prob",
    "qformer_cross_every": "qformer_config.cross_attention_frequency",
    "qformer_length": "qformer_config.max_position_embeddings",
    "num_queries": "num_query_tokens",
}
"""Field of both configurations -> field of transformers' configuration."""

FIELDS = BRIDGE_FIELDS | {
    "text_width": "text_config.hidden_size",
    "text_layers": "text_config.num_hidden_layers",
    "text_heads": "text_config.num_attention_heads",
    "text_length": "text_config.max_position_embeddings",
    "vocab_size": "text_config.vocab_size",
    "image_token_id": "image_token_index",
}
"""Field of `BLIP2Config` -> field of transformers' configuration."""

TEXT_FIELDS = {
    "opt": {
        "text_kv_heads": "text_config.num_attention_heads",
        "text_mlp": "text_config.ffn_dim",
        "text_activation": "text_config.activation_function",
        "text_dropout": "text_config.attention_dropout",
        "text_residual_dropout": "text_config.dropout",
    },
    "llama": {
        "text_mlp": "text_config.intermediate_size",
        "text_activation": "text_config.hidden_act",
        "text_kv_heads": "text_config.num_key_value_heads",
        "text_eps": "text_config.rms_norm_eps",
        "text_dropout": "text_config.attention_dropout",
    },
}
"""The same, by kind of language model."""

_LAYER = "qformer.encoder.layer.#."
_ATTENTION = {
    f"qformer.blocks.#.{ours}.{part}": f"{_LAYER}{theirs}.{name}"
    for ours, theirs in (("attention", "attention"), ("cross", "crossattention"))
    for part, name in (
        ("attention.q_proj.", "attention.query."),
        ("attention.k_proj.", "attention.key."),
        ("attention.v_proj.", "attention.value."),
        ("attention.out_proj.", "output.dense."),
        ("norm.", "output.LayerNorm."),
    )
}
_MLPS = {
    f"qformer.blocks.#.{ours}.{part}": f"{_LAYER}{name}"
    for ours, ending in (("text_mlp", ""), ("query_mlp", "_query"))
    for part, name in (
        ("mlp.0.", f"intermediate{ending}.dense."),
        ("mlp.2.", f"output{ending}.dense."),
        ("norm.", f"output{ending}.LayerNorm."),
    )
}


def _qformer_names(embeddings: str, norm: str) -> dict[str, str]:
    """Returns the names of the Q-Former, whose embeddings and first norm have other names in each class."""
    return {
        "qformer.queries": "query_tokens",
        "qformer.embed.": embeddings + "word_embeddings.",
        "qformer.positions.": embeddings + "position_embeddings.",
        "qformer.norm.": norm,
        **_ATTENTION,
        **_MLPS,
    }


_OPT = "language_model.model.decoder."
_OPT_LAYER = _OPT + "layers.#."
_TEXT = {
    "opt": {
        "decoder.embed.": _OPT + "embed_tokens.",
        "decoder.positions.": _OPT + "embed_positions.",
        "decoder.blocks.#.attention_norm.": _OPT_LAYER + "self_attn_layer_norm.",
        "decoder.blocks.#.attention.": _OPT_LAYER + "self_attn.",
        "decoder.blocks.#.mlp_norm.": _OPT_LAYER + "final_layer_norm.",
        "decoder.blocks.#.mlp.0.": _OPT_LAYER + "fc1.",
        "decoder.blocks.#.mlp.2.": _OPT_LAYER + "fc2.",
        "decoder.norm.": _OPT + "final_layer_norm.",
    },
    "llama": decoder_names("language_model.model."),
}
_HEAD = {"projection.": "language_projection.", "head.": "language_model.lm_head."}
# Weights that the model does not use, and constants that older versions of transformers saved.
_IGNORED = r"\.position_ids$|\.rotary_emb\.inv_freq$"
_UNUSED_TEXT = r"|^qformer\.encoder\.layer\.\d+\.(?:intermediate|output)\."


def names(instruct: bool, text_model: str) -> Names:
    """Returns the names of checkpoints of a `BLIP2`.

    Args:
        instruct: whether the Q-Former reads instructions (InstructBLIP).
        text_model: the kind of language model, "opt" or "llama".
    """
    embeddings = "qformer.embeddings." if instruct else "embeddings."
    norm = "qformer.embeddings.layernorm." if instruct else "qformer.layernorm."
    table = {**vision_names("vision_model."), **_qformer_names(embeddings, norm), **_TEXT[text_model], **_HEAD}
    return Names(table, re.compile(_IGNORED + ("" if instruct else _UNUSED_TEXT)), split_qkv)


RETRIEVAL_HEADS = {
    "image_projection.": "vision_projection.",
    "text_projection.": "text_projection.",
    "matching_head.": "itm_head.",
}


def _convert_retrieval(weights: dict[str, Tensor]) -> None:
    split_qkv(weights)
    add_logit_scale(weights)


RETRIEVAL_NAMES = Names(
    {**vision_names("vision_model."), **_qformer_names("embeddings.", "qformer.layernorm."), **RETRIEVAL_HEADS},
    re.compile(_IGNORED),
    _convert_retrieval,
)
"""How checkpoints of a `BLIP2Retrieval` name its tensors."""
