"""How Hugging Face's ``JanusForConditionalGeneration`` names the fields and the tensors of a `Janus`."""

from __future__ import annotations

import re
from typing import Any

from mmkernels.models.blocks.checkpoint import CheckpointError, Names
from mmkernels.models.clip_weights import vision_names
from mmkernels.models.qwen_vl_weights import TEXT_FIELDS, decoder_names

ARCHITECTURES = {"janus": "JanusForConditionalGeneration"}
"""Model type -> architecture."""

FIELDS = TEXT_FIELDS | {
    "vision_width": "vision_config.hidden_size",
    "vision_layers": "vision_config.num_hidden_layers",
    "vision_heads": "vision_config.num_attention_heads",
    "vision_activation": "vision_config.hidden_act",
    "vision_eps": "vision_config.layer_norm_eps",
    "vision_dropout": "vision_config.attention_dropout",
    "image_size": "vision_config.image_size",
    "patch_size": "vision_config.patch_size",
    "channels": "vision_config.num_channels",
    "aligner_layers": "vision_config.depth",
    "aligner_activation": "vision_config.hidden_act",
    "vq_codes": "vq_config.num_embeddings",
    "vq_code_width": "vq_config.embed_dim",
    "vq_latent": "vq_config.latent_channels",
    "vq_width": "vq_config.base_channels",
    "vq_blocks": "vq_config.num_res_blocks",
    "image_aligner_layers": "vq_config.num_hidden_layers",
    "image_activation": "vq_config.hidden_act",
}
"""Field of `JanusConfig` -> field of transformers' configuration."""


def check_fixed(theirs: Any, where: str) -> None:
    """Raises a CheckpointError where transformers' configuration has a value that models here don't have."""
    text, vision, vq = theirs.text_config, theirs.vision_config, theirs.vq_config
    rope = text.rope_parameters.get("rope_type", "default")
    width, side = text.hidden_size, _quotient(vision.image_size, vision.patch_size)
    fixed = [
        ("text_config", "model_type", text.model_type, "llama"),
        ("text_config", "rope_type", rope, "default"),
        ("text_config", "attention_bias", text.attention_bias, False),
        ("text_config", "mlp_bias", text.mlp_bias, False),
        ("vision_config", "attention_bias", vision.attention_bias, True),
        ("vision_config", "use_qk_norm", vision.use_qk_norm, False),
        ("vision_config", "hidden_dropout_rate", vision.hidden_dropout_rate, 0),
        ("vision_config", "projection_dropout", vision.projection_dropout, 0),
        ("vision_config", "projection_dim", vision.projection_dim, width),
        ("vision_config", "num_image_tokens", vision.num_image_tokens, side * side),
        ("vq_config", "double_latent", vq.double_latent, False),
        ("vq_config", "dropout", vq.dropout, 0),
        ("vq_config", "in_channels", vq.in_channels, vision.num_channels),
        ("vq_config", "out_channels", vq.out_channels, vision.num_channels),
        ("vq_config", "projection_dim", vq.projection_dim, width),
        ("vq_config", "image_token_embed_dim", vq.image_token_embed_dim, width),
    ]
    for section, name, got, must in fixed:
        if got != must:
            raise CheckpointError(f"{where}, {section}: {name} must be {must!r}, got {repr(got)[:200]}")


def _quotient(size: Any, part: Any) -> Any:
    """Returns how many parts a size has; sizes that are no integers are for `check_config` to refuse."""
    return size // part if type(size) is type(part) is int and part > 0 else 0


_VISION = "model.vision_model."
# The start of a parameter's name in `Janus` -> in the checkpoint.
_TABLE = {
    "vision.blocks.#.attention.out_proj.": _VISION + "encoder.layers.#.self_attn.projection_layer.",
    **vision_names(_VISION),
    "vision_norm.": _VISION + "post_layernorm.",
    "vq.": "model.vqmodel.",
    "image_embed.": "model.generation_embeddings.",
    "image_head.0.": "model.generation_head.proj_out.",
    "image_head.2.": "model.generation_head.vision_head.",
    **decoder_names("model.language_model."),
    "head.": "lm_head.",
}
_IGNORED = re.compile(r"\.rotary_emb\.inv_freq$|\.position_ids$")  # constants, which older versions saved


def _aligner_names(ours: str, theirs: str, layers: int) -> dict[str, str]:
    """Returns the names of linear layers with activations between them."""
    hidden = {f"{ours}{2 * number + 2}.": f"{theirs}hidden_layers.{number}." for number in range(layers - 1)}
    return {f"{ours}0.": f"{theirs}fc1."} | hidden


def names(aligner_layers: int, image_aligner_layers: int) -> Names:
    """Returns the names of checkpoints.

    Args:
        aligner_layers, image_aligner_layers: the linear layers behind the encoder, and behind the embeddings of image
            tokens.
    """
    table = _TABLE | _aligner_names("aligner.", "model.aligner.", aligner_layers)
    table |= _aligner_names("image_aligner.", "model.generation_aligner.", image_aligner_layers)
    return Names(table, _IGNORED)
