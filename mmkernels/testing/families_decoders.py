"""Families whose language model reads the tokens of images, video or sound among those of the text."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from mmkernels.testing.families_common import (
    IMAGE,
    IMAGE_END,
    IMAGE_START,
    VIDEO,
    Built,
    Inputs,
    family,
    layers_config,
    left_padded,
    pixels,
    prompt,
    text_config,
    tokens,
    vision_config,
)


@family()
def llava() -> Built:
    config = transformers.LlavaConfig(
        vision_config=vision_config(model_type="clip_vision_model"),
        text_config=text_config(model_type="llama"),
        image_token_index=IMAGE,
    )
    return transformers.LlavaForConditionalGeneration(config), prompt((16, 16)) | {"pixel_values": pixels(4)}


@family()
def llava_next() -> Built:
    """An image twice as wide as high: one small picture of it all, and two tiles."""
    config = transformers.LlavaNextConfig(
        vision_config=vision_config(model_type="clip_vision_model"),
        text_config=text_config(model_type="llama"),
        image_token_index=IMAGE,
        image_grid_pinpoints=[[32, 64], [64, 32]],
        image_seq_length=16,
    )
    images = {"pixel_values": pixels(2, 3), "image_sizes": torch.tensor([[32, 64], [32, 64]])}
    rows = 4 * (8 + 1)  # each row of patches ends in a token for the new line
    return transformers.LlavaNextForConditionalGeneration(config), prompt((16 + rows,)) | images


@family()
def llava_onevision() -> Built:
    """Three frames of a video."""
    config = transformers.LlavaOnevisionConfig(
        vision_config=vision_config(model_type="siglip_vision_model", vision_use_head=False),
        text_config=text_config(model_type="qwen2"),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=[[32, 32], [32, 64]],
    )
    frames = {"pixel_values_videos": pixels(2, 3)}
    return transformers.LlavaOnevisionForConditionalGeneration(config), prompt((3 * 4 + 1,), marker=VIDEO) | frames


@family()
def paligemma() -> Built:
    """The prompt, image and text, sees all of itself; what is generated sees what came before."""
    config = transformers.PaliGemmaConfig(
        vision_config=vision_config(model_type="siglip_vision_model", vision_use_head=False, projection_dim=64),
        text_config=text_config(model_type="gemma", head_dim=16),
        image_token_index=IMAGE,
        projection_dim=64,
        hidden_size=64,
    )
    inputs = prompt((16,))
    types = {"token_type_ids": torch.zeros_like(inputs["input_ids"])}
    return transformers.PaliGemmaForConditionalGeneration(config), inputs | types | {"pixel_values": pixels(2)}


@family()
def paligemma_training() -> Built:
    """A prefix that sees all of itself, and a causal answer."""
    model, inputs = paligemma.make()
    types = torch.zeros_like(inputs["input_ids"])
    types[:, -2:] = 1
    return model, inputs | {"token_type_ids": types}


@family()
def gemma3() -> Built:
    """The tokens of one image see each other both ways, also in a layer with a sliding window."""
    layers = {"sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"]}
    config = transformers.Gemma3Config(
        text_config=text_config(head_dim=16, query_pre_attn_scalar=16, **layers),
        vision_config=vision_config(model_type="siglip_vision_model", vision_use_head=False),
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=IMAGE_START,
        eoi_token_index=IMAGE_END,
    )
    inputs = prompt((4, 4))
    types = {"token_type_ids": (inputs["input_ids"] == IMAGE).long()}
    return transformers.Gemma3ForConditionalGeneration(config), inputs | types | {"pixel_values": pixels(4)}


def _pixel_shuffle_parts() -> dict[str, Any]:
    return {
        "image_token_id": IMAGE,
        "scale_factor": 2,
        "vision_config": vision_config(),
        "text_config": text_config(model_type="llama"),
    }


def _images_of_two_widths() -> Inputs:
    seen = torch.ones(2, 2, 32, 32, dtype=torch.bool)
    seen[1, 1, :, 16:] = False
    return {"pixel_values": pixels(2, 2), "pixel_attention_mask": seen}


@family()
def idefics3() -> Built:
    model = transformers.Idefics3ForConditionalGeneration(transformers.Idefics3Config(**_pixel_shuffle_parts()))
    return model, prompt((4, 4)) | _images_of_two_widths()


@family()
def smolvlm() -> Built:
    model = transformers.SmolVLMForConditionalGeneration(transformers.SmolVLMConfig(**_pixel_shuffle_parts()))
    return model, prompt((4, 4)) | _images_of_two_widths()


@family()
def internvl() -> Built:
    config = transformers.InternVLConfig(
        vision_config=layers_config(image_size=[32, 32], patch_size=[8, 8], use_qk_norm=True),
        text_config=text_config(model_type="qwen2"),
        image_token_id=IMAGE,
        image_seq_length=4,
        downsample_ratio=0.5,
    )
    return transformers.InternVLForConditionalGeneration(config), prompt((4, 4)) | {"pixel_values": pixels(4)}


@family()
def deepseek_vl() -> Built:
    config = transformers.DeepseekVLConfig(
        vision_config=vision_config(), text_config=text_config(model_type="llama"), image_token_id=IMAGE
    )
    return transformers.DeepseekVLForConditionalGeneration(config), prompt((16,)) | {"pixel_values": pixels(2)}


def _sam_config(**more: Any) -> dict[str, Any]:
    """Of SAM's image encoder, with one layer of windows and one of everything."""
    return layers_config(
        output_channels=16, image_size=64, patch_size=8, window_size=4, global_attn_indexes=[1], mlp_dim=64, **more
    )


