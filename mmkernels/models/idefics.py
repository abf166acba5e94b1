"""How Hugging Face's ``IdeficsForVisionText2Text`` names the fields and the tensors of a `Flamingo`."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from mmkernels.models.blocks.checkpoint import CheckpointError, Names, read_json
from mmkernels.models.clip_weights import vision_names

ARCHITECTURES = {"idefics": "IdeficsForVisionText2Text"}
"""Model type -> architecture."""

FIELDS = {
    "vision_width": "vision_config.embed_dim",
    "vision_layers": "vision_config.num_hidden_layers",
    "vision_heads": "vision_config.num_attention_heads",
    "vision_mlp": "vision_config.intermediate_size",
    "vision_activation": "vision_config.hidden_act",
    "vision_dropout": "vision_config.attention_dropout",
    "layer_norm_eps": "vision_config.layer_norm_eps",
    "channels": "vision_config.num_channels",
    "resampler_depth": "perceiver_config.resampler_depth",
    "resampler_heads": "perceiver_config.resampler_n_heads",
    "resampler_head_dim": "perceiver_config.resampler_head_dim",
    "resampler_qk_norm": "perceiver_config.qk_layer_norms_perceiver",
    "text_width": "hidden_size",
    "text_layers": "num_hidden_layers",
    "text_heads": "num_attention_heads",
    "text_mlp": "intermediate_size",
    "text_activation": "hidden_act",
    "cross_every": "cross_layer_interval",
    "qk_norm": "qk_layer_norms",
    "rms_norm_eps": "rms_norm_eps",
    "dropout": "dropout",
    "tie_embeddings": "tie_word_embeddings",
}
"""Field of `FlamingoConfig` -> field of transformers' configuration."""


def image_token_id(folder: Path, vocab_size: int) -> int | None:
    """Returns the id of ``<image>`` in a folder's tokenizer files, or None. ``IdeficsConfig`` has no field for it."""
    token = None
    if (path := folder / "added_tokens.json").is_file():
        token = read_json(path).get("<image>")
    if (tokenizer := folder / "tokenizer.json").is_file():
        added = read_json(tokenizer).get("added_tokens") or []
        if not isinstance(added, list):
            raise CheckpointError(f"{tokenizer}: added_tokens must be a list, got {added!r}"[:500])
        for entry in added:
            if isinstance(entry, dict) and entry.get("content") == "<image>":
                path, token = tokenizer, entry.get("id")
                break
    if token is not None and (type(token) is not int or not 0 <= token < vocab_size):
        raise CheckpointError(f"{path}: the id of <image> must be an integer below {vocab_size}, got {token!r}"[:500])
    return token


# The last norm of the image encoder is for a pooled output that Idefics does not use. The others are constants, which
# older versions of transformers saved.
_IGNORED = re.compile(r"vision_model\.post_layernorm\.|\.rotary_emb\.inv_freq$|\.position_ids$")

_RESAMPLER = "model.perceiver_resampler."
_CROSS = "model.gated_cross_attn_layers.#."
_TEXT = "model.layers.#."

# The start of a parameter's name in `Flamingo` -> in the checkpoint.
_TABLE = {
    **vision_names("model.vision_model."),
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


def _join_vocabulary(weights: dict[str, Tensor]) -> None:
    """The rows of tokens that were added to the vocabulary lie in a second tensor."""
    for name, more in (("embed", "additional_embedding"), ("head", "additional_fc")):
        whole, added = weights.get(f"{name}.weight"), weights.pop(f"{name}.{more}.weight", None)
        if whole is not None and added is not None and whole.shape[1:] == added.shape[1:]:
            weights[f"{name}.weight"] = torch.cat([whole, added])


NAMES = Names(_TABLE, _IGNORED, _join_vocabulary)
