"""How Hugging Face's Qwen-VL classes name the fields and the tensors of a `QwenVL`."""

from __future__ import annotations

import re
from math import isqrt
from typing import Any

from torch import Tensor

from mmkernels.models.blocks.checkpoint import Names

ARCHITECTURES = {
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
}
"""Model type -> architecture."""

VARIANT_OF = {"qwen2_vl": "qwen2", "qwen2_5_vl": "qwen2_5", "qwen3_vl": "qwen3"}

SECTIONS = {"qwen2": (16, 24, 24), "qwen2_5": (16, 24, 24), "qwen3": (24, 20, 20)}
"""What transformers takes where a configuration has no ``mrope_section``."""

TEXT_FIELDS = {
    "text_width": "text_config.hidden_size",
    "text_layers": "text_config.num_hidden_layers",
    "text_heads": "text_config.num_attention_heads",
    "text_kv_heads": "text_config.num_key_value_heads",
    "text_mlp": "text_config.intermediate_size",
    "text_activation": "text_config.hidden_act",
    "text_length": "text_config.max_position_embeddings",
    "rms_norm_eps": "text_config.rms_norm_eps",
    "dropout": "text_config.attention_dropout",
    "vocab_size": "text_config.vocab_size",
    "tie_embeddings": "tie_word_embeddings",
    "image_token_id": "image_token_id",
}
"""Field of a configuration with a `Decoder` -> field of transformers' configuration."""

FIELDS = TEXT_FIELDS | {
    "vision_layers": "vision_config.depth",
    "vision_heads": "vision_config.num_heads",
    "vision_activation": "vision_config.hidden_act",
    "patch_size": "vision_config.patch_size",
    "patch_frames": "vision_config.temporal_patch_size",
    "channels": "vision_config.in_channels",
    "merge": "vision_config.spatial_merge_size",
    "video_token_id": "video_token_id",
}
"""Field of `QwenVLConfig` -> field of transformers' configuration."""

FIELDS_OF: dict[str, dict[str, str]] = {
    "qwen2": {"vision_width": "vision_config.embed_dim"},
    "qwen2_5": {
        "vision_width": "vision_config.hidden_size",
        "vision_mlp": "vision_config.intermediate_size",
        "window": "vision_config.window_size",
        "tokens_per_second": "vision_config.tokens_per_second",
    },
    "qwen3": {
        "vision_width": "vision_config.hidden_size",
        "vision_mlp": "vision_config.intermediate_size",
        "text_head_dim": "text_config.head_dim",
    },
}
"""The further fields of a variant."""


_OUT = {"qwen2": "hidden_size", "qwen2_5": "out_hidden_size", "qwen3": "out_hidden_size"}  # the merger's width


def check_fixed(variant: str, theirs: Any) -> None:
    """Raises a ValueError where transformers' configuration has a value that models here don't have."""
    text, vision = theirs.text_config, theirs.vision_config
    rope, vision_rope = text.rope_parameters, getattr(vision, "rope_parameters", None) or {}
    fixed = [
        ("text_config", "rope_type", rope.get("rope_type", "default"), ("default",)),
        ("text_config", "use_sliding_window", getattr(text, "use_sliding_window", None), (None, False)),
        ("text_config", "attention_bias", getattr(text, "attention_bias", False), (variant != "qwen3", False)),
        ("vision_config", "rope_type", vision_rope.get("rope_type", "default"), ("default", "axial")),
        ("vision_config", "rope_theta", vision_rope.get("rope_theta", 10000.0), (10000.0,)),
        ("vision_config", _OUT[variant], getattr(vision, _OUT[variant]), (text.hidden_size,)),
    ]
    for section, name, got, allowed in fixed:
        if got not in allowed:
            raise ValueError(f"{section}: {name} must be {allowed[-1]!r}, got {repr(got)[:200]}")


