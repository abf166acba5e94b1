"""How the checkpoints of BLIP, BLIP-2 and InstructBLIP name what they have in common."""

from __future__ import annotations

import math

import torch
from torch import Tensor

VISION_FIELDS = {
    "vision_width": "vision_config.hidden_size",
    "vision_layers": "vision_config.num_hidden_layers",
    "vision_heads": "vision_config.num_attention_heads",
    "vision_mlp": "vision_config.intermediate_size",
    "image_size": "vision_config.image_size",
    "patch_size": "vision_config.patch_size",
    "vision_activation": "vision_config.hidden_act",
    "vision_eps": "vision_config.layer_norm_eps",
    "vision_dropout": "vision_config.attention_dropout",
}
"""Field of a model's configuration -> field of transformers' configuration, of the image encoder."""

FIRST_LOGIT_SCALE = math.log(1 / 0.07)
"""The logarithm of the multiplier of the contrastive logits at which training starts; checkpoints hold none."""


def vision_names(prefix: str) -> dict[str, str]:
    """Returns the start of a parameter's name in the image encoder, `vision` and `vision_norm` -> in a checkpoint.

    Args:
        prefix: of the encoder's names in the checkpoint.
    """
    layer = prefix + "encoder.layers.#."
    return {
        "vision.class_token": prefix + "embeddings.class_embedding",
        "vision.positions": prefix + "embeddings.position_embedding",
        "vision.patch.": prefix + "embeddings.patch_embedding.",
        "vision.blocks.#.attention_norm.": layer + "layer_norm1.",
        "vision.blocks.#.attention.qkv.": layer + "self_attn.qkv.",  # split by `split_qkv`
        "vision.blocks.#.attention.out_proj.": layer + "self_attn.projection.",
        "vision.blocks.#.mlp_norm.": layer + "layer_norm2.",
        "vision.blocks.#.mlp.0.": layer + "mlp.fc1.",
        "vision.blocks.#.mlp.2.": layer + "mlp.fc2.",
        "vision_norm.": prefix + "post_layernorm.",
    }


def split_qkv(weights: dict[str, Tensor]) -> None:
    """Splits the projections of query, key and value of the image encoder, which checkpoints keep in one tensor."""
    for name in [name for name in weights if ".attention.qkv." in name]:
        for projection, part in zip(("q_proj", "k_proj", "v_proj"), weights.pop(name).tensor_split(3), strict=True):
            # A copy: a view would keep the other parts in memory.
            weights[name.replace(".qkv.", f".{projection}.")] = part.clone()


def add_logit_scale(weights: dict[str, Tensor]) -> None:
    """Adds the logarithm of the multiplier of the contrastive logits, which checkpoints for retrieval lack."""
    weights.setdefault("logit_scale", torch.tensor(FIRST_LOGIT_SCALE))
