"""How Hugging Face's ``InternVLForConditionalGeneration`` names the fields and the tensors of an `InternVL`."""

from __future__ import annotations

import re

from mmkernels.models.blocks.checkpoint import Names
from mmkernels.models.qwen_vl_weights import TEXT_FIELDS, decoder_names

ARCHITECTURES = {"internvl": "InternVLForConditionalGeneration"}
"""Model type -> architecture."""

FIELDS = TEXT_FIELDS | {
    "vision_width": "vision_config.hidden_size",
    "vision_layers": "vision_config.num_hidden_layers",
    "vision_heads": "vision_config.num_attention_heads",
    "vision_mlp": "vision_config.intermediate_size",
    "vision_activation": "vision_config.hidden_act",
    "vision_eps": "vision_config.layer_norm_eps",
    "vision_bias": "vision_config.attention_bias",
    "vision_qk_norm": "vision_config.use_qk_norm",
    "vision_positions": "vision_config.use_absolute_position_embeddings",
    "vision_dropout": "vision_config.attention_dropout",
    "channels": "vision_config.num_channels",
    "feature_layer": "vision_feature_layer",
    "projector_activation": "projector_hidden_act",
}
"""Field of `InternVLConfig` -> field of transformers' configuration."""

NORMS = {"layer_norm": "layer", "rms_norm": "rms"}
"""transformers' name of a norm -> ours."""

_VISION = "vision_tower."
_LAYER = _VISION + "encoder.layer.#."
_PROJECTOR = "multi_modal_projector."
_TEXT = "language_model.model."

# The start of a parameter's name in `InternVL` -> in the checkpoint.
_TABLE = {
    "vision.class_token": _VISION + "embeddings.cls_token",
    "vision.positions": _VISION + "embeddings.position_embeddings",
    "vision.patch.": _VISION + "embeddings.patch_embeddings.projection.",
    "vision.norm.": _VISION + "layernorm.",
    "vision.blocks.#.attention_norm.": _LAYER + "layernorm_before.",
    "vision.blocks.#.attention.out_proj.": _LAYER + "attention.projection_layer.",
    "vision.blocks.#.attention_scale": _LAYER + "lambda_1",
    "vision.blocks.#.mlp_norm.": _LAYER + "layernorm_after.",
    "vision.blocks.#.mlp.0.": _LAYER + "mlp.fc1.",
    "vision.blocks.#.mlp.2.": _LAYER + "mlp.fc2.",
    "vision.blocks.#.mlp_scale": _LAYER + "lambda_2",
    "projector.norm.": _PROJECTOR + "layer_norm.",
    "projector.mlp.0.": _PROJECTOR + "linear_1.",
    "projector.mlp.2.": _PROJECTOR + "linear_2.",
    **decoder_names(_TEXT),
    "head.": "language_model.lm_head.",
}
# With norms of query and key these are the second part of the projections.
_PLAIN = {"vision.blocks.#.attention.": _LAYER + "attention."}
_NORMED = {
    f"vision.blocks.#.attention.{part}_proj.{number}.": f"{_LAYER}attention.{part}_{name}."
    for part in ("q", "k")
    for number, name in enumerate(("proj", "norm"))
}

# Names in the model of transformers 5, of which it writes those above.
_ALSO = {
    "model.vision_tower.": _VISION,
    "model.multi_modal_projector.": _PROJECTOR,
    "model.language_model.": _TEXT,
    "lm_head.": "language_model.lm_head.",
}


def names(qk_norm: bool, unused_layers: range, unused_norm: bool) -> Names:
    """Returns the names of checkpoints.

    Args:
        qk_norm: whether query and key of the image encoder have norms.
        unused_layers: layers of the image encoder on which no feature depends.
        unused_norm: whether there is a norm behind them.
    """
    table = _TABLE | (_NORMED if qk_norm else {}) | _PLAIN
    unused = [r"embeddings\.mask_token$", *(rf"encoder\.layer\.{layer}\." for layer in unused_layers)]
    unused += [r"layernorm\."] if unused_norm else []
    # Also constants, which older versions of transformers saved.
    ignored = re.compile(rf"\.rotary_emb\.inv_freq$|^(?:model\.)?{re.escape(_VISION)}(?:{'|'.join(unused)})")
    return Names(table, ignored, also=_ALSO)
