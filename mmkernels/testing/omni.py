"""Families that read images and sound, each packed into one row: Qwen-Omni's thinkers, which write the text."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.testing.decoders import EAGER_EXPERTS, MIXTURE, QWEN2_5_VISION, qwen_prompt, qwen_row
from mmkernels.testing.models import Config, Family, Inputs
from mmkernels.testing.parts import IMAGE, IMAGE_END, IMAGE_START, VIDEO, decoder, rope, tokens

AUDIO, AUDIO_START, AUDIO_END = 95, 94, 93
"""Ids of the tokens that stand for sound."""


def _prompt(*sound: int) -> Inputs:
    """Two rows, each with an image of 16 patches and a recording of so many tokens; the second row is padded."""
    grid = torch.tensor([[1, 4, 4], [1, 2, 8]])
    rows = [_row(5, 4, sound[0]), _row(2, 4, sound[1])]
    lengths = torch.tensor([[40], [24]])
    recordings = {
        "input_features": torch.randn(2, 16, 40),
        "feature_attention_mask": (torch.arange(40) < lengths).long(),
    }
    inputs = qwen_prompt(rows, grid) | recordings
    del inputs["mm_token_type_ids"]
    return inputs


def _row(text: int, image: int, sound: int) -> Tensor:
    return torch.cat(
        [
            qwen_row(text, image),
            torch.tensor([AUDIO_START] + [AUDIO] * sound + [AUDIO_END]),
            tokens(1, 2)[0],
        ]
    )


def _thinker(text: Config, vision: Config, suffix: str, **audio: int) -> Config:
    """`suffix`: of the configuration's names for the ids of tokens."""
    sizes = {"num_mel_bins": 16, "d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 4}
    return {
        "text_config": text,
        "vision_config": {"spatial_merge_size": 2, "temporal_patch_size": 2} | vision,
        "audio_config": sizes | {"encoder_ffn_dim": 64, "output_dim": 64} | audio,
        f"image_token_{suffix}": IMAGE,
        f"video_token_{suffix}": VIDEO,
        f"audio_token_{suffix}": AUDIO,
        "vision_start_token_id": IMAGE_START,
        "vision_end_token_id": IMAGE_END,
        "audio_start_token_id": AUDIO_START,
        "audio_end_token_id": AUDIO_END,
    }


FAMILIES = (
    Family(  # windows of images and chunks of sound
        "qwen2_5_omni_thinker",
        "Qwen2_5OmniThinkerForConditionalGeneration",
        _thinker(
            decoder(**rope(mrope_section=[2, 3, 3])),
            QWEN2_5_VISION | {"window_size": 32, "fullatt_block_indexes": [1]},
            "index",
            n_window=8,
        ),
        lambda: _prompt(10, 6),
    ),
    Family(
        "qwen3_omni_moe_thinker",
        "Qwen3OmniMoeThinkerForConditionalGeneration",
        _thinker(
            decoder(head_dim=16, **MIXTURE, **rope(mrope_section=[4, 2, 2], mrope_interleaved=True)),
            QWEN2_5_VISION | {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]},
            "id",
            n_window=50,
            n_window_infer=100,
            downsample_hidden_size=8,
        )
        | EAGER_EXPERTS,
        lambda: _prompt(5, 3),
    ),
)
