"""How Hugging Face's ``IdeficsForVisionText2Text`` checkpoints map to a `Flamingo`: configuration, tensor names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmkernels.models.blocks.activations import ACTIVATIONS
from mmkernels.models.blocks.checkpoint import Checkpoint, Section, joined, read_json, renamed

MODEL_TYPE = "idefics"
ARCHITECTURE = "IdeficsForVisionText2Text"

Source = dict[str, tuple[int, ...]]
"""The checkpoint's tensors, by name and shape, whose rows make up a parameter."""


def config_fields(config: Section) -> dict[str, Any]:
    """`FlamingoConfig`'s fields, of ``config.json``. What the file leaves out has transformers' default."""
    vision, perceiver, rope = (config.section(key) for key in ("vision_config", "perceiver_config", "rope_parameters"))
    rope.choice("rope_type", "default", ["default"])
    if config.values.get("rope_scaling") is not None:
        raise config.error("rope_scaling", "null")
    return {
        "vision_width": vision.integer("embed_dim", 768),
        "vision_layers": vision.integer("num_hidden_layers", 32),
        "vision_heads": vision.integer("num_attention_heads", 16),
        "vision_mlp": vision.integer("intermediate_size", 5120),
        "vision_activation": vision.choice("hidden_act", "gelu", ACTIVATIONS),
        "vision_dropout": vision.number("attention_dropout", 0.0),
        "layer_norm_eps": vision.number("layer_norm_eps", 1e-5),
        "image_size": _side(vision, "image_size", 224),
        "patch_size": _side(vision, "patch_size", 14),
        "channels": vision.integer("num_channels", 3),
        "num_latents": perceiver.integer("resampler_n_latents", 64) if config.flag("use_resampler") else None,
        "resampler_depth": perceiver.integer("resampler_depth", 6),
        "resampler_heads": perceiver.integer("resampler_n_heads", 16),
        "resampler_head_dim": perceiver.integer("resampler_head_dim", 96),
        "resampler_qk_norm": perceiver.flag("qk_layer_norms_perceiver"),
        "text_width": config.integer("hidden_size", 4096),
        "text_layers": config.integer("num_hidden_layers", 32),
        "text_heads": config.integer("num_attention_heads", 32),
        "text_mlp": config.integer("intermediate_size", 11008),
        "text_activation": config.choice("hidden_act", "silu", ACTIVATIONS),
        "cross_every": config.integer("cross_layer_interval", 1),
        "qk_norm": config.flag("qk_layer_norms"),
        "gate": {"float": "scalar", "vector": "vector"}[config.choice("alpha_type", "float", ["float", "vector"])],
        "rms_norm_eps": config.number("rms_norm_eps", 1e-6),
        "rope_theta": rope.number("rope_theta", config.number("rope_theta", 10000.0)),
        "dropout": config.number("dropout", 0.0),
        "vocab_size": config.integer("vocab_size", 32000) + additional_vocab_size(config),
        "tie_embeddings": config.flag("tie_word_embeddings"),
        "pad_token_id": 0 if config.values.get("pad_token_id") is None else config.integer("pad_token_id", 0, least=0),
        "eos_token_ids": _token_ids(config, "eos_token_id", 2),
        "image_token_id": next(iter(_token_ids(config, "image_token_id", None)), None),
    }


def additional_vocab_size(config: Section) -> int:
    """Tokens at the end of the vocabulary whose embeddings and scores lie in tensors of their own."""
    return config.integer("additional_vocab_size", 0, least=0)


def image_token_id(folder: Path) -> int | None:
    """The id of ``<image>`` in a folder's tokenizer files, or None. (``IdeficsConfig`` itself has no field for it.)"""
    if (folder / "tokenizer.json").is_file():
        tokens = Section(read_json(folder / "tokenizer.json"), str(folder / "tokenizer.json"))
        added = tokens.values.get("added_tokens") or []
        if not isinstance(added, list):
            raise tokens.error("added_tokens", "a list")
        for token in added:
            if isinstance(token, dict) and token.get("content") == "<image>":
                return Section(token, tokens.where).integer("id", -1, least=0)
    if (folder / "added_tokens.json").is_file():
        tokens = Section(read_json(folder / "added_tokens.json"), str(folder / "added_tokens.json"))
        if "<image>" in tokens.values:
            return tokens.integer("<image>", -1, least=0)
    return None


def read_weights(
    checkpoint: Checkpoint, model: nn.Module, dtype: torch.dtype, device: torch.device | str
) -> dict[str, Tensor]:
    """`model`'s state, from the checkpoint. Everything is checked before the first tensor is read."""
    vocab_size = checkpoint.config.integer("vocab_size", 32000)
    tied = checkpoint.config.flag("tie_word_embeddings")
    state = {name: x.shape for name, x in model.state_dict().items() if not (tied and name == "head.weight")}
    sources = {name: _source(name, shape, vocab_size) for name, shape in state.items()}
    ignored = [name for name in checkpoint.names if _IGNORED.search(name) or (tied and name.startswith("lm_head."))]
    checkpoint.check({name: shape for source in sources.values() for name, shape in source.items()}, ignored)
    weights = {
        name: joined([checkpoint.read(part) for part in sources[name]], shape, dtype, device)
        for name, shape in state.items()
    }
    if tied:
        weights["head.weight"] = weights["embed.weight"]
    return weights


