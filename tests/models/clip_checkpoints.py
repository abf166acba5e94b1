"""Small CLIP and SigLIP models of transformers with random weights, and inputs for them."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

from mmkernels.testing.models import randomise

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

EOS = 90  # not the highest id of the texts here, so that finding the one isn't finding the other
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
    """transformers' model of a variant, with every parameter redrawn: it initialises biases to 0, norms to 1."""
    config = hf_config(variant)
    model = transformers.SiglipModel if config.model_type == "siglip" else transformers.CLIPModel
    theirs = randomise(model(config).eval(), 0.25)
    with torch.no_grad():
        theirs.logit_scale.fill_(1.7)
        if config.model_type == "siglip":
            theirs.logit_bias.fill_(-2.3)
    return theirs


def hf_config(variant: str) -> Any:
    siglip = variant.startswith("siglip")
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision |= {"image_size": 32, "patch_size": 8}
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    text |= {"vocab_size": VOCAB, "max_position_embeddings": LENGTH}
    text |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": EOS}
    whole: dict[str, Any] = {} if siglip else {"projection_dim": 24}
    for key, value in VARIANTS[variant].items():
        tower, _, name = key.partition("__")
        if name:
            {"text": text, "vision": vision}[tower][name] = value
        elif key != "shard":
            whole[key] = value
    config = transformers.SiglipConfig if siglip else transformers.CLIPConfig
    return config(text_config=text, vision_config=vision, **whole)


def inputs(theirs: Any, rows: int = 5, padding: str | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens and attention mask ``[rows, L]``, and pixel values.

    Each text ends with the end-of-text token, an id among higher ones, twice, and goes on: only what is before the
    first one may count. With padding each row is shorter than the one before.
    """
    vision = theirs.config.vision_config
    generator = torch.Generator().manual_seed(rows)
    pixels = torch.randn(rows, vision.num_channels, vision.image_size, vision.image_size, generator=generator)
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
