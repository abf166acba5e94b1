"""Small Idefics models of transformers with random weights, prompts for them, and what they generate."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mmkernels.testing.families import FAMILIES
from mmkernels.testing.models import build as build_model
from mmkernels.testing.models import randomise

IMAGE = 100  # the image marker's id
VARIANTS: dict[str, dict[str, Any]] = {
    "resampler": {},
    "patches": {"use_resampler": False},
    "norms": {"qk_layer_norms": True, "alpha_type": "vector", "perceiver__qk_layer_norms_perceiver": True},
    "decoupled": {"additional_vocab_size": 3, "hidden_act": "gelu_new", "cross_layer_interval": 1},
    "tied": {"additional_vocab_size": 3, "tie_word_embeddings": True, "shard": True},
}


def build(variant: str) -> Any:
    """Returns transformers' model of a variant, with every parameter redrawn: it initialises gates to 0."""
    theirs = randomise(build_model("IdeficsForVisionText2Text", config(variant)).eval(), std=0.15)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "alpha" in name:
                parameter.copy_(1.0 + 2 * parameter)
        if not theirs.config.tie_word_embeddings:
            theirs.lm_head.weight[IMAGE] *= 0.1  # a marker that is generated would count as an image in the next turn
    return theirs


def config(variant: str) -> dict[str, Any]:
    """Returns the arguments of transformers' configuration."""
    values = copy.deepcopy(FAMILIES["idefics"].config) | {"freeze_text_layers": False, "freeze_vision_layers": False}
    for key, value in VARIANTS[variant].items():
        if key.startswith("perceiver__"):
            values["perceiver_config"][key.removeprefix("perceiver__")] = value
        elif key != "shard":
            values[key] = value
    return values


def prompts(images: int, padding: str | None, rows: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Returns tokens and attention mask ``[rows, L]`` with a marker for each image, and pixel values.

    The first two tokens precede any image; with padding each row is shorter than the one before.
    """
    generator = torch.Generator().manual_seed(images)
    texts = []
    for row in range(rows):
        text = torch.randint(5, IMAGE, (3 * images + 4,), generator=generator)
        text[2 : 2 + 3 * images : 3] = IMAGE
        texts.append(text if padding is None else text[: len(text) - row])
    ids, mask = (
        pad_sequence(part, batch_first=True, padding_side=padding or "right")
        for part in (texts, [torch.ones_like(text) for text in texts])
    )
    return ids, mask, torch.randn(rows, images, 3, 32, 32, generator=generator)


def image_attention_mask(ids: Tensor, images: int) -> Tensor:
    """Returns what transformers' processor makes of the markers: each token sees the last image at or before it."""
    return ((ids == IMAGE).cumsum(1)[..., None] == torch.arange(1, images + 1)).long()


def rows_of(ids: Tensor, mask: Tensor) -> list[list[int]]:
    """Returns the tokens of each row without padding."""
    return [row[valid.bool()].tolist() for row, valid in zip(ids, mask)]


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
