"""How Hugging Face's Whisper class names the fields and the tensors of a `Whisper`."""

from __future__ import annotations

import re

from mmkernels.models.blocks.checkpoint import Names

ARCHITECTURES = {"whisper": "WhisperForConditionalGeneration"}
"""Model type -> architecture."""

FIELDS = {
    "audio_width": "d_model",
    "audio_layers": "encoder_layers",
    "audio_heads": "encoder_attention_heads",
    "audio_mlp": "encoder_ffn_dim",
    "audio_positions": "max_source_positions",
    "mel_bins": "num_mel_bins",
    "audio_activation": "activation_function",
    "audio_dropout": "attention_dropout",
    "audio_residual_dropout": "dropout",
    "audio_activation_dropout": "activation_dropout",
    "audio_layer_dropout": "encoder_layerdrop",
    "text_width": "d_model",
    "text_layers": "decoder_layers",
    "text_heads": "decoder_attention_heads",
    "text_mlp": "decoder_ffn_dim",
    "text_length": "max_target_positions",
    "text_activation": "activation_function",
    "text_dropout": "attention_dropout",
    "text_residual_dropout": "dropout",
    "text_activation_dropout": "activation_dropout",
    "text_layer_dropout": "decoder_layerdrop",
    "vocab_size": "vocab_size",
    "start_token_id": "decoder_start_token_id",
    "pad_token_id": "pad_token_id",
    "tie_embeddings": "tie_word_embeddings",
    "median_filter": "median_filter_width",
    "spec_augment": "apply_spec_augment",
}
"""Field of `WhisperConfig` -> field of transformers' configuration."""


def encoder_names(ours: str, theirs: str) -> dict[str, str]:
    """Returns the start of a parameter's name in an `AudioEncoder` -> in the checkpoint, each behind a prefix."""
    block, layer = f"{ours}blocks.#.", f"{theirs}layers.#."
    return {
        f"{ours}positions": f"{theirs}embed_positions.weight",
        f"{ours}conv": f"{theirs}conv",
        f"{ours}norm.": f"{theirs}layer_norm.",
        f"{block}attention_norm.": f"{layer}self_attn_layer_norm.",
        f"{block}attention.": f"{layer}self_attn.",
        f"{block}mlp_norm.": f"{layer}final_layer_norm.",
        f"{block}mlp.0.": f"{layer}fc1.",
        f"{block}mlp.3.": f"{layer}fc2.",
    }


def _decoder_names(ours: str, theirs: str) -> dict[str, str]:
    return {
        f"{ours}embed.": f"{theirs}embed_tokens.",
        f"{ours}positions.": f"{theirs}embed_positions.",
        f"{ours}blocks.#.cross_norm.": f"{theirs}layers.#.encoder_attn_layer_norm.",
        f"{ours}blocks.#.cross.": f"{theirs}layers.#.encoder_attn.",
        **{key: value for key, value in encoder_names(ours, theirs).items() if "positions" not in key},
    }


NAMES = Names(
    {
        **encoder_names("encoder.", "model.encoder."),
        **_decoder_names("decoder.", "model.decoder."),
        "head.": "proj_out.",
    },
    re.compile(r"^$"),
)
"""The names of a checkpoint."""
