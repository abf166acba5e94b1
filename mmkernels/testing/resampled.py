"""Families whose text attends to images, or reads a few latent vectors in place of each."""

from __future__ import annotations

import torch

from mmkernels.testing.models import Config, Family, Inputs
from mmkernels.testing.parts import (
    decoder,
    images_of_two_widths,
    last_image,
    left_padded,
    opt,
    pixels,
    prompt,
    qformer,
    reads_images,
    resampler,
    right_padded,
    rope,
    tokens,
    vision,
)

_BLIP_2 = reads_images(
    vision(), opt(model_type="opt"), marker="image_token_index", qformer_config=qformer(), num_query_tokens=8
)
_MLLAMA_VISION: Config = {
    "attention_heads": 4,
    "num_global_layers": 1,
    "max_num_tiles": 2,
    "intermediate_layers_indices": [0, 1],
    "vision_output_dim": 96,
    "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
}


def _blip_2() -> Inputs:
    return prompt((8,)) | {"pixel_values": pixels(2)}


def _instructblip() -> Inputs:
    """The Q-Former reads a question too."""
    return _blip_2() | {f"qformer_{name}": x for name, x in right_padded(tokens(2, 6), (6, 4)).items()}


def _idefics() -> Inputs:
    attends = last_image(12, images=2).expand(2, -1, -1)
    return left_padded(tokens(2, 12), (12, 9)) | {"pixel_values": pixels(2, 2), "image_attention_mask": attends}


def _mllama() -> Inputs:
    """Some of an image's tiles are padding."""
    inputs = prompt((1, 1))
    tiles = torch.tensor([[[1, 0], [1, 1]], [[1, 1], [1, 0]]])  # [B, images, tiles]
    attends = last_image(inputs["input_ids"].shape[1], images=2)  # [L, images]
    return inputs | {
        "pixel_values": pixels(2, 2, 2),
        "aspect_ratio_ids": torch.tensor([[1, 2], [3, 1]]),
        "aspect_ratio_mask": tiles,
        "cross_attention_mask": attends[None, :, :, None] * tiles[:, None],  # [B, L, images, tiles]
    }


FAMILIES = (
    Family("blip_2", "Blip2ForConditionalGeneration", _BLIP_2, _blip_2),
    Family("instructblip", "InstructBlipForConditionalGeneration", _BLIP_2, _instructblip),
    Family(
        "idefics",
        "IdeficsForVisionText2Text",
        decoder(
            depth=4,
            kv_heads=None,
            additional_vocab_size=0,
            cross_layer_interval=2,
            alpha_initializer="ones",
            use_resampler=True,
            vision_config=vision(embed_dim=32),
            perceiver_config=resampler(use_resampler=True),
        ),
        _idefics,
    ),
    Family(
        "idefics2",
        "Idefics2ForConditionalGeneration",
        reads_images(
            vision(),
            decoder(model_type="mistral", sliding_window=None, head_dim=16),
            perceiver_config=resampler(hidden_size=64, num_key_value_heads=2),
        ),
        lambda: prompt((8, 8)) | images_of_two_widths(),
    ),
    Family(  # two of the four text layers attend to the images
        "mllama",
        "MllamaForConditionalGeneration",
        reads_images(
            vision(depth=3, **_MLLAMA_VISION),
            decoder(depth=4, cross_attention_layers=[1, 3], **rope()),
            marker="image_token_index",
        ),
        _mllama,
        seed=1,  # with seed 0, transformers' assisted generation drops keys of the images and fails, on any attention
    ),
)
