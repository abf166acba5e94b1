"""How Hugging Face's DeepSeek-VL classes name the fields and the tensors of a `DeepSeekVL`."""

from __future__ import annotations

import re
from typing import Any

from mmkernels.models.blocks.checkpoint import CheckpointError, Names
from mmkernels.models.clip_weights import vision_names
from mmkernels.models.qwen_vl_weights import TEXT_FIELDS, decoder_names

ARCHITECTURES = {
    "deepseek_vl": "DeepseekVLForConditionalGeneration",
    "deepseek_vl_hybrid": "DeepseekVLHybridForConditionalGeneration",
}
"""Model type -> architecture."""

_TOWER_FIELDS = {
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "activation": "hidden_act",
    "eps": "layer_norm_eps",
    "dropout": "attention_dropout",
}
FIELDS = TEXT_FIELDS | {
    **{f"vision_{ours}": f"vision_config.{theirs}" for ours, theirs in _TOWER_FIELDS.items()},
    "vision_mlp": "vision_config.intermediate_size",
    "image_size": "vision_config.image_size",
    "patch_size": "vision_config.patch_size",
    "channels": "vision_config.num_channels",
}
"""Field of `DeepSeekVLConfig` -> field of transformers' configuration."""

_SAM = "high_res_vision_config."
SAM_FIELDS = {
    **{f"sam_{ours}": _SAM + theirs for ours, theirs in _TOWER_FIELDS.items()},
    "sam_mlp": _SAM + "mlp_dim",
    "sam_image_size": _SAM + "image_size",
    "sam_patch_size": _SAM + "patch_size",
    "sam_window": _SAM + "window_size",
    "sam_channels": _SAM + "output_channels",
    "sam_bias": _SAM + "qkv_bias",
    "sam_positions": _SAM + "use_abs_pos",
    "sam_relative": _SAM + "use_rel_pos",
}
"""The further fields of the hybrid encoder."""


def check_fixed(theirs: Any, where: str) -> None:
    """Raises a CheckpointError where transformers' configuration has a value that models here don't have."""
    text, vision = theirs.text_config, theirs.vision_config
    fixed = [
        ("text_config", "model_type", text.model_type, "llama"),
        ("vision_config", "model_type", vision.model_type, "siglip_vision_model"),
    ]
    sam = getattr(theirs, "high_res_vision_config", None)
    if sam is not None:
        fixed += [("high_res_vision_config", "model_type", sam.model_type, "sam_vision_model")]
    _check(fixed, where)
    rope = text.rope_parameters.get("rope_type", "default")
    fixed = [
        ("text_config", "rope_type", rope, "default"),
        ("text_config", "attention_bias", text.attention_bias, False),
        ("text_config", "mlp_bias", text.mlp_bias, False),
    ]
    if sam is not None:
        fixed += [("high_res_vision_config", "num_channels", sam.num_channels, vision.num_channels)]
    _check(fixed, where)


def _check(fixed: list[tuple[str, str, Any, Any]], where: str) -> None:
    for section, name, got, must in fixed:
        if got != must:
            raise CheckpointError(f"{where}, {section}: {name} must be {must!r}, got {repr(got)[:200]}")


_HIGH = "model.high_res_vision_"
_ENCODER = _HIGH + "model.vision_encoder."
_LAYER = _ENCODER + "layers.#."
_NECK = {"0.": "conv1.", "1.norm.": "layer_norm1.", "2.": "conv2.", "3.norm.": "layer_norm2."}

# The start of a parameter's name in `DeepSeekVL` -> in the checkpoint.
_TABLE = {
    **vision_names("model.vision_model."),
    "vision_norm.": "model.vision_model.post_layernorm.",
    **decoder_names("model.language_model."),
    "head.": "lm_head.",
}
_PLAIN = {"aligner.0.": "model.aligner.linear1.", "aligner.2.": "model.aligner.linear2."}
_HYBRID = {
    "sam.patch.": _ENCODER + "patch_embed.projection.",
    "sam.positions": _ENCODER + "pos_embed",
    "sam.blocks.#.attention_norm.": _LAYER + "layer_norm1.",
    "sam.blocks.#.attention.row_positions": _LAYER + "attn.rel_pos_h",
    "sam.blocks.#.attention.column_positions": _LAYER + "attn.rel_pos_w",
    "sam.blocks.#.attention.qkv_proj.": _LAYER + "attn.qkv.",
    "sam.blocks.#.attention.out_proj.": _LAYER + "attn.proj.",
    "sam.blocks.#.mlp_norm.": _LAYER + "layer_norm2.",
    "sam.blocks.#.mlp.0.": _LAYER + "mlp.lin1.",
    "sam.blocks.#.mlp.2.": _LAYER + "mlp.lin2.",
    **{f"sam.neck.{ours}": f"{_ENCODER}neck.{theirs}" for ours, theirs in _NECK.items()},
    **{f"global_neck.{ours}": f"{_HIGH}neck.{theirs}" for ours, theirs in _NECK.items()},
    "sam_down.0.": _HIGH + "proj.conv1.",
    "sam_down.1.": _HIGH + "proj.conv2.",
    "global_scale": _HIGH + "alpha",
    "aligner.sam_proj.": "model.aligner.high_res_vision_proj.",
    "aligner.": "model.aligner.",
}
# SigLIP pools an image for its contrastive loss; older versions of transformers saved constants.
_IGNORED = re.compile(r"\.rotary_emb\.inv_freq$|\.position_ids$|^model\.vision_model\.(?:vision_model\.)?head\.")
_ALSO = {"model.vision_model.vision_model.": "model.vision_model."}  # of older versions of transformers


def names(hybrid: bool) -> Names:
    """Returns the names of checkpoints. `hybrid`: of those with a second encoder."""
    return Names((_HYBRID if hybrid else _PLAIN) | _TABLE, _IGNORED, also=_ALSO)
