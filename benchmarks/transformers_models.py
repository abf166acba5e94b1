"""The models of bench_transformers.py: published widths, random weights, one or two layers, a small vocabulary.

Each width is that of the model on huggingface.co whose name stands beside it. What only repeats (layers), and what has
no attention in it (vocabularies, heads over them), is small, so that a forward pass takes seconds on two cores. The
masks are those of ordinary use: padding where batches are padded, causal in decoders, none in image encoders.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mmkernels.testing import parts
from mmkernels.testing.models import Config, Inputs, build
from mmkernels.testing.parts import IMAGE, last_image, left_padded, pixels, prompt, right_padded, rope, tokens, vision


def all_calls(module: nn.Module) -> bool:
    return True


@dataclass(frozen=True)
class Model:
    """A model, its inputs, and its targets.

    Args:
        id: in tables and JSON.
        build: makes the model with random weights, in float32.
        inputs: draws its keyword arguments from PyTorch's global generator, floats in float32.
        least: by dtype, how many times faster than sdpa the attention calls must be; empty: no target.
        counts: whether that target includes the attention calls of this module.
        called: what those calls are called in tables.
        outputs: what is compared; positions that ``attention_mask`` hides are left out where shapes allow.
        cached: tokens in the cache before the forward pass.
        most_overhead: seconds a call that attention may take more than sdpa, or None.
    """

    id: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    least: Mapping[str, float] = field(default_factory=dict)
    counts: Callable[[nn.Module], bool] = all_calls
    called: str = "all"
    outputs: Callable[[Any], tuple[Tensor, ...]] = lambda out: (out[0],)
    cached: int = 0
    most_overhead: float | None = None


def looks_at_images(module: nn.Module) -> bool:
    """Whether an attention layer of mllama or Idefics is one of those whose keys are the images'."""
    return bool(getattr(module, "is_cross_attention", "CrossAttention" in type(module).__name__))


def _towers(out: Any) -> tuple[Tensor, ...]:
    return out.image_embeds, out.text_embeds


def _make(model: str, **config: Any) -> Callable[[], nn.Module]:
    return functools.partial(build, model, config)


# Widths.

_VOCABULARY = 1000


def decoder(*, kv_heads: int | None = None, **sizes: Any) -> Config:
    return parts.decoder(kv_heads=kv_heads, vocabulary=_VOCABULARY, use_cache=False, **sizes)


def _encoder(*, positions: int, **sizes: Any) -> Config:
    return parts.encoder(vocabulary=_VOCABULARY, positions=positions, **sizes)


def _siglip_so400m(image: int, **more: Any) -> Config:
    """google/siglip-so400m-patch14-384 and its relatives of other image sizes"""
    return vision(width=1152, mlp=4304, heads=16, image=image, patch=14, **more)


_CLIP_L = {"width": 1024, "mlp": 4096, "heads": 16}  # openai/clip-vit-large-patch14
_LLAMA_1B = decoder(  # meta-llama/Llama-3.2-1B
    width=2048, mlp=8192, depth=1, heads=32, kv_heads=8, head_dim=64, max_position_embeddings=131072, **rope(500000.0)
)
_QWEN3 = decoder(width=2048, mlp=6144, depth=1, heads=16, kv_heads=8, head_dim=128)  # Qwen/Qwen3-1.7B
_TINY = decoder(width=64, mlp=128, depth=4, heads=4, kv_heads=2)


def _gemma3(layer_types: list[str]) -> Config:
    """google/gemma-3-4b-it; in it every sixth layer attends to everything, the others within a sliding window"""
    sizes = {"width": 2560, "mlp": 10240, "heads": 8, "kv_heads": 4, "head_dim": 256, "query_pre_attn_scalar": 256}
    return decoder(depth=len(layer_types), sliding_window=1024, layer_types=layer_types, **sizes)


