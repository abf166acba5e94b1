"""How Hugging Face's ``CLIPModel`` and ``SiglipModel`` name the fields and the tensors of a `CLIP`."""

from __future__ import annotations

import re

from torch import Tensor

from mmkernels.models.blocks.checkpoint import Names

ARCHITECTURES = {"clip": "CLIPModel", "siglip": "SiglipModel"}
"""Model type, which is also `CLIPConfig.variant` -> architecture."""

FIELDS = {
    **{
        f"{tower}_{ours}": f"{tower}_config.{theirs}"
        for tower in ("vision", "text")
        for ours, theirs in (
            ("width", "hidden_size"),
            ("layers", "num_hidden_layers"),
            ("heads", "num_attention_heads"),
            ("mlp", "intermediate_size"),
            ("activation", "hidden_act"),
            ("eps", "layer_norm_eps"),
            ("dropout", "attention_dropout"),
        )
    },
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

# The start of a parameter's name in `CLIP` -> in the checkpoint.
_BOTH = {
    "logit_scale": "logit_scale",
    "vision.patch.": _VISION + "embeddings.patch_embedding.",
    "vision.class_token": _VISION + "embeddings.class_embedding",
    "vision.positions": _VISION + "embeddings.position_embedding.weight",
    "vision.norm.": _VISION + "pre_layrnorm.",  # this is how transformers spells it
    "vision_norm.": _VISION + "post_layernorm.",
    "text.embed.": _TEXT + "embeddings.token_embedding.",
    "text.positions": _TEXT + "embeddings.position_embedding.weight",
    "text.norm.": _TEXT + "final_layer_norm.",
    **{
        f"{tower}.blocks.#.{ours}": f"{tower}_model.encoder.layers.#.{theirs}"
        for tower in ("vision", "text")
        for ours, theirs in (
            ("attention_norm.", "layer_norm1."),
            ("attention.", "self_attn."),
            ("mlp_norm.", "layer_norm2."),
            ("mlp.0.", "mlp.fc1."),
            ("mlp.2.", "mlp.fc2."),
        )
    },
}
_CLIP_TABLE = {
    **_BOTH,
    "image_projection.": "visual_projection.",
    "text_projection.": "text_projection.",
}
_SIGLIP_TABLE = {
    **_BOTH,
    "logit_bias": "logit_bias",
    "image_pool.probe": _VISION + "head.probe",
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
