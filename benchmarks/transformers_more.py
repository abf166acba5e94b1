"""More models for bench_transformers.py, which are not to get slower; each width as published under the name beside it.

The masks are those of ordinary use: padding where batches are padded, causal in decoders, none in image encoders.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from torch import Generator, nn
from transformers_models import (
    IMAGE_TOKEN,
    Inputs,
    Model,
    gemma3_4b,
    llama_1b,
    padded,
    siglip_vision,
    text_config,
    tokens,
    with_images,
)


def _clip_vision(image: int, **more: Any) -> dict[str, Any]:
    """openai/clip-vit-large-patch14"""
    return {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 2,
        "num_attention_heads": 16,
        "image_size": image,
        "patch_size": 14,
        **more,
    }


def _clip() -> nn.Module:
    """openai/clip-vit-large-patch14"""
    text = text_config(
        hf.CLIPTextConfig,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=2,
        num_attention_heads=12,
        max_position_embeddings=77,
    )
    vision = hf.CLIPVisionConfig(**_clip_vision(224))
    return hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=768))


def _clip_inputs(g: Generator) -> Inputs:
    mask = padded(8, 77, [0, 10, 20, 30, 40, 50, 60, 65])
    return {
        "input_ids": tokens(g, 8, 77).masked_fill(mask == 0, 2),
        "attention_mask": mask,
        "pixel_values": torch.randn(8, 3, 224, 224, generator=g),
    }


def _siglip() -> nn.Module:
    """google/siglip-so400m-patch14-384"""
    text = text_config(
        hf.SiglipTextConfig,
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=2,
        num_attention_heads=16,
        max_position_embeddings=64,
    )
    vision = hf.SiglipVisionConfig(**siglip_vision(384))
    return hf.SiglipModel(hf.SiglipConfig(text_config=text, vision_config=vision))


def _siglip_inputs(g: Generator) -> Inputs:
    return {"input_ids": tokens(g, 2, 64), "pixel_values": torch.randn(2, 3, 384, 384, generator=g)}


def _towers(out: Any) -> tuple[torch.Tensor, ...]:
    return out.image_embeds, out.text_embeds


def _bert() -> nn.Module:
    """google-bert/bert-base-uncased"""
    return hf.BertModel(text_config(hf.BertConfig, num_hidden_layers=2), add_pooling_layer=False)


def _bert_inputs(g: Generator) -> Inputs:
    return {"input_ids": tokens(g, 4, 512), "attention_mask": padded(4, 512, [0, 100, 200, 300])}


def _qwen3() -> nn.Module:
    """Qwen/Qwen3-1.7B"""
    config = text_config(
        hf.Qwen3Config,
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=1,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
    )
    return hf.Qwen3Model(config)


def _whisper() -> nn.Module:
    """openai/whisper-large-v3"""
    config = text_config(
        hf.WhisperConfig,
        num_mel_bins=128,
        d_model=1280,
        encoder_layers=1,
        encoder_attention_heads=20,
        encoder_ffn_dim=5120,
        decoder_layers=1,
        decoder_attention_heads=20,
        decoder_ffn_dim=5120,
        decoder_start_token_id=1,
    )
    return hf.WhisperModel(config)


def _whisper_inputs(g: Generator) -> Inputs:
    return {"input_features": torch.randn(1, 128, 3000, generator=g), "decoder_input_ids": tokens(g, 1, 64)}


def _qwen2_vl() -> nn.Module:
    """Qwen/Qwen2-VL-2B-Instruct"""
    text = text_config(
        hf.models.qwen2_vl.configuration_qwen2_vl.Qwen2VLTextConfig,
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=1,
        num_attention_heads=12,
        num_key_value_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [16, 24, 24]},
    )
    vision = {"depth": 1, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4, "patch_size": 14, "hidden_size": 1536}
    return hf.Qwen2VLModel(hf.Qwen2VLConfig(text_config=text.to_dict(), vision_config=vision, **_QWEN_IDS))


def _qwen2_5_vl() -> nn.Module:
    """Qwen/Qwen2.5-VL-3B-Instruct: every eighth layer of its encoder is full, the others look within windows"""
    text = text_config(
        hf.models.qwen2_5_vl.configuration_qwen2_5_vl.Qwen2_5_VLTextConfig,
        hidden_size=2048,
        intermediate_size=11008,
        num_hidden_layers=1,
        num_attention_heads=16,
        num_key_value_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [16, 24, 24]},
    )
    vision = {
        "depth": 2,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "patch_size": 14,
        "out_hidden_size": 2048,
        "window_size": 112,
        "fullatt_block_indexes": [1],
    }
    return hf.Qwen2_5_VLModel(hf.Qwen2_5_VLConfig(text_config=text.to_dict(), vision_config=vision, **_QWEN_IDS))


_QWEN_IDS = {
    "image_token_id": IMAGE_TOKEN,
    "video_token_id": IMAGE_TOKEN - 1,
    "vision_start_token_id": IMAGE_TOKEN - 2,
    "vision_end_token_id": IMAGE_TOKEN - 3,
}


def _qwen_vl_inputs(g: Generator) -> Inputs:
    """Two images of 336 pixels a side: 24 x 24 patches, of which four make a token."""
    inputs = _image_prompt(g, 384, images=2, size=144)
    patches = torch.randn(2 * 24 * 24, 3 * 2 * 14 * 14, generator=g)
    kinds = (inputs["input_ids"] == IMAGE_TOKEN).long()
    return inputs | {
        "pixel_values": patches,
        "image_grid_thw": torch.tensor([[1, 24, 24]] * 2),
        "mm_token_type_ids": kinds,
    }


def _image_prompt(g: Generator, length: int, images: int, size: int) -> Inputs:
    ids = tokens(g, 1, length)
    ids = ids.masked_fill(with_images(ids, images, size), IMAGE_TOKEN)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _internvl() -> nn.Module:
    """OpenGVLab/InternVL3-1B-hf"""
    text = text_config(
        hf.Qwen2Config,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=2,
        num_attention_heads=14,
        num_key_value_heads=2,
    )
    vision = hf.InternVLVisionConfig(**_clip_vision(448, image_size=[448, 448], patch_size=[14, 14]))
    return hf.InternVLModel(hf.InternVLConfig(text_config=text, vision_config=vision, image_token_id=IMAGE_TOKEN))


def _internvl_inputs(g: Generator) -> Inputs:
    pixels = torch.randn(2, 3, 448, 448, generator=g)
    return _image_prompt(g, 640, images=2, size=256) | {"pixel_values": pixels}


def _llava() -> nn.Module:
    """llava-hf/llava-1.5-7b-hf"""
    text = text_config(
        hf.LlamaConfig, hidden_size=4096, intermediate_size=11008, num_hidden_layers=1, num_attention_heads=32
    )
    vision = hf.CLIPVisionConfig(**_clip_vision(336))
    return hf.LlavaModel(hf.LlavaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE_TOKEN))


def _llava_inputs(g: Generator) -> Inputs:
    return _image_prompt(g, 608, images=1, size=576) | {"pixel_values": torch.randn(1, 3, 336, 336, generator=g)}


def _blip2() -> nn.Module:
    """Salesforce/blip2-opt-2.7b"""
    text = text_config(
        hf.OPTConfig,
        hidden_size=2560,
        ffn_dim=10240,
        num_hidden_layers=1,
        num_attention_heads=32,
        word_embed_proj_dim=2560,
    )
    vision = hf.Blip2VisionConfig(
        hidden_size=1408,
        intermediate_size=6144,
        num_hidden_layers=2,
        num_attention_heads=16,
        image_size=224,
        patch_size=14,
    )
    former = hf.Blip2QFormerConfig(num_hidden_layers=2, encoder_hidden_size=1408, vocab_size=1)
    config = hf.Blip2Config(
        text_config=text,
        vision_config=vision,
        qformer_config=former,
        num_query_tokens=32,
        image_token_index=IMAGE_TOKEN,
    )
    return hf.Blip2ForConditionalGeneration(config)


def _blip2_inputs(g: Generator) -> Inputs:
    prompt = {name: x.expand(2, -1) for name, x in _image_prompt(g, 64, images=1, size=32).items()}
    return prompt | {"pixel_values": torch.randn(2, 3, 224, 224, generator=g)}


def _idefics3() -> nn.Module:
    """HuggingFaceM4/Idefics3-8B-Llama3"""
    text = text_config(
        hf.LlamaConfig,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=1,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    vision = hf.models.idefics3.configuration_idefics3.Idefics3VisionConfig(**siglip_vision(364))
    config = hf.Idefics3Config(text_config=text, vision_config=vision, scale_factor=2, image_token_id=IMAGE_TOKEN)
    return hf.Idefics3Model(config)


def _idefics3_inputs(g: Generator) -> Inputs:
    return _image_prompt(g, 384, images=2, size=169) | {"pixel_values": torch.randn(1, 2, 3, 364, 364, generator=g)}


def _smolvlm() -> nn.Module:
    """HuggingFaceTB/SmolVLM-Instruct"""
    text = text_config(
        hf.LlamaConfig, hidden_size=2048, intermediate_size=8192, num_hidden_layers=1, num_attention_heads=32
    )
    vision = hf.SmolVLMVisionConfig(**siglip_vision(384))
    config = hf.SmolVLMConfig(text_config=text, vision_config=vision, scale_factor=3, image_token_id=IMAGE_TOKEN)
    return hf.SmolVLMModel(config)


def _smolvlm_inputs(g: Generator) -> Inputs:
    return _image_prompt(g, 256, images=2, size=81) | {"pixel_values": torch.randn(1, 2, 3, 384, 384, generator=g)}


def _paligemma() -> nn.Module:
    """google/paligemma-3b-pt-224"""
    text = text_config(
        hf.GemmaConfig,
        hidden_size=2048,
        intermediate_size=16384,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=1,
        head_dim=256,
    )
    vision = hf.SiglipVisionConfig(**siglip_vision(224), vision_use_head=False)
    config = hf.PaliGemmaConfig(
        text_config=text, vision_config=vision, image_token_index=IMAGE_TOKEN, projection_dim=2048, hidden_size=2048
    )
    return hf.PaliGemmaModel(config)


def _paligemma_inputs(g: Generator) -> Inputs:
    """The prompt is a prefix, all of which sees all of it, as the processor's token types say."""
    prompt = _image_prompt(g, 320, images=1, size=256)
    pixels = torch.randn(1, 3, 224, 224, generator=g)
    return prompt | {"pixel_values": pixels, "token_type_ids": torch.zeros_like(prompt["input_ids"])}


