"""How Hugging Face's BLIP classes name the fields and the tensors of a `BLIP`."""

from __future__ import annotations

import re

from torch import Tensor

from mmkernels.models.blocks.checkpoint import Names
from mmkernels.models.blocks.salesforce import VISION_FIELDS, add_logit_scale, split_qkv, vision_names

HEADS = {"BlipForConditionalGeneration": True, "BlipForImageTextRetrieval": False}
"""Architecture -> whether it generates; else it retrieves."""

ARCHITECTURES = {"blip": tuple(HEADS)}
"""Model type -> architectures."""

FIELDS = VISION_FIELDS | {
    "text_width": "text_config.hidden_size",
    "text_layers": "text_config.num_hidden_layers",
    "text_heads": "text_config.num_attention_heads",
    "text_mlp": "text_config.intermediate_size",
    "text_length": "text_config.max_position_embeddings",
    "text_activation": "text_config.hidden_act",
    "text_eps": "text_config.layer_norm_eps",
    "text_dropout": "text_config.attention_probs_dropout_prob",
    "text_residual_dropout": "text_config.hidden_dropout_prob",
    "vocab_size": "text_config.vocab_size",
    "bos_token_id": "text_config.bos_token_id",
    "sep_token_id": "text_config.sep_token_id",
    "pad_token_id": "text_config.pad_token_id",
    "label_smoothing": "text_config.label_smoothing",
    "embed_dim": "image_text_hidden_size",
}
"""Field of `BLIPConfig` -> field of transformers' configuration."""


def _text_names(prefix: str) -> dict[str, str]:
    """Returns the start of a parameter's name in the text model -> in the checkpoint."""
    layer = prefix + "encoder.layer.#."
    attention = {
        f"text.blocks.#.{ours}.{part}": f"{layer}{theirs}.{name}"
        for ours, theirs in (("attention", "attention"), ("cross", "crossattention"))
        for part, name in (
            ("attention.q_proj.", "self.query."),
            ("attention.k_proj.", "self.key."),
            ("attention.v_proj.", "self.value."),
            ("attention.out_proj.", "output.dense."),
            ("norm.", "output.LayerNorm."),
        )
    }
    return {
        "text.embed.": prefix + "embeddings.word_embeddings.",
        "text.positions.": prefix + "embeddings.position_embeddings.",
        "text.norm.": prefix + "embeddings.LayerNorm.",
        **attention,
        "text.blocks.#.mlp.mlp.0.": layer + "intermediate.dense.",
        "text.blocks.#.mlp.mlp.2.": layer + "output.dense.",
        "text.blocks.#.mlp.norm.": layer + "output.LayerNorm.",
    }


_PREDICTIONS = "text_decoder.cls.predictions."
_TABLES = {
    True: {
        **vision_names("vision_model."),
        **_text_names("text_decoder.bert."),
        "head.transform.0.": _PREDICTIONS + "transform.dense.",
        "head.transform.2.": _PREDICTIONS + "transform.LayerNorm.",
        "head.last.": _PREDICTIONS + "decoder.",
        "head.bias": _PREDICTIONS + "bias",  # the same as that of the last layer: see _convert
    },
    False: {
        **vision_names("vision_model."),
        **_text_names("text_encoder."),
        "image_projection.": "vision_proj.",
        "text_projection.": "text_proj.",
        "matching_head.": "itm_head.",
    },
}
_IGNORED = re.compile(r"\.position_ids$|^text_encoder\.pooler\.")


def _convert_generation(weights: dict[str, Tensor]) -> None:
    split_qkv(weights)
    bias = weights.pop("head.bias", None)
    if bias is not None:
        weights.setdefault("head.last.bias", bias)
    if "text.embed.weight" in weights:
        weights.setdefault("head.last.weight", weights["text.embed.weight"])


def _convert_retrieval(weights: dict[str, Tensor]) -> None:
    split_qkv(weights)
    add_logit_scale(weights)


def names(generation: bool) -> Names:
    """Returns the names of checkpoints of the class that generates, or of that which retrieves."""
    return Names(_TABLES[generation], _IGNORED, _convert_generation if generation else _convert_retrieval)
