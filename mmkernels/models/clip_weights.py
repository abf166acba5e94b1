"""How Hugging Face's ``CLIPModel`` and ``SiglipModel`` name the fields and the tensors of a `CLIP`."""

from __future__ import annotations

import re

from torch import Tensor

from mmkernels.models.blocks.checkpoint import Names

ARCHITECTURES = {"clip": "CLIPModel", "siglip": "SiglipModel"}
"""Model type, which is also `CLIPConfig.variant` -> architecture."""

_TOWER_FIELDS = {
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "mlp": "intermediate_size",
    "activation": "hidden_act",
    "eps": "layer_norm_eps",
    "dropout": "attention_dropout",
}
FIELDS = {
    **{f"vision_{ours}": f"vision_config.{theirs}" for ours, theirs in _TOWER_FIELDS.items()},
    **{f"text_{ours}": f"text_config.{theirs}" for ours, theirs in _TOWER_FIELDS.items()},
    "image_size": "vision_config.image_size",
    "patch_size": "vision_config.patch_size",
    "channels": "vision_config.num_channels",
    "vocab_size": "text_config.vocab_size",
    "text_length": "text_config.max_position_embeddings",
}
"""Field of `CLIPConfig` -> field of transformers' configuration."""


_IGNORED = re.compile(r"\.position_ids$")  # a constant, which older versions of transformers saved

_VISION = "vision_model."
_TEXT = "text_model."


def _layer_names(ours: str, theirs: str) -> dict[str, str]:
    parts = {"attention_norm": "layer_norm1", "attention": "self_attn", "mlp_norm": "layer_norm2"}
    parts |= {"mlp.0": "mlp.fc1", "mlp.2": "mlp.fc2"}
    return {f"{ours}.blocks.#.{part}.": f"{theirs}encoder.layers.#.{name}." for part, name in parts.items()}


def vision_names(prefix: str) -> dict[str, str]:
    """Returns the names of a `VisionTransformer`: as in `Names.table`, where a checkpoint's start with `prefix`."""
    return {
        "vision.patch.": prefix + "embeddings.patch_embedding.",
        "vision.class_token": prefix + "embeddings.class_embedding",
        "vision.positions": prefix + "embeddings.position_embedding.weight",
        "vision.norm.": prefix + "pre_layrnorm.",  # this is how transformers spells it
        **_layer_names("vision", prefix),
    }


# The start of a parameter's name in `CLIP` -> in the checkpoint.
_BOTH = {
    "logit_scale": "logit_scale",
    **vision_names(_VISION),
    "vision_norm.": _VISION + "post_layernorm.",
    "text.embed.": _TEXT + "embeddings.token_embedding.",
    "text.positions": _TEXT + "embeddings.position_embedding.weight",
    "text.norm.": _TEXT + "final_layer_norm.",
    **_layer_names("text", _TEXT),
}
_CLIP_TABLE = {
    **_BOTH,
    "image_projection.": "visual_projection.",
    "text_projection.": "text_projection.",
}
_SIGLIP_TABLE = {
    **_BOTH,
    "logit_bias": "logit_bias",
    "image_pool.queries": _VISION + "head.probe",
    "image_pool.attention.in_proj_": _VISION + "head.attention.in_proj_",
    "image_pool.attention.out_proj.": _VISION + "head.attention.out_proj.",
    "image_pool.norm.": _VISION + "head.layernorm.",
    "image_pool.mlp.0.": _VISION + "head.mlp.fc1.",
    "image_pool.mlp.2.": _VISION + "head.mlp.fc2.",
    "text_projection.": _TEXT + "head.",
}


def _split_projections(weights: dict[str, Tensor]) -> None:
    """torch.nn.MultiheadAttention, which pools SigLIP's images, keeps its three projections in one tensor."""
    for kind in ("weight", "bias"):
        whole = weights.pop(f"image_pool.attention.in_proj_{kind}", None)
        if whole is not None:
            for projection, part in zip(("q_proj", "k_proj", "v_proj"), whole.tensor_split(3)):
                # A copy: a view would keep the other parts in memory.
                weights[f"image_pool.attention.{projection}.{kind}"] = part.clone()


NAMES = {"clip": Names(_CLIP_TABLE, _IGNORED), "siglip": Names(_SIGLIP_TABLE, _IGNORED, _split_projections)}
"""By variant."""