@family()
def deepseek_vl_hybrid() -> Built:
    config = transformers.DeepseekVLHybridConfig(
        vision_config=vision_config(),
        high_res_vision_config=_sam_config(model_type="sam_vision_model"),
        text_config=text_config(model_type="llama"),
        image_token_id=IMAGE,
    )
    images = {"pixel_values": pixels(2), "high_res_pixel_values": pixels(2, size=64)}
    return transformers.DeepseekVLHybridForConditionalGeneration(config), prompt((16,)) | images


@family()
def got_ocr2() -> Built:
    config = transformers.GotOcr2Config(
        vision_config=_sam_config(),
        text_config=text_config(model_type="qwen2"),
        image_token_index=IMAGE,
        image_seq_length=4,
    )
    model = transformers.GotOcr2ForConditionalGeneration(config)
    return model, prompt((4, 4)) | {"pixel_values": pixels(4, size=64)}


@family()
def janus() -> Built:
    config = transformers.JanusConfig(
        text_config=text_config(model_type="llama"),
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 32,
            "patch_size": 8,
            "mlp_ratio": 2,
            "projection_dim": 64,
            "num_image_tokens": 16,
        },
        vq_config={
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
        },
        image_token_id=IMAGE,
    )
    return transformers.JanusForConditionalGeneration(config), prompt((16,)) | {"pixel_values": pixels(2)}


def _qwen_config(sections: list[int], vision: dict[str, Any], **text: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections}
    common = {"depth": 2, "num_heads": 4, "patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2}
    return {
        "text_config": text_config(rope_parameters=rope | text.pop("rope", {}), **text),
        "vision_config": common | vision,
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": IMAGE_START,
        "vision_end_token_id": IMAGE_END,
    }


def _qwen_inputs() -> Inputs:
    """Two rows of two images each, all of different shapes; the second row has less text, so that it is padded."""
    grid = torch.tensor([[1, 4, 6], [1, 4, 4], [1, 2, 4], [1, 8, 4]])
    counts = (grid.prod(1) // 4).tolist()  # each 2 x 2 patches are merged
    rows = [_qwen_row(5, *counts[:2]), _qwen_row(2, *counts[2:])]
    length = max(map(len, rows))
    ids = torch.stack([torch.cat([tokens(1, length - len(row))[0], row]) for row in rows])
    inputs = left_padded(ids, (len(rows[0]), len(rows[1])))
    return inputs | {
        "pixel_values": torch.randn(int(grid.prod(1).sum()), 3 * 2 * 8 * 8),
        "image_grid_thw": grid,
        "mm_token_type_ids": (inputs["input_ids"] == IMAGE).int(),
    }


def _qwen_row(text: int, *images: int) -> torch.Tensor:
    """Text, then images of so many tokens with text after each."""
    parts = [tokens(1, text)[0]]
    for count in images:
        parts += [torch.tensor([IMAGE_START] + [IMAGE] * count + [IMAGE_END]), tokens(1, 2)[0]]
    return torch.cat(parts)


@family()
def qwen2_vl() -> Built:
    vision = {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}
    model = transformers.Qwen2VLForConditionalGeneration(transformers.Qwen2VLConfig(**_qwen_config([2, 3, 3], vision)))
    return model, _qwen_inputs()


@family()
def qwen2_5_vl() -> Built:
    """The first vision layer attends within windows, the second within images."""
    vision = {"hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 64}
    windows = {"window_size": 32, "fullatt_block_indexes": [1]}
    config = transformers.Qwen2_5_VLConfig(**_qwen_config([2, 3, 3], vision | windows))
    return transformers.Qwen2_5_VLForConditionalGeneration(config), _qwen_inputs()


@family()
def qwen3_vl() -> Built:
    vision = {
        "depth": 3,
        "hidden_size": 32,
        "out_hidden_size": 64,
        "intermediate_size": 64,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1],
    }
    text = {"rope": {"mrope_interleaved": True}, "head_dim": 16, "num_hidden_layers": 3}
    config = transformers.Qwen3VLConfig(**_qwen_config([4, 2, 2], vision, **text))
    return transformers.Qwen3VLForConditionalGeneration(config), _qwen_inputs()


@family(padded=(), only_forward=("decoder_input_ids",))
def whisper() -> Built:
    config = transformers.WhisperConfig(
        vocab_size=100,
        num_mel_bins=16,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_source_positions=20,
        max_target_positions=30,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
        begin_suppress_tokens=None,
    )
    start = torch.full((2, 1), 3)
    inputs = {"input_features": torch.randn(2, 16, 40), "decoder_input_ids": torch.cat([start, tokens(2, 5)], 1)}
    return transformers.WhisperForConditionalGeneration(config), inputs


@family()
def qwen2_audio() -> Built:
    """Two recordings, of which the second ends before the first."""
    config = transformers.Qwen2AudioConfig(
        audio_config={
            "num_mel_bins": 16,
            "d_model": 32,
            "encoder_layers": 2,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 64,
            "max_source_positions": 20,
        },
        text_config=text_config(model_type="qwen2"),
        audio_token_index=IMAGE,
    )
    inputs = prompt((10,), padding=4)
    inputs["input_ids"][1, :-6] = 0
    inputs["attention_mask"][1, :-6] = 0
    lengths = torch.tensor([40, 16])
    inputs["input_ids"][1, -6:-2] = IMAGE
    heard = {"feature_attention_mask": (torch.arange(40) < lengths[:, None]).long()}
    return transformers.Qwen2AudioForConditionalGeneration(config), inputs | heard | {
        "input_features": torch.randn(2, 16, 40)
    }
