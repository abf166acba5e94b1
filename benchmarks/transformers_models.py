"""The models of bench_transformers.py: published widths, random weights, one or two layers, vocabularies of 1000.

Each width is that of the model on huggingface.co whose name stands beside it. What only repeats (layers), and what
attention has no part in (vocabularies, heads over them), is cut, so that a forward pass takes seconds on two cores. The
four models with targets for their attention are here; transformers_more.py has those that only must not get slower.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as hf
from torch import Generator, Tensor, nn

VOCABULARY = 1000
IMAGE_TOKEN = VOCABULARY - 1

Inputs = dict[str, Any]


def all_calls(module: nn.Module) -> bool:
    return True


@dataclass(frozen=True)
class Model:
    """A model, its inputs, and what is asked of it.

    Args:
        id: in tables and JSON.
        build: the model with random weights, in float32.
        inputs: its keyword arguments, floats in float32.
        least: by dtype, how many times faster than sdpa the attention calls are to be; empty: no target.
        counts: whether that target speaks of the attention calls of this module.
        called: what those calls are called in tables.
        outputs: what is compared; positions that ``attention_mask`` hides are left out where shapes allow.
        cached: tokens in the cache before the forward pass.
        most_overhead: seconds a call that attention may take more than sdpa, or None.
    """

    id: str
    build: Callable[[], nn.Module]
    inputs: Callable[[Generator], Inputs]
    least: Mapping[str, float] = field(default_factory=dict)
    counts: Callable[[nn.Module], bool] = all_calls
    called: str = "all"
    outputs: Callable[[Any], tuple[Tensor, ...]] = lambda out: (out[0],)
    cached: int = 0
    most_overhead: float | None = None


def tokens(g: Generator, batch: int, length: int) -> Tensor:
    """Ids of text, none of them an image's."""
    return torch.randint(10, VOCABULARY // 2, (batch, length), generator=g)


def padded(batch: int, length: int, hidden: list[int], left: bool = False) -> Tensor:
    """An ``attention_mask`` that hides so many tokens of each sequence. [batch, length]"""
    mask = torch.ones(batch, length, dtype=torch.long)
    for row, count in zip(mask, hidden, strict=True):
        row[slice(0, count) if left else slice(length - count, length)] = 0
    return mask


def with_images(ids: Tensor, images: int, size: int, first: int = 4) -> Tensor:
    """Whether a token is an image's: `images` blocks of `size` tokens, text before, between and after. [B, L] bool"""
    batch, length = ids.shape
    block = (length - first) // images
    if block <= size:
        raise ValueError(f"ids must hold {images} images of {size} tokens and text between them, got length {length}")
    place = torch.arange(length) - first
    return ((place >= 0) & (place // block < images) & (place % block < size)).expand(batch, length)


def last_image(length: int, images: int, first: int = 4) -> Tensor:
    """Which image each text token sees: the last before it, as the processors of mllama and Idefics have it.

    The first tokens see none. [length, images] of 0 and 1
    """
    place = torch.arange(length) - first
    number = (place // ((length - first) // images)).clamp(max=images - 1)
    seen = (number[:, None] == torch.arange(images)) & (place >= 0)[:, None]
    return seen.long()


def _text(**widths: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "use_cache": False,
        **widths,
    }


def text_config(kind: type, **widths: Any) -> Any:
    """A decoder's configuration with the small vocabulary."""
    return kind(**_text(**widths))


def llama_1b(layers: int) -> Any:
    """meta-llama/Llama-3.2-1B"""
    return text_config(
        hf.LlamaConfig,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        max_position_embeddings=131072,
    )


def gemma3_4b(layers: int) -> Any:
    """google/gemma-3-4b-it, whose every sixth layer is full; the others slide"""
    return text_config(
        hf.Gemma3TextConfig,
        hidden_size=2560,
        intermediate_size=10240,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=256,
        sliding_window=1024,
        query_pre_attn_scalar=256,
        layer_types=["sliding_attention", "full_attention"][:layers],
    )


def siglip_vision(image: int, patch: int = 14) -> dict[str, Any]:
    """google/siglip-so400m-patch14-384 and its relatives of other image sizes"""
    return {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 2,
        "num_attention_heads": 16,
        "image_size": image,
        "patch_size": patch,
    }


def _gemma3() -> nn.Module:
    vision = hf.SiglipVisionConfig(**siglip_vision(896))
    config = hf.Gemma3Config(text_config=gemma3_4b(layers=2), vision_config=vision, image_token_index=IMAGE_TOKEN)
    return hf.Gemma3Model(config)


def _gemma3_inputs(g: Generator) -> Inputs:
    """What the processor makes of four images of 256 tokens, the images themselves left out: their tokens' embeddings
    stand in for their features, which the mask does not look at."""
    ids = tokens(g, 1, 1152)
    image = with_images(ids, images=4, size=256)
    return {"input_ids": ids.masked_fill(image, IMAGE_TOKEN), "token_type_ids": image.long()}


def _mllama() -> nn.Module:
    """meta-llama/Llama-3.2-11B-Vision, whose every fifth layer looks at the images"""
    text = text_config(
        hf.models.mllama.configuration_mllama.MllamaTextConfig,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=2,
        num_attention_heads=32,
        num_key_value_heads=8,
        cross_attention_layers=[1],
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )
    vision = hf.models.mllama.configuration_mllama.MllamaVisionConfig(
        hidden_size=1280,
        intermediate_size=5120,
        num_hidden_layers=1,
        num_global_layers=1,
        attention_heads=16,
        image_size=560,
        patch_size=14,
        intermediate_layers_indices=[0],
        vision_output_dim=2560,
    )
    return hf.MllamaModel(hf.MllamaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE_TOKEN))


def _mllama_inputs(g: Generator) -> Inputs:
    """Four images of one tile each (560 pixels a side), already encoded: 40 x 40 patches and one class token."""
    length, images, size = 256, 4, 1601
    return {
        "input_ids": tokens(g, 1, length),
        "cross_attention_states": torch.randn(images, size, 4096, generator=g),
        "cross_attention_mask": last_image(length, images).view(1, length, images, 1),
    }


def _idefics() -> nn.Module:
    """HuggingFaceM4/idefics-9b, whose every fourth layer looks at the images, of 64 resampled tokens each"""
    config = text_config(
        hf.IdeficsConfig,
        additional_vocab_size=2,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=1,
        num_attention_heads=32,
        cross_layer_interval=1,
        qk_layer_norms=True,
        use_resampler=True,
        vision_config={
            "embed_dim": 1280,
            "intermediate_size": 5120,
            "num_hidden_layers": 1,
            "num_attention_heads": 16,
            "image_size": 224,
            "patch_size": 14,
        },
        perceiver_config={
            "use_resampler": True,
            "resampler_n_latents": 64,
            "resampler_depth": 1,
            "resampler_n_heads": 16,
            "resampler_head_dim": 96,
            "qk_layer_norms_perceiver": True,
        },
    )
    return hf.IdeficsModel(config)


def _idefics_inputs(g: Generator) -> Inputs:
    length, images = 512, 5
    return {
        "input_ids": tokens(g, 1, length),
        "attention_mask": torch.ones(1, length, dtype=torch.long),
        "pixel_values": torch.randn(1, images, 3, 224, 224, generator=g),
        "image_attention_mask": last_image(length, images)[None],
    }


def looks_at_images(module: nn.Module) -> bool:
    """Whether an attention layer of mllama or Idefics is one of those whose keys are the images'."""
    return bool(getattr(module, "is_cross_attention", "CrossAttention" in type(module).__name__))


HEADLINES = (
    Model(
        "Llama-3.2-1B, 2048, 25 % left padding",
        lambda: hf.LlamaModel(llama_1b(layers=1)),
        lambda g: {"input_ids": tokens(g, 1, 2048), "attention_mask": padded(1, 2048, [512], left=True)},
        least={"fp32": 2.5, "bf16": 3.0},
    ),
    Model("Gemma3-4B, 4 images of 256 tokens", _gemma3, _gemma3_inputs, least={"fp32": 2.5, "bf16": 3.0}),
    Model(
        "Llama-3.2-11B-Vision, 4 images",
        _mllama,
        _mllama_inputs,
        least={"fp32": 3.0, "bf16": 4.0},
        counts=looks_at_images,
        called="to images",
    ),
    Model(
        "Idefics-9B, 5 images",
        _idefics,
        _idefics_inputs,
        least={"fp32": 6.0, "bf16": 8.0},
        counts=looks_at_images,
        called="to images",
    ),
)


def _tiny() -> nn.Module:
    config = text_config(
        hf.LlamaConfig,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return hf.LlamaModel(config)


OVERHEAD = (
    Model(
        "tiny Llama, 1 token after 32",
        _tiny,
        lambda g: {"input_ids": tokens(g, 1, 1), "use_cache": True},
        cached=32,
        most_overhead=20e-6,
    ),
    Model("tiny Llama, 16 tokens", _tiny, lambda g: {"input_ids": tokens(g, 1, 16)}, most_overhead=20e-6),
)
