"""Small BLIP models of transformers with random weights, and inputs for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmkernels.testing.models import build as build_model
from mmkernels.testing.models import randomise
from mmkernels.testing.parts import encoder, vision

BOS, SEP, VOCAB, LENGTH = 1, 3, 100, 16
RETRIEVAL = "BlipForImageTextRetrieval"

# Changes to the configuration below: `text__x` sets x of the text model, `vision__x` of the image encoder.
VARIANTS: dict[str, dict[str, Any]] = {
    "blip_caption": {"text__label_smoothing": 0.2},
    "blip_caption_shards": {
        "shard": True,
        "tie_word_embeddings": False,
        "text__tie_word_embeddings": False,
        "text__label_smoothing": 0.0,
        "text__hidden_act": "gelu_pytorch_tanh",
        "text__layer_norm_eps": 1e-3,
        "text__num_hidden_layers": 1,
        "vision__hidden_act": "quick_gelu",
        "vision__layer_norm_eps": 1e-3,
        "vision__num_hidden_layers": 3,
        "vision__image_size": 36,  # does not divide into patches
    },
    "blip_retrieval": {"model": RETRIEVAL},
    "blip_retrieval_shards": {
        "model": RETRIEVAL,
        "shard": True,
        "text__hidden_size": 32,
        "text__num_attention_heads": 4,
        "image_text_hidden_size": 16,
    },
}


def config(variant: str) -> dict[str, Any]:
    """Returns the arguments of transformers' configuration. No two sizes of its parts are equal by chance."""
    text = encoder(width=48, mlp=80, heads=3, vocabulary=VOCAB, positions=LENGTH) | {"sep_token_id": SEP}
    parts = {"text": text | {"is_decoder": True}, "vision": vision()}
    whole: dict[str, Any] = {"projection_dim": 20, "image_text_hidden_size": 24}
    for key, value in VARIANTS[variant].items():
        part, _, name = key.partition("__")
        if name:
            parts[part][name] = value
        elif key not in ("shard", "model"):
            whole[key] = value
    return whole | {f"{part}_config": sizes for part, sizes in parts.items()}


def build(variant: str) -> Any:
    """Returns transformers' model of a variant, with every parameter redrawn."""
    name = VARIANTS[variant].get("model", "BlipForConditionalGeneration")
    return randomise(build_model(name, config(variant)).eval(), std=0.2)


def inputs(theirs: Any, rows: int = 2) -> dict[str, Any]:
    """Returns images, and texts as a tokenizer writes them: each is shorter than the one before, SEP is its last token.

    Only the first text has no padding.
    """
    sizes, length = theirs.config.vision_config, 8
    generator = torch.Generator().manual_seed(rows)
    ids = torch.randint(5, VOCAB, (rows, length), generator=generator)
    lengths = torch.tensor([max(3, length - 2 * row) for row in range(rows)])
    place = torch.arange(length)
    ids = ids.masked_fill(place == lengths[:, None] - 1, SEP).masked_fill(place >= lengths[:, None], 0)
    return {
        "input_ids": ids,
        "attention_mask": (place < lengths[:, None]).long(),
        "pixel_values": torch.randn(rows, 3, sizes.image_size, sizes.image_size, generator=generator),
    }


def labels_of(given: dict[str, Tensor]) -> Tensor:
    """Returns labels of the whole texts."""
    return given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)
