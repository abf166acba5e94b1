"""Small CLIP and SigLIP models of transformers with random weights, and inputs for them."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

from mmkernels.testing.models import build as build_model
from mmkernels.testing.models import randomise
from mmkernels.testing.parts import encoder, vision

EOS = 90  # not the highest id of the texts, which a "clip_early" looks for
VOCAB = 100
LENGTH = 12

# Changes to the default configurations: `text__x` sets x of the text tower, `vision__x` of the image tower.
VARIANTS: dict[str, dict[str, Any]] = {
    "clip": {},
    "clip_early": {"text__eos_token_id": 2},  # the feature is that of the highest id
    "clip_gelu": {"text__hidden_act": "gelu", "vision__hidden_act": "gelu_pytorch_tanh", "projection_dim": 48},
    "clip_shards": {"shard": True, "vision__num_channels": 1, "vision__image_size": 36, "text__layer_norm_eps": 1e-3},
    "siglip": {},
    "siglip_quick": {"text__hidden_act": "quick_gelu", "vision__hidden_act": "gelu", "vision__layer_norm_eps": 1e-3},
    "siglip_shards": {"shard": True, "text__hidden_size": 48, "text__projection_size": 32, "text__vocab_size": 128},
}


def build(variant: str) -> Any:
    """Returns transformers' model of a variant, with every parameter redrawn: it sets biases to 0 and norms to 1."""
    siglip = variant.startswith("siglip")
    theirs = randomise(build_model("SiglipModel" if siglip else "CLIPModel", config(variant)).eval(), std=0.25)
    with torch.no_grad():
        theirs.logit_scale.fill_(1.7)
        if siglip:
            theirs.logit_bias.fill_(-2.3)
    return theirs


def config(variant: str) -> dict[str, Any]:
    """Returns the arguments of transformers' configuration. No two sizes of the towers are equal by chance."""
    text = encoder(mlp=48, depth=3, heads=2, vocabulary=VOCAB, positions=LENGTH) | {"eos_token_id": EOS}
    towers = {"text": text, "vision": vision()}
    whole: dict[str, Any] = {} if variant.startswith("siglip") else {"projection_dim": 24}
    for key, value in VARIANTS[variant].items():
        tower, _, name = key.partition("__")
        if name:
            towers[tower][name] = value
        elif key != "shard":
            whole[key] = value
    return whole | {f"{tower}_config": sizes for tower, sizes in towers.items()}


def hf_config(variant: str) -> Any:
    """Returns transformers' configuration of a variant."""
    make = transformers.SiglipConfig if variant.startswith("siglip") else transformers.CLIPConfig
    return make(**config(variant))


def inputs(theirs: Any, rows: int = 5, padding: str | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Returns tokens and attention mask ``[rows, L]``, and pixel values.

    Each text ends with the end-of-text token, an id among higher ones, twice, and goes on: only what is before the
    first one may count. With padding each row is shorter than the one before.
    """
    sizes = theirs.config.vision_config
    generator = torch.Generator().manual_seed(rows)
    pixels = torch.randn(rows, sizes.num_channels, sizes.image_size, sizes.image_size, generator=generator)
    ids = torch.randint(3, VOCAB, (rows, LENGTH), generator=generator)
    ids[ids == EOS] = EOS - 1
    mask = torch.ones_like(ids)
    for row in range(rows):
        ends = LENGTH - 4 - row
        ids[row, ends] = ids[row, ends + 2] = EOS
        if padding == "right":
            ids[row, ends + 1 :], mask[row, ends + 1 :] = 0, 0
        elif padding == "left":
            ids[row, :row], mask[row, :row] = 0, 0
    return ids, mask, pixels
