"""Small DeepSeek-VL models of transformers with random weights, and inputs for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmkernels.testing.models import build as build_model
from mmkernels.testing.models import randomise
from mmkernels.testing.parts import decoder, layers, rope

MARKER, VOCAB, SIDE, LARGE, TOKENS = 99, 128, 32, 64, 16

# Changes to the configuration below: `text__x` sets x of the language model, `vision__x` of SigLIP,
# `high_res_vision__x` of SAM, which only the hybrid has.
VARIANTS: dict[str, dict[str, Any]] = {
    "deepseek_vl": {},  # the embeddings are tied, which is transformers' default
    "deepseek_vl_shards": {
        "shard": True,
        "tie_word_embeddings": False,
        "text__num_key_value_heads": 4,
        "text__rms_norm_eps": 1e-5,
        "vision__layer_norm_eps": 1e-3,
        "vision__num_channels": 1,
        "vision__hidden_act": "gelu",
        "vision__vision_use_head": True,  # of SigLIP's contrastive loss: unused here
    },
    "deepseek_vl_hybrid": {"high_res_vision__num_channels": 3},
    "deepseek_vl_hybrid_plain": {  # windows without padding, no positions, the tapped layer is the last one
        "tie_word_embeddings": False,
        "high_res_vision__num_channels": 3,
        "high_res_vision__window_size": 4,
        "high_res_vision__global_attn_indexes": [2],
        "high_res_vision__use_abs_pos": False,
        "high_res_vision__use_rel_pos": False,
        "high_res_vision__qkv_bias": False,
        "high_res_vision__layer_norm_eps": 1e-3,
        "high_res_vision__hidden_act": "relu",
    },
    "deepseek_vl_hybrid_zeros": {  # windows filled with zeros
        "high_res_vision__num_channels": 3,
        "high_res_vision__qkv_bias": False,
        "high_res_vision__window_size": 5,
        "high_res_vision__global_attn_indexes": [0, 2],
    },
}
PLAIN, HYBRID = "deepseek_vl", "deepseek_vl_hybrid"


def is_hybrid(variant: str) -> bool:
    """Whether there is a second encoder."""
    return variant.startswith(HYBRID)


def config(variant: str) -> dict[str, Any]:
    """Returns the arguments of transformers' configuration."""
    vision = layers(image_size=SIDE, patch_size=8, heads=2) | {"num_channels": 3, "vision_use_head": False}
    text = decoder(width=48, mlp=80, vocabulary=VOCAB, model_type="llama") | rope(5000.0)
    sam = layers(width=24, depth=3, heads=2, image_size=LARGE, patch_size=8) | {"output_channels": 6, "mlp_dim": 40}
    sam |= {"window_size": 3, "global_attn_indexes": [1]}  # 8 x 8 patches: the last windows are filled
    parts = {
        "vision": vision | {"model_type": "siglip_vision_model"},
        "text": text | {"max_position_embeddings": 512},
        "high_res_vision": sam | {"model_type": "sam_vision_model"},
    }
    whole: dict[str, Any] = {"image_token_id": MARKER}
    for key, value in VARIANTS[variant].items():
        part, _, name = key.partition("__")
        if name:
            parts[part][name] = value
        elif key != "shard":
            whole[key] = value
    if not is_hybrid(variant):
        del parts["high_res_vision"]
    return whole | {f"{part}_config": sizes for part, sizes in parts.items()}


def build(variant: str) -> Any:
    """Returns transformers' model of a variant, with every parameter redrawn."""
    name = "DeepseekVLHybrid" if is_hybrid(variant) else "DeepseekVL"
    return randomise(build_model(f"{name}ForConditionalGeneration", config(variant)).eval(), std=0.2)


def pixels(theirs: Any, images: int) -> dict[str, Tensor]:
    """Returns random images, at one resolution or two: what the model gets beside the text."""
    generator, channels = torch.Generator().manual_seed(images), theirs.config.vision_config.num_channels
    draw = lambda side: torch.randn(images, channels, side, side, generator=generator)
    small = {"pixel_values": draw(SIDE)}
    return small | {"high_res_pixel_values": draw(LARGE)} if hasattr(theirs.model, "high_res_vision_model") else small


def prompt(rows: list[int]) -> tuple[Tensor, Tensor]:
    """Returns prompts and their attention mask ``[B, L]``, padded on the left.

    Args:
        rows: the number of images of each row, which stand between random text.
    """
    generator = torch.Generator().manual_seed(len(rows))
    words = lambda count: torch.randint(3, MARKER, (count,), generator=generator).tolist()
    found = []
    for images in rows:
        row = words(4)
        for _ in range(images):
            row += [MARKER] * TOKENS + words(3)
        found.append(row)
    length = max(map(len, found))
    ids = torch.tensor([[0] * (length - len(row)) + row for row in found])
    return ids, torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in found])


def inputs(theirs: Any, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Returns two prompts: one with two images, one with one."""
    ids, mask = prompt([2, 1])
    images = {name: x.to(dtype) for name, x in pixels(theirs, 3).items()}
    return {"input_ids": ids, "attention_mask": mask} | images


def labels_of(given: dict[str, Tensor]) -> Tensor:
    """Returns labels of the text, but for the first token, which padding would predict."""
    ids, mask = given["input_ids"], given["attention_mask"]
    return ids.masked_fill((mask.cumsum(1) < 2) | (ids == MARKER), -100)
