"""Families whose language model reads the tokens of images, video or sound among those of the text."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmkernels.testing.models import Family, Inputs
from mmkernels.testing.parts import (
    IMAGE,
    IMAGE_END,
    IMAGE_START,
    VIDEO,
    decoder,
    images_of_two_widths,
    layers,
    left_padded,
    pixels,
    prompt,
    qwen_vl,
    reads_images,
    sam,
    sequence_to_sequence,
    sliding_and_full,
    tokens,
    vision,
)


def _images(tokens_per_image: int, images: int = 1, size: int = 32) -> Inputs:
    """Two rows of text with images of this size in pixels."""
    return prompt((tokens_per_image,) * images) | {"pixel_values": pixels(2 * images, size=size)}


def _images_of_two_widths() -> Inputs:
    return prompt((4, 4)) | images_of_two_widths()


def _llava_next() -> Inputs:
    """An image twice as wide as high: a small picture of the whole, and two tiles."""
    rows_of_patches = 4 * (8 + 1)  # a token for the new line ends each row
    sizes = torch.tensor([[32, 64], [32, 64]])
    return prompt((16 + rows_of_patches,)) | {"pixel_values": pixels(2, 3), "image_sizes": sizes}


def _llava_onevision() -> Inputs:
    """Three frames of a video."""
    return prompt((3 * 4 + 1,), marker=VIDEO) | {"pixel_values_videos": pixels(2, 3)}


def _paligemma(suffix: int) -> Inputs:
    """Attention is bidirectional within image and prompt, and causal in the last `suffix` tokens."""
    inputs = _images(16)
    types = torch.zeros_like(inputs["input_ids"])
    types[:, types.shape[1] - suffix :] = 1
    return inputs | {"token_type_ids": types}


def _gemma3() -> Inputs:
    """The tokens of one image attend to each other in both directions, also in a layer with a sliding window."""
    inputs = _images(4, images=2)
    return inputs | {"token_type_ids": (inputs["input_ids"] == IMAGE).long()}


def _qwen_vl() -> Inputs:
    """Two rows of two images each, all of different shapes; the second row has less text, so that it is padded."""
    grid = torch.tensor([[1, 4, 6], [1, 4, 4], [1, 2, 4], [1, 8, 4]])
    counts = (grid.prod(1) // 4).tolist()  # four patches are merged into one token
    return qwen_prompt([qwen_row(5, *counts[:2]), qwen_row(2, *counts[2:])], grid)


def qwen_prompt(rows: Sequence[Tensor], grid: Tensor) -> Inputs:
    """Rows [tokens] as a batch, padded by text on the left, and the patches of their images.

    Args:
        grid: frames, rows and columns of patches of each image, int64 [images, 3].
    """
    length = max(row.shape[0] for row in rows)
    ids = torch.stack([torch.cat([tokens(1, length - row.shape[0])[0], row]) for row in rows])
    return left_padded(ids, [row.shape[0] for row in rows]) | {
        "pixel_values": torch.randn(int(grid.prod(1).sum()), 3 * 2 * 8 * 8),
        "image_grid_thw": grid,
        "mm_token_type_ids": (ids == IMAGE).int(),
    }


def qwen_row(text: int, *images: int) -> Tensor:
    """Text, then images of so many tokens with text after each. int64 [tokens]"""
    parts = [tokens(1, text)[0]]
    for count in images:
        parts += [torch.tensor([IMAGE_START] + [IMAGE] * count + [IMAGE_END]), tokens(1, 2)[0]]
    return torch.cat(parts)


def _whisper() -> Inputs:
    start = torch.full((2, 1), 3)
    return {"input_features": torch.randn(2, 16, 40), "decoder_input_ids": torch.cat([start, tokens(2, 5)], 1)}


def _qwen2_audio() -> Inputs:
    """Two recordings, of which the second ends before the first."""
    inputs = prompt((10,), before=5, padding=4)
    inputs["input_ids"][1, :-6] = 0
    inputs["attention_mask"][1, :-6] = 0
    inputs["input_ids"][1, -6:-2] = IMAGE  # four tokens of sound
    lengths = torch.tensor([[40], [16]])
    sound = {"input_features": torch.randn(2, 16, 40), "feature_attention_mask": (torch.arange(40) < lengths).long()}
    return inputs | sound


_CLIP = vision(model_type="clip_vision_model")
_SIGLIP = vision(model_type="siglip_vision_model", vision_use_head=False)
_LLAMA = decoder(model_type="llama")
_QWEN2 = decoder(model_type="qwen2")
_GEMMA3 = decoder(head_dim=16, query_pre_attn_scalar=16, **sliding_and_full(9))

_LLAVA = reads_images(_CLIP, _LLAMA, marker="image_token_index")
_PALIGEMMA = reads_images(
    _SIGLIP | {"projection_dim": 64},
    decoder(model_type="gemma", head_dim=16),
    marker="image_token_index",
    projection_dim=64,
    hidden_size=64,
)
_PIXEL_SHUFFLE = reads_images(vision(), _LLAMA, scale_factor=2)
_DEEPSEEK_VL = reads_images(vision(), _LLAMA)
_JANUS_CODEBOOK = {
    "embed_dim": 8,
    "num_embeddings": 32,
    "projection_dim": 64,
    "image_token_embed_dim": 64,
    "base_channels": 32,
    "channel_multiplier": [1, 1],
    "num_res_blocks": 1,
    "num_patches": 4,
    "latent_channels": 8,
    "double_latent": False,
}
QWEN_VISION = {"depth": 2, "num_heads": 4, "patch_size": 8}
QWEN2_5_VISION = QWEN_VISION | {"hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 64}
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
EAGER_EXPERTS = {"experts_implementation": "eager"}  # the others have no float64
_QWEN2_AUDIO = {
    "num_mel_bins": 16,
    "d_model": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "max_source_positions": 20,
}

FAMILIES = (
    Family("llava", "LlavaForConditionalGeneration", _LLAVA, lambda: _images(16, images=2)),
    Family(
        "llava_next",
        "LlavaNextForConditionalGeneration",
        _LLAVA | {"image_grid_pinpoints": [[32, 64], [64, 32]], "image_seq_length": 16},
        _llava_next,
    ),
    Family(
        "llava_onevision",
        "LlavaOnevisionForConditionalGeneration",
        reads_images(
            _SIGLIP,
            _QWEN2,
            marker="image_token_index",
            video_token_index=VIDEO,
            image_grid_pinpoints=[[32, 32], [32, 64]],
        ),
        _llava_onevision,
    ),
    Family("paligemma", "PaliGemmaForConditionalGeneration", _PALIGEMMA, lambda: _paligemma(suffix=0)),
    Family("paligemma_training", "PaliGemmaForConditionalGeneration", _PALIGEMMA, lambda: _paligemma(suffix=2)),
    Family(
        "gemma3",
        "Gemma3ForConditionalGeneration",
        reads_images(
            _SIGLIP,
            _GEMMA3,
            marker="image_token_index",
            mm_tokens_per_image=4,
            boi_token_index=IMAGE_START,
            eoi_token_index=IMAGE_END,
        ),
        _gemma3,
    ),
    Family("idefics3", "Idefics3ForConditionalGeneration", _PIXEL_SHUFFLE, _images_of_two_widths),
    Family("smolvlm", "SmolVLMForConditionalGeneration", _PIXEL_SHUFFLE, _images_of_two_widths),
    Family(
        "internvl",
        "InternVLForConditionalGeneration",
        reads_images(
            layers(image_size=[32, 32], patch_size=[8, 8], use_qk_norm=True),
            _QWEN2,
            image_seq_length=4,
            downsample_ratio=0.5,
        ),
        lambda: _images(4, images=2),
    ),
    Family("deepseek_vl", "DeepseekVLForConditionalGeneration", _DEEPSEEK_VL, lambda: _images(16)),
    Family(
        "deepseek_vl_hybrid",
        "DeepseekVLHybridForConditionalGeneration",
        _DEEPSEEK_VL | {"high_res_vision_config": sam(model_type="sam_vision_model")},
        lambda: _images(16) | {"high_res_pixel_values": pixels(2, size=64)},
    ),
    Family(
        "got_ocr2",
        "GotOcr2ForConditionalGeneration",
        reads_images(sam(), _QWEN2, marker="image_token_index", image_seq_length=4),
        lambda: _images(4, images=2, size=64),
    ),
    Family(
        "janus",
        "JanusForConditionalGeneration",
        reads_images(
            vision(mlp_ratio=2, projection_dim=64, num_image_tokens=16),
            _LLAMA,
            vq_config=_JANUS_CODEBOOK,
        ),
        lambda: _images(16),
    ),
    Family(
        "qwen2_vl",
        "Qwen2VLForConditionalGeneration",
        qwen_vl(decoder(), QWEN_VISION | {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}, (2, 3, 3)),
        _qwen_vl,
    ),
    Family(  # the first vision layer attends within windows, the second within images
        "qwen2_5_vl",
        "Qwen2_5_VLForConditionalGeneration",
        qwen_vl(decoder(), QWEN2_5_VISION | {"window_size": 32, "fullatt_block_indexes": [1]}, (2, 3, 3)),
        _qwen_vl,
    ),
    Family(
        "qwen3_vl",
        "Qwen3VLForConditionalGeneration",
        qwen_vl(
            decoder(depth=3, head_dim=16),
            QWEN2_5_VISION | {"depth": 3, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]},
            (4, 2, 2),
            mrope_interleaved=True,
        ),
        _qwen_vl,
    ),
    Family(
        "qwen3_vl_moe",
        "Qwen3VLMoeForConditionalGeneration",
        qwen_vl(
            decoder(depth=3, head_dim=16, **MIXTURE),
            QWEN2_5_VISION | {"depth": 3, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]},
            (4, 2, 2),
            mrope_interleaved=True,
        )
        | EAGER_EXPERTS,
        _qwen_vl,
    ),
    Family(
        "glm4v",
        "Glm4vForConditionalGeneration",
        qwen_vl(decoder(), QWEN2_5_VISION | {"image_size": 32}, (2, 3, 3))
        | {"image_start_token_id": IMAGE_START, "image_end_token_id": IMAGE_END},
        _qwen_vl,
    ),
    Family(
        "whisper",
        "WhisperForConditionalGeneration",
        sequence_to_sequence(
            num_mel_bins=16,
            max_source_positions=20,
            max_target_positions=30,
            decoder_start_token_id=3,
            begin_suppress_tokens=None,
        ),
        _whisper,
        padded=(),
        only_forward=("decoder_input_ids",),
    ),
    Family(
        "qwen2_audio",
        "Qwen2AudioForConditionalGeneration",
        {"audio_config": _QWEN2_AUDIO, "text_config": _QWEN2, "audio_token_index": IMAGE},
        _qwen2_audio,
    ),
)