def computed_fields(variant: str, theirs: Any) -> dict[str, Any]:
    """Returns the fields that follow from several of transformers', or are lists there."""
    text, vision = theirs.text_config, theirs.vision_config
    found: dict[str, Any] = {"rope_sections": _tuple(text.rope_parameters.get("mrope_section") or SECTIONS[variant])}
    if variant != "qwen3":
        if text.num_attention_heads < 1 or text.hidden_size % text.num_attention_heads:
            must = f"a divisor of hidden_size = {text.hidden_size}"
            raise ValueError(f"text_config: num_attention_heads must be {must}, got {text.num_attention_heads}")
        found["text_head_dim"] = text.hidden_size // text.num_attention_heads
    if variant == "qwen2":
        found["vision_mlp"] = vision.embed_dim * vision.mlp_ratio
    if variant == "qwen2_5":
        found["full_layers"] = _tuple(vision.fullatt_block_indexes)
    if variant == "qwen3":
        found["deep_layers"] = _tuple(vision.deepstack_visual_indexes)
        found["position_side"] = isqrt(max(vision.num_position_embeddings, 0))
        if found["position_side"] ** 2 != vision.num_position_embeddings:
            got = vision.num_position_embeddings
            raise ValueError(f"vision_config: num_position_embeddings must be a square, got {got}")
    return found


def _tuple(values: Any) -> Any:
    return tuple(values) if isinstance(values, list) else values


_IGNORED = re.compile(r"\.rotary_emb\.inv_freq$|\.rotary_pos_emb\.inv_freq$")  # constants, which older versions saved

_VISION = {
    "vision.patch.": "patch_embed.proj.",
    "vision.blocks.#.attention_norm.": "blocks.#.norm1.",
    "vision.blocks.#.qkv.": "blocks.#.attn.qkv.",
    "vision.blocks.#.out_proj.": "blocks.#.attn.proj.",
    "vision.blocks.#.mlp_norm.": "blocks.#.norm2.",
}
_OF_VARIANT = {
    "qwen2": {
        "vision.blocks.#.up_proj.": "blocks.#.mlp.fc1.",
        "vision.blocks.#.down_proj.": "blocks.#.mlp.fc2.",
        "merger.norm.": "merger.ln_q.",
        "merger.mlp.": "merger.mlp.",
    },
    "qwen2_5": {
        "vision.blocks.#.": "blocks.#.mlp.",
        "merger.norm.": "merger.ln_q.",
        "merger.mlp.": "merger.mlp.",
    },
    "qwen3": {
        "vision.positions.": "pos_embed.",
        "vision.blocks.#.up_proj.": "blocks.#.mlp.linear_fc1.",
        "vision.blocks.#.down_proj.": "blocks.#.mlp.linear_fc2.",
        "merger.norm.": "merger.norm.",
        "merger.mlp.0.": "merger.linear_fc1.",
        "merger.mlp.2.": "merger.linear_fc2.",
        "deep_mergers.#.norm.": "deepstack_merger_list.#.norm.",
        "deep_mergers.#.mlp.0.": "deepstack_merger_list.#.linear_fc1.",
        "deep_mergers.#.mlp.2.": "deepstack_merger_list.#.linear_fc2.",
    },
}
_NEW = ("model.visual.", "model.language_model.")
_PREFIXES = {"qwen2": ("visual.", "model."), "qwen2_5": ("visual.", "model."), "qwen3": _NEW}


def decoder_names(prefix: str) -> dict[str, str]:
    """Returns the start of a parameter's name in a `Decoder` -> in a checkpoint.

    Args:
        prefix: what the names in the checkpoint begin with.
    """
    theirs = {
        "decoder.embed.": "embed_tokens.",
        "decoder.norm.": "norm.",
        "decoder.blocks.#.attention_norm.": "layers.#.input_layernorm.",
        "decoder.blocks.#.attention.out_proj.": "layers.#.self_attn.o_proj.",
        "decoder.blocks.#.attention.": "layers.#.self_attn.",
        "decoder.blocks.#.mlp_norm.": "layers.#.post_attention_layernorm.",
        "decoder.blocks.#.mlp.": "layers.#.mlp.",
    }
    return {ours: prefix + name for ours, name in theirs.items()}


def _flatten_patches(weights: dict[str, Tensor]) -> None:
    """A convolution whose step is its size is a linear layer of the patches."""
    if "vision.patch.weight" in weights:
        weights["vision.patch.weight"] = weights["vision.patch.weight"].flatten(1)


def names(variant: str) -> Names:
    """Returns the names of a variant's checkpoints."""
    vision, text = _PREFIXES[variant]
    table = {ours: vision + theirs for ours, theirs in (_VISION | _OF_VARIANT[variant]).items()}
    table |= decoder_names(text)
    also = dict(zip(_NEW, (vision, text), strict=True))  # what newer versions of transformers can write of all variants
    return Names(table | {"head.": "lm_head."}, _IGNORED, _flatten_patches, also)
