"""Families that embed or match images and text, without writing any: two towers, or one over both."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from mmkernels.testing.families_common import (
    Built,
    Inputs,
    family,
    layers_config,
    opt_config,
    pixels,
    right_padded,
    short_text_config,
    tokens,
    vision_config,
)


def _texts() -> Inputs:
    return right_padded(tokens(3, 9), (9, 5, 7))


@family()
def clip() -> Built:
    config = transformers.CLIPConfig(text_config=short_text_config(), vision_config=vision_config(), projection_dim=16)
    inputs = _texts()
    last = inputs["attention_mask"].sum(1, keepdim=True) - 1
    inputs["input_ids"] = inputs["input_ids"].scatter(1, last, 2)  # the end of text, whose state is the embedding
    return transformers.CLIPModel(config), inputs | {"pixel_values": pixels(3)}


@family()
def siglip() -> Built:
    config = transformers.SiglipConfig(text_config=short_text_config(projection_size=32), vision_config=vision_config())
    return transformers.SiglipModel(config), _texts() | {"pixel_values": pixels(3)}


@family()
def siglip2() -> Built:
    """Images of several shapes, of which one has patches of padding."""
    config = transformers.Siglip2Config(
        text_config=short_text_config(projection_size=32),
        vision_config=layers_config(patch_size=8, num_patches=16),
    )
    shapes = torch.tensor([[4, 4], [2, 8], [3, 4]])
    images = {
        "pixel_values": torch.randn(3, 16, 3 * 8 * 8),
        "pixel_attention_mask": (torch.arange(16) < shapes.prod(1, keepdim=True)).int(),
        "spatial_shapes": shapes,
    }
    return transformers.Siglip2Model(config), _texts() | images


@family()
def flava() -> Built:
    config = transformers.FlavaConfig(
        text_config=layers_config(vocab_size=100, max_position_embeddings=40),
        image_config=vision_config(),
        multimodal_config=layers_config(),
        hidden_size=32,
        projection_dim=16,
    )
    return transformers.FlavaModel(config), right_padded(tokens(2, 9), (9, 6)) | {"pixel_values": pixels(2)}


@family()
def vilt() -> Built:
    sizes: dict[str, Any] = {"max_image_length": -1, "max_position_embeddings": 40, "vocab_size": 100}
    config = transformers.ViltConfig(**vision_config(**sizes))
    return transformers.ViltModel(config), right_padded(tokens(2, 9), (9, 6)) | {"pixel_values": pixels(2)}


@family()
def visual_bert() -> Built:
    config = transformers.VisualBertConfig(**short_text_config(visual_embedding_dim=24))
    visual = {
        "visual_embeds": torch.randn(2, 10, 24),
        "visual_attention_mask": torch.ones(2, 10),
        "visual_token_type_ids": torch.ones(2, 10, dtype=torch.long),
    }
    return transformers.VisualBertModel(config), right_padded(tokens(2, 9), (9, 6)) | visual


@family()
def lxmert() -> Built:
    layers = {"l_layers": 2, "x_layers": 2, "r_layers": 2}
    labels = {"num_qa_labels": 7, "num_object_labels": 5, "num_attr_labels": 5}
    config = transformers.LxmertConfig(**short_text_config(visual_feat_dim=24, visual_pos_dim=4, **layers, **labels))
    visual = {
        "visual_feats": torch.randn(2, 10, 24),
        "visual_pos": torch.rand(2, 10, 4),
        "visual_attention_mask": torch.ones(2, 10),
    }
    return transformers.LxmertModel(config), right_padded(tokens(2, 9), (9, 6)) | visual


@family()
def perceiver() -> Built:
    config = transformers.PerceiverConfig(
        num_latents=8,
        d_latents=32,
        d_model=24,
        num_blocks=1,
        num_self_attends_per_block=2,
        num_self_attention_heads=4,
        num_cross_attention_heads=4,
    )
    return transformers.PerceiverModel(config), {"inputs": torch.randn(2, 50, 24)}


def _blip_config() -> transformers.BlipConfig:
    return transformers.BlipConfig(
        text_config=short_text_config(encoder_hidden_size=32, is_decoder=True, sep_token_id=3),
        vision_config=vision_config(),
        projection_dim=16,
        image_text_hidden_size=16,
    )


@family()
def blip_itm() -> Built:
    """Whether a text fits an image, read by one transformer over both."""
    inputs = right_padded(tokens(2, 9), (9, 6)) | {"pixel_values": pixels(2), "use_itm_head": True}
    return transformers.BlipForImageTextRetrieval(_blip_config()), inputs


@family()
def blip_itc() -> Built:
    """Whether a text fits an image, from one embedding of each."""
    inputs = right_padded(tokens(2, 9), (9, 6)) | {"pixel_values": pixels(2), "use_itm_head": False}
    return transformers.BlipForImageTextRetrieval(_blip_config()), inputs


@family()
def blip_caption() -> Built:
    inputs = right_padded(tokens(2, 9), (9, 6)) | {"pixel_values": pixels(2)}
    return transformers.BlipForConditionalGeneration(_blip_config()), inputs


def qformer_config(**more: Any) -> dict[str, Any]:
    """Of the transformer between BLIP-2's image encoder and its language model."""
    return short_text_config(encoder_hidden_size=32, cross_attention_frequency=2, **more)


def _blip_2_retrieval(with_head: bool) -> Built:
    config = transformers.Blip2Config(
        vision_config=vision_config(),
        qformer_config=qformer_config(use_qformer_text_input=True),
        text_config=opt_config(model_type="opt"),
        num_query_tokens=8,
        image_text_hidden_size=16,
    )
    images = {"pixel_values": pixels(3), "use_image_text_matching_head": with_head}
    return transformers.Blip2ForImageTextRetrieval(config), _texts() | images


@family()
def blip_2_itm() -> Built:
    return _blip_2_retrieval(with_head=True)


@family()
def blip_2_itc() -> Built:
    return _blip_2_retrieval(with_head=False)
