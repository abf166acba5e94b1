"""Families whose text attends to images, or reads a few latent vectors in place of each."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from mmkernels.testing.families_common import (
    IMAGE,
    Built,
    family,
    left_padded,
    opt_config,
    pixels,
    prompt,
    right_padded,
    text_config,
    tokens,
    vision_config,
)
from mmkernels.testing.families_towers import qformer_config


def _qformer_parts() -> dict[str, Any]:
    return {
        "vision_config": vision_config(),
        "qformer_config": qformer_config(),
        "text_config": opt_config(model_type="opt"),
        "num_query_tokens": 8,
        "image_token_index": IMAGE,
    }


@family()
def blip_2() -> Built:
    model = transformers.Blip2ForConditionalGeneration(transformers.Blip2Config(**_qformer_parts()))
    return model, prompt((8,)) | {"pixel_values": pixels(2)}


@family()
def instructblip() -> Built:
    model = transformers.InstructBlipForConditionalGeneration(transformers.InstructBlipConfig(**_qformer_parts()))
    question = {f"qformer_{name}": x for name, x in right_padded(tokens(2, 6), (6, 4)).items()}
    return model, prompt((8,)) | question | {"pixel_values": pixels(2)}


@family()
def idefics() -> Built:
    """Each text token attends to the image before it; those before the first image to none."""
    config = transformers.IdeficsConfig(
        **text_config(num_hidden_layers=4, num_key_value_heads=4),
        additional_vocab_size=0,
        cross_layer_interval=2,
        alpha_initializer="ones",
        use_resampler=True,
        vision_config={
            "embed_dim": 32,
            "image_size": 32,
            "patch_size": 8,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        },
        perceiver_config={
            "use_resampler": True,
            "resampler_n_latents": 8,
            "resampler_depth": 2,
            "resampler_n_heads": 4,
            "resampler_head_dim": 8,
        },
    )
    inputs = left_padded(tokens(2, 12), (12, 9))
    sees = torch.zeros(2, 12, 2, dtype=torch.long)
    sees[:, 4:8, 0] = 1
    sees[:, 8:, 1] = 1
    return transformers.IdeficsForVisionText2Text(config), inputs | {
        "pixel_values": pixels(2, 2),
        "image_attention_mask": sees,
    }


@family()
def idefics2() -> Built:
    config = transformers.Idefics2Config(
        image_token_id=IMAGE,
        vision_config=vision_config(),
        perceiver_config={
            "hidden_size": 64,
            "resampler_n_latents": 8,
            "resampler_depth": 2,
            "resampler_n_heads": 4,
            "resampler_head_dim": 8,
            "num_key_value_heads": 2,
        },
        text_config=text_config(model_type="mistral", sliding_window=None, head_dim=16),
    )
    seen = torch.ones(2, 2, 32, 32, dtype=torch.bool)
    seen[1, 1, :, 16:] = False  # an image half as wide as the others
    inputs = prompt((8, 8)) | {"pixel_values": pixels(2, 2), "pixel_attention_mask": seen}
    return transformers.Idefics2ForConditionalGeneration(config), inputs


@family()
def mllama() -> Built:
    """Two layers of four attend to the image, some of whose tiles are padding."""
    config = transformers.MllamaConfig(
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_global_layers": 1,
            "attention_heads": 4,
            "intermediate_size": 64,
            "image_size": 32,
            "patch_size": 8,
            "max_num_tiles": 2,
            "intermediate_layers_indices": [0, 1],
            "vision_output_dim": 96,
            "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
        },
        text_config=text_config(
            num_hidden_layers=4,
            cross_attention_layers=[1, 3],
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        ),
        image_token_index=IMAGE,
    )
    inputs = prompt((1, 1))
    sees = torch.zeros(2, inputs["input_ids"].shape[1], 2, 2, dtype=torch.long)  # [B, L, images, tiles]
    sees[:, 4:7, 0] = 1
    sees[:, 7:, 1] = 1
    tiles = torch.tensor([[[1, 0], [1, 1]], [[1, 1], [1, 0]]])  # [B, images, tiles]
    return transformers.MllamaForConditionalGeneration(config), inputs | {
        "pixel_values": pixels(2, 2, 2),
        "aspect_ratio_ids": torch.tensor([[1, 2], [3, 1]]),
        "aspect_ratio_mask": tiles,
        "cross_attention_mask": sees * tiles[:, None],
    }