_MLLAMA = {  # meta-llama/Llama-3.2-11B-Vision; in it every fifth layer attends to the images
    "text_config": decoder(width=4096, mlp=14336, heads=32, kv_heads=8, cross_attention_layers=[1], **rope(500000.0)),
    "vision_config": vision(
        width=1280,
        mlp=5120,
        depth=1,
        image=560,
        patch=14,
        heads=16,
        attention_heads=16,  # as this class names it
        num_global_layers=1,
        intermediate_layers_indices=[0],
        vision_output_dim=2560,
    ),
    "image_token_index": IMAGE,
}
_IDEFICS = decoder(  # HuggingFaceM4/idefics-9b; in it every fourth layer attends to the images, 64 latents of each
    width=4096,
    mlp=11008,
    depth=1,
    heads=32,
    additional_vocab_size=2,
    cross_layer_interval=1,
    qk_layer_norms=True,
    use_resampler=True,
    vision_config=vision(width=1280, embed_dim=1280, mlp=5120, depth=1, heads=16, image=224, patch=14),
    perceiver_config=parts.resampler(
        latents=64, depth=1, heads=16, head_dim=96, use_resampler=True, qk_layer_norms_perceiver=True
    ),
)
_QWEN2_VL = parts.qwen_vl(  # Qwen/Qwen2-VL-2B-Instruct
    decoder(width=1536, mlp=8960, depth=1, heads=12, kv_heads=2),
    {"depth": 1, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4, "patch_size": 14, "hidden_size": 1536},
    sections=(16, 24, 24),
    theta=1000000.0,
)
_QWEN2_5_VL = parts.qwen_vl(  # Qwen/Qwen2.5-VL-3B-Instruct; in it every eighth layer of the encoder has no windows
    decoder(width=2048, mlp=11008, depth=1, heads=16, kv_heads=2),
    {
        "depth": 2,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "patch_size": 14,
        "out_hidden_size": 2048,
        "window_size": 112,
        "fullatt_block_indexes": [1],
    },
    sections=(16, 24, 24),
    theta=1000000.0,
)
_BLIP_2 = {  # Salesforce/blip2-opt-2.7b
    "text_config": parts.opt(
        model_type="opt",
        width=2560,
        mlp=10240,
        depth=1,
        heads=32,
        vocabulary=_VOCABULARY,
        positions=2048,
        use_cache=False,
    ),
    "vision_config": vision(width=1408, mlp=6144, heads=16, image=224, patch=14),
    "qformer_config": {"num_hidden_layers": 2, "encoder_hidden_size": 1408, "vocab_size": 1},
    "num_query_tokens": 32,
    "image_token_index": IMAGE,
}
_WHISPER = parts.sequence_to_sequence(  # openai/whisper-large-v3
    width=1280,
    mlp=5120,
    depth=1,
    heads=20,
    vocabulary=_VOCABULARY,
    num_mel_bins=128,
    decoder_start_token_id=1,
    use_cache=False,
)


# Inputs.


def _ids(length: int) -> Inputs:
    return {"input_ids": tokens(1, length)}


def _image_prompt(*images: int, after: int, batch: int = 1) -> Inputs:
    return prompt(images, batch=batch, after=after, padding=0)


def _gemma3_inputs() -> Inputs:
    """What the processor makes of four images of 256 tokens, the images themselves left out: their tokens' embeddings
    stand in for their features, which the mask does not depend on."""
    ids = _image_prompt(256, 256, 256, 256, after=31)["input_ids"]
    return {"input_ids": ids, "token_type_ids": (ids == IMAGE).long()}


def _mllama_inputs() -> Inputs:
    """Four images of one tile each (560 pixels a side), already encoded: 40 x 40 patches and one class token."""
    attends = last_image(256, images=4).view(1, 256, 4, 1)
    return _ids(256) | {"cross_attention_states": torch.randn(4, 1601, 4096), "cross_attention_mask": attends}


def _idefics_inputs() -> Inputs:
    mask = torch.ones(1, 512, dtype=torch.long)
    images = {"pixel_values": pixels(1, 5, size=224), "image_attention_mask": last_image(512, images=5)[None]}
    return _ids(512) | {"attention_mask": mask} | images