OTHERS = (
    Model("CLIP ViT-L/14, 8 images and texts", _clip, _clip_inputs, outputs=_towers),
    Model("SigLIP so400m, 2 images and texts", _siglip, _siglip_inputs, outputs=_towers),
    Model("BERT-base, 4 x 512, padded", _bert, _bert_inputs),
    Model(
        "Llama-3.2-1B, 1024 tokens",
        lambda: hf.LlamaModel(llama_1b(layers=1)),
        lambda g: {"input_ids": tokens(g, 1, 1024)},
    ),
    Model("Qwen3-1.7B, 1024 tokens", _qwen3, lambda g: {"input_ids": tokens(g, 1, 1024)}),
    Model(
        "Gemma3-4B, 1152 tokens",
        lambda: hf.Gemma3TextModel(gemma3_4b(layers=1)),
        lambda g: {"input_ids": tokens(g, 1, 1152)},
    ),
    Model("Whisper-large, 30 s, 64 tokens", _whisper, _whisper_inputs),
    Model("Qwen2-VL-2B, 2 images", _qwen2_vl, _qwen_vl_inputs),
    Model("Qwen2.5-VL-3B, 2 images", _qwen2_5_vl, _qwen_vl_inputs),
    Model("InternVL3-1B, 2 images", _internvl, _internvl_inputs),
    Model("LLaVA-1.5-7B, 1 image", _llava, _llava_inputs),
    Model("BLIP-2 OPT-2.7B, 2 images", _blip2, _blip2_inputs),
    Model("Idefics3-8B, 2 images", _idefics3, _idefics3_inputs),
    Model("SmolVLM-2B, 2 images", _smolvlm, _smolvlm_inputs),
    Model("PaliGemma-3B, 1 image", _paligemma, _paligemma_inputs),
)
