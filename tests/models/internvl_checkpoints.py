"""Small InternVL models of transformers with random weights, and inputs for them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from mmkernels.testing.models import build as build_model
from mmkernels.testing.models import randomise
from mmkernels.testing.parts import decoder, layers, rope

MARKER, VOCAB, SIDE = 99, 128, 32
DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 5000.0, "factor": 2.0}}

# Changes to the configuration below: `text__x` sets x of the language model, `vision__x` of the image encoder.
VARIANTS: dict[str, dict[str, Any]] = {
    "internvl_qwen2": {},  # InternVL3: layer norms, biases; the embeddings are tied, which is transformers' default
    "internvl_qwen3": {  # InternVL3.5
        "shard": True,
        "tie_word_embeddings": False,
        "text__model_type": "qwen3",
        "text__head_dim": 24,
        "vision__norm_type": "rms_norm",
        "vision__use_qk_norm": True,
        "vision__attention_bias": False,
        "vision__layer_norm_eps": 1e-3,
        "downsample_ratio": 0.25,
        "projector_hidden_act": "gelu_pytorch_tanh",
    },
    "internvl_llama": {  # InternVL2.5
        "text__model_type": "llama",
        **{f"text__{name}": value for name, value in DYNAMIC.items()},
        "vision__use_qk_norm": True,
        "vision__use_mean_pooling": False,  # a norm follows the last layer
        "vision__image_size": SIDE,
        "vision__patch_size": 8,
        "vision__num_channels": 1,
        "vision__hidden_act": "quick_gelu",
    },
    "internvl_early": {
        "vision_feature_layer": -2,
        "vision__use_mean_pooling": False,  # a norm follows only the last layer
        "vision__use_mask_token": True,
        "vision__use_absolute_position_embeddings": False,
    },
}


def config(variant: str) -> dict[str, Any]:
    """Returns the arguments of transformers' configuration."""
    vision = layers(image_size=[SIDE, SIDE], patch_size=[4, 4], depth=3, heads=2, attention_bias=True)
    vision |= {"num_channels": 3}
    text = decoder(width=48, mlp=80, vocabulary=VOCAB, model_type="qwen2") | rope(5000.0)
    parts = {"vision": vision, "text": text | {"max_position_embeddings": 512}}
    whole: dict[str, Any] = {"image_token_id": MARKER}
    for key, value in VARIANTS[variant].items():
        part, _, name = key.partition("__")
        if name:
            parts[part][name] = value
        elif key != "shard":
            whole[key] = value
    return whole | {f"{part}_config": sizes for part, sizes in parts.items()}


def build(variant: str) -> Any:
    """Returns transformers' model of a variant, with every parameter redrawn."""
    return randomise(build_model("InternVLForConditionalGeneration", config(variant)).eval(), std=0.2)


def in_float64(theirs: Any) -> Any:
    """Returns a copy of transformers' model that computes in float64: its RMS norms would go through float32."""
    theirs = copy.deepcopy(theirs).double()
    for name, module in list(theirs.named_modules()):
        if hasattr(module, "variance_epsilon"):
            norm = nn.RMSNorm(module.weight.shape[0], eps=module.variance_epsilon)
            norm.weight = module.weight
            parent, _, last = name.rpartition(".")
            setattr(theirs.get_submodule(parent), last, norm)
    return theirs


def tokens(theirs: Any, side: int = SIDE) -> int:
    """Returns how many tokens a tile has."""
    vision = theirs.config.vision_config
    patch = vision.patch_size if isinstance(vision.patch_size, int) else vision.patch_size[0]
    return int(side // patch * theirs.config.downsample_ratio) ** 2


def pixels(theirs: Any, tiles: int, side: int = SIDE) -> Tensor:
    """Returns random tiles."""
    generator = torch.Generator().manual_seed(tiles)
    return torch.randn(tiles, theirs.config.vision_config.num_channels, side, side, generator=generator)


def prompt(theirs: Any, rows: list[list[int]], side: int = SIDE) -> tuple[Tensor, Tensor]:
    """Returns prompts and their attention mask ``[B, L]``, padded on the left.

    Args:
        rows: for each row the tiles of its images, which stand between random text.
    """
    each, generator = tokens(theirs, side), torch.Generator().manual_seed(len(rows))
    found = []
    for images in rows:
        row = torch.randint(3, MARKER, (4,), generator=generator).tolist()
        for tiles in images:
            row += [MARKER] * each * tiles + torch.randint(3, MARKER, (3,), generator=generator).tolist()
        found.append(row)
    length = max(map(len, found))
    ids = torch.tensor([[0] * (length - len(row)) + row for row in found])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in found])
    return ids, mask


def inputs(theirs: Any) -> dict[str, Tensor]:
    """Returns two prompts: one with an image of two tiles and one of one, one with an image of one tile."""
    ids, mask = prompt(theirs, [[2, 1], [1]])
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels(theirs, 4)}


def labels_of(given: dict[str, Tensor]) -> Tensor:
    """Returns labels of the text, but for the first token, which padding would predict."""
    ids, mask = given["input_ids"], given["attention_mask"]
    return ids.masked_fill((mask.cumsum(1) < 2) | (ids == MARKER), -100)