# The last norm of the encoder serves a pooled output that Idefics doesn't use; the others are constants that older
# versions of transformers saved.
_IGNORED = re.compile(r"vision_model\.post_layernorm\.|\.rotary_emb\.inv_freq$|\.position_ids$")

_VISION = "model.vision_model."
_RESAMPLER = "model.perceiver_resampler."
_CROSS = "model.gated_cross_attn_layers.#."
_TEXT = "model.layers.#."

# The start of a name in `Flamingo`, and of the same tensor's name in the checkpoint; # is a number, and the first that
# matches counts.
_PREFIXES = {
    "vision.patch.": _VISION + "embeddings.patch_embedding.",
    "vision.class_token": _VISION + "embeddings.class_embedding",
    "vision.positions": _VISION + "embeddings.position_embedding.weight",
    "vision.norm.": _VISION + "pre_layrnorm.",  # so spelt
    "vision.blocks.#.attention_norm.": _VISION + "encoder.layers.#.layer_norm1.",
    "vision.blocks.#.attention.": _VISION + "encoder.layers.#.self_attn.",
    "vision.blocks.#.mlp_norm.": _VISION + "encoder.layers.#.layer_norm2.",
    "vision.blocks.#.mlp.0.": _VISION + "encoder.layers.#.mlp.fc1.",
    "vision.blocks.#.mlp.2.": _VISION + "encoder.layers.#.mlp.fc2.",
    "resampler.latents": _RESAMPLER + "latents",
    "resampler.blocks.#.media_norm.": _RESAMPLER + "blocks.#.0.context_layer_norm.",
    "resampler.blocks.#.latent_norm.": _RESAMPLER + "blocks.#.0.latents_layer_norm.",
    "resampler.blocks.#.attention.q_norm.": _RESAMPLER + "blocks.#.0.q_layer_norm.",
    "resampler.blocks.#.attention.k_norm.": _RESAMPLER + "blocks.#.0.k_layer_norm.",
    "resampler.blocks.#.attention.out_proj.": _RESAMPLER + "blocks.#.0.output_proj.",
    "resampler.blocks.#.attention.": _RESAMPLER + "blocks.#.0.",
    "resampler.blocks.#.feed_forward.0.": _RESAMPLER + "blocks.#.1.ln.",
    "resampler.blocks.#.feed_forward.1.": _RESAMPLER + "blocks.#.1.fc.",
    "resampler.blocks.#.feed_forward.3.": _RESAMPLER + "blocks.#.1.c_proj.",
    "resampler.norm.": _RESAMPLER + "layer_norm.",
    "cross_blocks.#.attention_gate": _CROSS + "alpha_cross_attn",
    "cross_blocks.#.attention_norm.": _CROSS + "input_layernorm.",
    "cross_blocks.#.attention.q_norm.": _CROSS + "cross_attn.q_layer_norm.",
    "cross_blocks.#.attention.k_norm.": _CROSS + "cross_attn.k_layer_norm.",
    "cross_blocks.#.attention.out_proj.": _CROSS + "cross_attn.o_proj.",
    "cross_blocks.#.attention.": _CROSS + "cross_attn.",
    "cross_blocks.#.feed_forward_gate": _CROSS + "alpha_dense",
    "cross_blocks.#.feed_forward_norm.": _CROSS + "post_attention_layernorm.",
    "cross_blocks.#.feed_forward.": _CROSS + "mlp.",
    "text_blocks.#.attention_norm.": _TEXT + "input_layernorm.",
    "text_blocks.#.attention.out_proj.": _TEXT + "self_attn.o_proj.",
    "text_blocks.#.attention.": _TEXT + "self_attn.",
    "text_blocks.#.mlp_norm.": _TEXT + "post_attention_layernorm.",
    "text_blocks.#.mlp.": _TEXT + "mlp.",
    "norm.": "model.norm.",
    "embed.": "model.embed_tokens.",
    "head.": "lm_head.",
}


def _source(name: str, shape: torch.Size, vocab_size: int) -> Source:
    """Where in the checkpoint a parameter of `Flamingo` comes from."""
    theirs = renamed(name, _PREFIXES)
    if name.endswith("_gate"):
        return {theirs: (1, 1, *shape) if shape else (1,)}
    if name in ("embed.weight", "head.weight"):
        more = (
            "model.embed_tokens.additional_embedding.weight"
            if name == "embed.weight"
            else "lm_head.additional_fc.weight"
        )
        rows, width = shape
        source: Source = {theirs: (vocab_size, width)}
        if rows > vocab_size:
            source[more] = (rows - vocab_size, width)
        return source
    return {theirs: tuple(shape)}


def _side(section: Section, key: str, default: int) -> int:
    """A side in pixels, which may be written as a square's two."""
    value = section.values.get(key, default)
    if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
        return Section({key: value[0]}, section.where).integer(key, default)
    return section.integer(key, default)


def _token_ids(config: Section, key: str, default: int | None) -> tuple[int, ...]:
    value = config.values.get(key, default)
    values = value if isinstance(value, list) else [] if value is None else [value]
    return tuple(Section({key: token}, config.where).integer(key, -1, least=0) for token in values)
