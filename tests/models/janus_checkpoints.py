"""Small Janus models of transformers with random weights, and inputs for them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from mmkernels.testing.models import build as build_model
from mmkernels.testing.models import randomise
from mmkernels.testing.parts import decoder, layers, rope

MARKER, START, BOS, PAD, VOCAB, SIDE, CODES, TOKENS = 99, 98, 1, 0, 128, 32, 48, 16

# Changes to the configuration below: `text__x` sets x of the language model, `vision__x` of the image encoder, `vq__x`
# of the tokenizer of generated images.
VARIANTS: dict[str, dict[str, Any]] = {
    "janus": {},  # the embeddings are tied, which is transformers' default
    "janus_pro": {
        "shard": True,
        "tie_word_embeddings": False,
        "text__num_key_value_heads": 4,
        "text__rms_norm_eps": 1e-5,
        "vision__depth": 3,
        "vision__mlp_ratio": 2.5,
        "vision__layer_norm_eps": 1e-3,
        "vision__num_channels": 1,
        "vision__hidden_act": "gelu_pytorch_tanh",
        "vq__in_channels": 1,
        "vq__out_channels": 1,
        "vq__hidden_act": "relu",
        "vq__num_hidden_layers": 1,
        "vq__channel_multiplier": [2, 1, 3],
        "vq__num_res_blocks": 2,
    },
}


def config(variant: str) -> dict[str, Any]:
    """Returns the arguments of transformers' configuration."""
    vision = layers(image_size=SIDE, patch_size=8, depth=2, heads=2, mlp_ratio=2)
    vision |= {"projection_dim": 48, "num_image_tokens": TOKENS, "num_hidden_layers": 3}
    text = decoder(width=48, mlp=80, vocabulary=VOCAB, model_type="llama") | rope(5000.0)
    vq = {"num_embeddings": CODES, "embed_dim": 6, "latent_channels": 12, "base_channels": 32, "num_res_blocks": 1}
    vq |= {"channel_multiplier": [1, 2], "projection_dim": 48, "image_token_embed_dim": 48}
    parts = {"vision": vision, "text": text | {"max_position_embeddings": 512}, "vq": vq}
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
    theirs = randomise(build_model("JanusForConditionalGeneration", config(variant)).eval(), std=0.2)
    settings = theirs.generation_config
    settings.bos_token_id, settings.pad_token_id = BOS, PAD
    settings.generation_kwargs = {"boi_token_id": START}
    # Its `generate` leaves this argument out in transformers 5.17, and raises.
    theirs._prepare_static_cache = partial(theirs._prepare_static_cache, prefill_chunk_size=None)
    return theirs


def pixels(theirs: Any, images: int) -> Tensor:
    """Returns random images."""
    generator = torch.Generator().manual_seed(images)
    return torch.randn(images, theirs.config.vision_config.num_channels, SIDE, SIDE, generator=generator)


def prompt(rows: list[int]) -> tuple[Tensor, Tensor]:
    """Returns prompts and their attention mask ``[B, L]``, padded on the left.

    Args:
        rows: the number of images of each row, which stand between random text.
    """
    generator = torch.Generator().manual_seed(len(rows))
    found = []
    for images in rows:
        row = [BOS, *torch.randint(3, START, (3,), generator=generator).tolist()]
        for _ in range(images):
            row += [START, *[MARKER] * TOKENS, *torch.randint(3, START, (3,), generator=generator).tolist()]
        found.append(row)
    return padded(found)


def drawing_prompt(lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Returns prompts of so many words for an image to be generated, and their attention mask ``[B, L]``."""
    generator = torch.Generator().manual_seed(len(lengths))
    words = lambda count: torch.randint(3, START, (count,), generator=generator).tolist()
    return padded([[BOS, *words(length), START] for length in lengths])


def padded(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Returns rows of tokens as one tensor, padded on the left, and their attention mask."""
    length = max(map(len, rows))
    ids = torch.tensor([[PAD] * (length - len(row)) + row for row in rows])
    return ids, torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])


def inputs(theirs: Any) -> dict[str, Tensor]:
    """Returns two prompts: one with two images, one with one."""
    ids, mask = prompt([2, 1])
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels(theirs, 3)}


def labels_of(given: dict[str, Tensor]) -> Tensor:
    """Returns labels of the text, but for the first token, which padding would predict."""
    ids, mask = given["input_ids"], given["attention_mask"]
    return ids.masked_fill((mask.cumsum(1) < 2) | (ids == MARKER), -100)
