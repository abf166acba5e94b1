"""Small BLIP-2 models for retrieval of transformers with random weights, and inputs for them."""

from __future__ import annotations

from typing import Any

import torch
from blip2_checkpoints import QFORMER_VOCAB, QUERIES, SIDE, pixels
from torch import Tensor

from mmkernels.testing.models import build as build_model
from mmkernels.testing.models import randomise
from mmkernels.testing.parts import layers, opt, qformer, reads_images, vision

MARKER = 99  # of a visual token, outside of the vocabulary

VARIANTS: dict[str, dict[str, Any]] = {"blip2_itm": {}, "blip2_itm_marked": {"image_token_index": MARKER}}


def config(variant: str) -> dict[str, Any]:
    """Returns the arguments of transformers' configuration."""
    between = qformer(vocabulary=QFORMER_VOCAB, positions=16, use_qformer_text_input=True) | layers(width=48)
    more = {"qformer_config": between, "num_query_tokens": QUERIES, "image_text_hidden_size": 24}
    images, text = vision(image=SIDE, patch=8, depth=1, heads=2), opt(model_type="opt")
    whole = reads_images(images, text, marker="image_token_index", **more)
    return whole | {"image_token_index": None} | VARIANTS[variant]


def build(variant: str) -> Any:
    """Returns transformers' model of a variant, with every parameter redrawn."""
    return randomise(build_model("Blip2ForImageTextRetrieval", config(variant)).eval(), std=0.2)


def inputs(variant: str, pairs: int = 3) -> dict[str, Tensor]:
    """Returns images, and texts of which the last one is padded on the right."""
    ids = torch.randint(5, QFORMER_VOCAB, (pairs, 6), generator=torch.Generator().manual_seed(pairs))
    mask = torch.ones_like(ids)
    mask[-1, 4:] = 0
    ids = ids * mask
    if variant.endswith("marked"):
        ids = torch.cat([torch.full((pairs, QUERIES), MARKER), ids], dim=1)
        mask = torch.cat([torch.ones(pairs, QUERIES, dtype=torch.long), mask], dim=1)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels(pairs)}