def _clip_inputs() -> Inputs:
    return right_padded(tokens(8, 77), (77, 67, 57, 47, 37, 27, 17, 12)) | {"pixel_values": pixels(8, size=224)}


def _qwen_vl_inputs() -> Inputs:
    """Two images of 336 pixels a side: 24 x 24 patches, of which four make a token."""
    inputs = _image_prompt(144, 144, after=46)
    return inputs | {
        "pixel_values": torch.randn(2 * 24 * 24, 3 * 2 * 14 * 14),
        "image_grid_thw": torch.tensor([[1, 24, 24]] * 2),
        "mm_token_type_ids": (inputs["input_ids"] == IMAGE).long(),
    }


def _paligemma_inputs() -> Inputs:
    """The prompt is a prefix whose tokens all attend to each other, as the processor's token types say."""
    inputs = _image_prompt(256, after=60)
    types = torch.zeros_like(inputs["input_ids"])
    return inputs | {"pixel_values": pixels(1, size=224), "token_type_ids": types}


HEADLINES = (
    Model(
        "Llama-3.2-1B, 2048, 25 % left padding",
        _make("LlamaModel", **_LLAMA_1B),
        lambda: left_padded(tokens(1, 2048), [1536]),
        least={"fp32": 2.5, "bf16": 3.0},
    ),
    Model(
        "Gemma3-4B, 4 images of 256 tokens",
        _make(
            "Gemma3Model",
            text_config=_gemma3(["sliding_attention", "full_attention"]),
            vision_config=_siglip_so400m(896),
            image_token_index=IMAGE,
        ),
        _gemma3_inputs,
        least={"fp32": 2.5, "bf16": 3.0},
    ),
    Model(
        "Llama-3.2-11B-Vision, 4 images",
        _make("MllamaModel", **_MLLAMA),
        _mllama_inputs,
        least={"fp32": 3.0, "bf16": 4.0},
        counts=looks_at_images,
        called="to images",
    ),
    Model(
        "Idefics-9B, 5 images",
        _make("IdeficsModel", **_IDEFICS),
        _idefics_inputs,
        least={"fp32": 6.0, "bf16": 8.0},
        counts=looks_at_images,
        called="to images",
    ),
)
"""Models with targets for their attention."""

OVERHEAD = (
    Model(
        "tiny Llama, 1 token after 32",
        _make("LlamaModel", **_TINY),
        lambda: _ids(1) | {"use_cache": True},
        cached=32,
        most_overhead=20e-6,
    ),
    Model("tiny Llama, 16 tokens", _make("LlamaModel", **_TINY), lambda: _ids(16), most_overhead=20e-6),
)
"""Models so small that the overhead of a call is their time."""

