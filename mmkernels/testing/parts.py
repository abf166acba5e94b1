"""The parts of models and inputs that families share: sizes under transformers' names, text, images, padding.

The defaults are the sizes of the small families; benchmarks pass published ones. Inputs are drawn from PyTorch's global
generator (`mmkernels.testing.models.seeded`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmkernels.testing.models import Config, Inputs

IMAGE, VIDEO, IMAGE_START, IMAGE_END = 99, 98, 97, 96
"""Ids of the tokens that stand for images."""

TEXT_IDS = range(5, 60)
"""Ids of text; those below mean padding, the beginning and the end."""

SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def layers(*, width: int = 32, mlp: int = 64, depth: int = 2, heads: int = 4, **more: Any) -> Config:
    """Transformer layers, under the names that most configurations have for their sizes."""
    sizes = {"hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": depth, "num_attention_heads": heads}
    return sizes | more


def decoder(*, width: int = 64, mlp: int = 128, kv_heads: int | None = 2, vocabulary: int = 128, **more: Any) -> Config:
    """A language model with grouped queries, such as Llama; `kv_heads` None: one key head for each query head."""
    grouped = {} if kv_heads is None else {"num_key_value_heads": kv_heads}
    return layers(width=width, mlp=mlp, vocab_size=vocabulary, **grouped, **SPECIAL, **more)


def sliding_and_full(window: int) -> Config:
    """Two layers, of which the first attends within a sliding window."""
    return {"sliding_window": window, "layer_types": ["sliding_attention", "full_attention"]}


def rope(theta: float = 10000.0, **more: Any) -> Config:
    """Rotary position embeddings."""
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta} | more}


def encoder(*, vocabulary: int = 100, positions: int = 64, **more: Any) -> Config:
    """A text encoder, by itself or in a two-tower model."""
    return layers(vocab_size=vocabulary, max_position_embeddings=positions, **SPECIAL, **more)


def vision(*, image: int = 32, patch: int = 8, **more: Any) -> Config:
    """A vision transformer: ``(image / patch)**2`` patches."""
    return layers(image_size=image, patch_size=patch, **more)


def opt(
    *,
    width: int = 64,
    mlp: int = 128,
    depth: int = 2,
    heads: int = 4,
    vocabulary: int = 128,
    positions: int = 128,
    **more: Any,
) -> Config:
    """OPT, the language model of BLIP-2."""
    sizes = {"hidden_size": width, "ffn_dim": mlp, "num_hidden_layers": depth, "num_attention_heads": heads}
    tokens = {"vocab_size": vocabulary, "max_position_embeddings": positions, "word_embed_proj_dim": width}
    return sizes | tokens | SPECIAL | more


def qformer(**more: Any) -> Config:
    """The transformer between BLIP-2's image encoder and its language model."""
    return encoder(encoder_hidden_size=32, cross_attention_frequency=2, **more)


def sequence_to_sequence(
    *, width: int = 32, mlp: int = 64, depth: int = 2, heads: int = 4, vocabulary: int = 100, **more: Any
) -> Config:
    """An encoder and a decoder that attends to it, such as BART and Whisper."""
    parts = {
        f"{part}_{name}": size
        for part in ("encoder", "decoder")
        for name, size in (("layers", depth), ("attention_heads", heads), ("ffn_dim", mlp))
    }
    return {"d_model": width, "vocab_size": vocabulary} | parts | SPECIAL | more


def resampler(*, latents: int = 8, depth: int = 2, heads: int = 4, head_dim: int = 8, **more: Any) -> Config:
    """The Perceiver resampler of Idefics."""
    sizes = {"n_latents": latents, "depth": depth, "n_heads": heads, "head_dim": head_dim}
    return {f"resampler_{name}": size for name, size in sizes.items()} | more


def sam(**more: Any) -> Config:
    """SAM's image encoder: the first layer attends within windows, the second to the whole image."""
    return vision(image=64, output_channels=16, window_size=4, global_attn_indexes=[1], mlp_dim=64, **more)


def reads_images(encoder: Config, text: Config, *, marker: str = "image_token_id", **more: Any) -> Config:
    """An image encoder and a language model that reads its tokens.

    Args:
        marker: the name that the configuration has for the id of an image's tokens.
    """
    return {"vision_config": encoder, "text_config": text, marker: IMAGE} | more


def qwen_vl(text: Config, vision: Config, sections: Sequence[int], **rotary: Any) -> Config:
    """Qwen's models of images and text; `sections`: how many frequencies count time, rows and columns."""
    patches = {"spatial_merge_size": 2, "temporal_patch_size": 2}
    theta = rotary.pop("theta", 10000.0)
    return {
        "text_config": text | rope(theta, mrope_section=list(sections), **rotary),
        "vision_config": patches | vision,
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": IMAGE_START,
        "vision_end_token_id": IMAGE_END,
    }


# Inputs.


def tokens(batch: int, length: int) -> Tensor:
    """Text. int64 [batch, length]"""
    return torch.randint(TEXT_IDS.start, TEXT_IDS.stop, (batch, length))


def pixels(*shape: int, size: int = 32) -> Tensor:
    """Images. [*shape, 3, size, size]"""
    return torch.randn(*shape, 3, size, size)


def images_of_two_widths() -> Inputs:
    """Two images in each of two rows; the last image is half as wide as the others."""
    visible = torch.ones(2, 2, 32, 32, dtype=torch.bool)
    visible[1, 1, :, 16:] = False
    return {"pixel_values": pixels(2, 2), "pixel_attention_mask": visible}


def left_padded(ids: Tensor, lengths: Sequence[int]) -> Inputs:
    """`ids` [B, L] with padding before the last ``lengths[b]`` tokens of row b, and the mask of it."""
    return _padded(ids, torch.arange(ids.shape[1]) >= ids.shape[1] - torch.tensor(lengths)[:, None])


def right_padded(ids: Tensor, lengths: Sequence[int]) -> Inputs:
    """`ids` [B, L] with padding after the first ``lengths[b]`` tokens of row b, and the mask of it."""
    return _padded(ids, torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None])


def _padded(ids: Tensor, visible: Tensor) -> Inputs:
    return {"input_ids": ids.where(visible, SPECIAL["pad_token_id"]), "attention_mask": visible.long()}


def prompt(
    images: Sequence[int], *, batch: int = 2, before: int = 4, after: int = 2, padding: int = 3, marker: int = IMAGE
) -> Inputs:
    """Text around images, and its mask.

    Args:
        images: how many tokens stand for each image of a row.
        before: text tokens before the first image. after: text tokens after each image.
        padding: how many of the tokens before the first image are padding, in all rows but the first.
        marker: the id of an image's tokens.
    """
    parts = [tokens(batch, before)]
    for count in images:
        parts += [torch.full((batch, count), marker), tokens(batch, after)]
    ids = torch.cat(parts, 1)
    return left_padded(ids, [ids.shape[1] - (padding if row else 0) for row in range(batch)])


def last_image(length: int, images: int, before: int = 4) -> Tensor:
    """Which image each text token attends to: the last one before it, as in Flamingo.

    The first `before` tokens attend to none; each image is followed by equally many tokens, the last one also by what
    is left over.

    Returns:
        0 or 1, int64 [length, images].
    """
    place = torch.arange(length) - before
    number = (place // ((length - before) // images)).clamp(max=images - 1)
    return ((number[:, None] == torch.arange(images)) & (place >= 0)[:, None]).long()
