"""Small Idefics models of transformers with random weights, prompts for them, and what they generate."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

from mmkernels.testing.models import randomise

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

IMAGE = 100  # the image marker's id
PAD = 0
VARIANTS: dict[str, dict[str, Any]] = {
    "resampler": {},
    "patches": {"use_resampler": False},
    "norms": {"qk_layer_norms": True, "alpha_type": "vector", "perceiver": {"qk_layer_norms_perceiver": True}},
    "decoupled": {"additional_vocab_size": 3, "hidden_act": "gelu_new", "cross_layer_interval": 1},
    "tied": {"additional_vocab_size": 3, "tie_word_embeddings": True, "shard": True},
}


def build(variant: str) -> Any:
    """transformers' model of a variant, with every parameter redrawn: it initialises gates to 0."""
    values = {key: value for key, value in VARIANTS[variant].items() if key != "shard"}
    theirs = randomise(transformers.IdeficsForVisionText2Text(idefics_config(**values)).eval(), 0.15)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "alpha" in name:
                parameter.copy_(1.0 + 2 * parameter)
        if not theirs.config.tie_word_embeddings:
            theirs.lm_head.weight[IMAGE] *= 0.1  # a marker that is generated would count as an image in the next turn
    return theirs


def idefics_config(perceiver: dict[str, Any] | None = None, **config: Any) -> transformers.IdeficsConfig:
    values: dict[str, Any] = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "cross_layer_interval": 2,
        "use_resampler": True,
        "freeze_text_layers": False,
        "freeze_vision_layers": False,
        "vision_config": {
            "embed_dim": 32,
            "image_size": 32,
            "patch_size": 8,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        },
        "perceiver_config": {
            "use_resampler": True,
            "resampler_n_latents": 8,
            "resampler_depth": 2,
            "resampler_n_heads": 4,
            "resampler_head_dim": 8,
            **(perceiver or {}),
        },
    }
    return transformers.IdeficsConfig(**(values | config))


def prompts(images: int, padding: str | None, rows: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens and attention mask ``[rows, L]`` with a marker for each image, and pixel values.

    The first two tokens precede any image; with padding each row is shorter than the one before.
    """
    generator = torch.Generator().manual_seed(images)
    texts = []
    for row in range(rows):
        text = torch.randint(5, IMAGE, (3 * images + 4,), generator=generator)
        text[2 : 2 + 3 * images : 3] = IMAGE
        texts.append(text if padding is None else text[: len(text) - row])
    length = max(len(text) for text in texts)
    ids = torch.full((rows, length), PAD)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        place = slice(length - len(text), None) if padding == "left" else slice(0, len(text))
        ids[row, place], mask[row, place] = text, 1
    return ids, mask, torch.randn(rows, images, 3, 32, 32, generator=generator)


def image_attention_mask(ids: Tensor, images: int) -> Tensor:
    """What transformers' processor makes of the markers: each token sees the last image at or before it."""
    mask = torch.zeros(*ids.shape, images, dtype=torch.long)
    for row, text in enumerate(ids.tolist()):
        seen = -1
        for i, token in enumerate(text):
            seen += token == IMAGE
            if seen >= 0:
                mask[row, i, seen] = 1
    return mask


def greedy(theirs: Any, ids: list[int], pixels: Tensor, count: int, sees: Tensor | None = None) -> list[int]:
    """Returns the next tokens of one row, by the forward pass of transformers: no cache, no padding, no earlier steps.

    (Its `generate` reads the logits of the last column, which is padding if a prompt is padded on the right, and it
    cannot continue a conversation with new images.)
    """
    new: list[int] = []
    if sees is None:
        sees = image_attention_mask(torch.tensor([ids]), len(pixels))
    for _ in range(count):
        text = torch.tensor([ids + new])
        mask = torch.cat([sees, sees[:, -1:].expand(-1, len(new), -1)], dim=1)  # a generated marker has no image
        with torch.no_grad():
            logits = theirs(input_ids=text, pixel_values=pixels[None], image_attention_mask=mask).logits
        new.append(int(logits[0, -1].argmax()))
    return new