OTHERS = (
    Model(
        "CLIP ViT-L/14, 8 images and texts",
        _make(
            "CLIPModel",
            text_config=_encoder(width=768, mlp=3072, heads=12, positions=77),
            vision_config=vision(image=224, patch=14, **_CLIP_L),
            projection_dim=768,
        ),
        _clip_inputs,
        outputs=_towers,
    ),
    Model(
        "SigLIP so400m, 2 images and texts",
        _make(
            "SiglipModel",
            text_config=_encoder(width=1152, mlp=4304, heads=16, positions=64),
            vision_config=_siglip_so400m(384),
        ),
        lambda: {"input_ids": tokens(2, 64), "pixel_values": pixels(2, size=384)},
        outputs=_towers,
    ),
    Model(  # google-bert/bert-base-uncased
        "BERT-base, 4 x 512, padded",
        functools.partial(
            build,
            "BertModel",
            _encoder(width=768, mlp=3072, heads=12, positions=512, use_cache=False),
            add_pooling_layer=False,
        ),
        lambda: right_padded(tokens(4, 512), (512, 412, 312, 212)),
    ),
    Model("Llama-3.2-1B, 1024 tokens", _make("LlamaModel", **_LLAMA_1B), lambda: _ids(1024)),
    Model("Qwen3-1.7B, 1024 tokens", _make("Qwen3Model", **_QWEN3), lambda: _ids(1024)),
    Model("Gemma3-4B, 1152 tokens", _make("Gemma3TextModel", **_gemma3(["sliding_attention"])), lambda: _ids(1152)),
    Model(
        "Whisper-large, 30 s, 64 tokens",
        _make("WhisperModel", **_WHISPER),
        lambda: {"input_features": torch.randn(1, 128, 3000), "decoder_input_ids": tokens(1, 64)},
    ),
    Model("Qwen2-VL-2B, 2 images", _make("Qwen2VLModel", **_QWEN2_VL), _qwen_vl_inputs),
    Model("Qwen2.5-VL-3B, 2 images", _make("Qwen2_5_VLModel", **_QWEN2_5_VL), _qwen_vl_inputs),
    Model(  # OpenGVLab/InternVL3-1B-hf
        "InternVL3-1B, 2 images",
        _make(
            "InternVLModel",
            text_config=decoder(width=896, mlp=4864, heads=14, kv_heads=2, model_type="qwen2"),
            vision_config=parts.layers(image_size=[448, 448], patch_size=[14, 14], **_CLIP_L),
            image_token_id=IMAGE,
        ),
        lambda: _image_prompt(256, 256, after=62) | {"pixel_values": pixels(2, size=448)},
    ),
    Model(  # llava-hf/llava-1.5-7b-hf
        "LLaVA-1.5-7B, 1 image",
        _make(
            "LlavaModel",
            text_config=decoder(width=4096, mlp=11008, depth=1, heads=32, model_type="llama"),
            vision_config=vision(image=336, patch=14, model_type="clip_vision_model", **_CLIP_L),
            image_token_index=IMAGE,
        ),
        lambda: _image_prompt(576, after=28) | {"pixel_values": pixels(1, size=336)},
    ),
    Model(
        "BLIP-2 OPT-2.7B, 2 images",
        _make("Blip2ForConditionalGeneration", **_BLIP_2),
        lambda: _image_prompt(32, after=28, batch=2) | {"pixel_values": pixels(2, size=224)},
    ),
    Model(  # HuggingFaceM4/Idefics3-8B-Llama3
        "Idefics3-8B, 2 images",
        _make(
            "Idefics3Model",
            text_config=decoder(width=4096, mlp=14336, depth=1, heads=32, kv_heads=8, model_type="llama"),
            vision_config=_siglip_so400m(364),
            scale_factor=2,
            image_token_id=IMAGE,
        ),
        lambda: _image_prompt(169, 169, after=21) | {"pixel_values": pixels(1, 2, size=364)},
    ),
    Model(  # HuggingFaceTB/SmolVLM-Instruct
        "SmolVLM-2B, 2 images",
        _make(
            "SmolVLMModel",
            text_config=decoder(width=2048, mlp=8192, depth=1, heads=32, model_type="llama"),
            vision_config=_siglip_so400m(384),
            scale_factor=3,
            image_token_id=IMAGE,
        ),
        lambda: _image_prompt(81, 81, after=45) | {"pixel_values": pixels(1, 2, size=384)},
    ),
    Model(  # google/paligemma-3b-pt-224
        "PaliGemma-3B, 1 image",
        _make(
            "PaliGemmaModel",
            text_config=decoder(width=2048, mlp=16384, depth=1, heads=8, kv_heads=1, head_dim=256, model_type="gemma"),
            vision_config=_siglip_so400m(224, vision_use_head=False, model_type="siglip_vision_model"),
            image_token_index=IMAGE,
            projection_dim=2048,
            hidden_size=2048,
        ),
        _paligemma_inputs,
    ),
)
"""Models that must not get slower."""

MODELS = (*HEADLINES, *OVERHEAD, *OTHERS)
