"""Families that embed or match images and text, without writing any: two towers, or one over both."""

from __future__ import annotations

import torch

from mmkernels.testing.models import Config, Family, Inputs
from mmkernels.testing.parts import encoder, layers, opt, pixels, qformer, right_padded, tokens, vision


def _texts() -> Inputs:
    return right_padded(tokens(3, 9), (9, 5, 7))


def _texts_and_images() -> Inputs:
    return _texts() | {"pixel_values": pixels(3)}


def _pairs() -> Inputs:
    return right_padded(tokens(2, 9), (9, 6)) | {"pixel_values": pixels(2)}


def _images_of_three_shapes() -> Inputs:
    """The third image has fewer patches than the others, so that some are padding."""
    shapes = torch.tensor([[4, 4], [2, 8], [3, 4]])
    return {
        "pixel_values": torch.randn(3, 16, 3 * 8 * 8),
        "pixel_attention_mask": (torch.arange(16) < shapes.prod(1, keepdim=True)).int(),
        "spatial_shapes": shapes,
    }


def _regions(name: str, **more: torch.Tensor) -> Inputs:
    """Text beside the features of ten regions of an image, whose argument has this name."""
    features = {name: torch.randn(2, 10, 24), "visual_attention_mask": torch.ones(2, 10)}
    return right_padded(tokens(2, 9), (9, 6)) | features | more


_SIGLIP_TEXT = encoder(projection_size=32)
_LXMERT = {"visual_feat_dim": 24, "visual_pos_dim": 4, "l_layers": 2, "x_layers": 2, "r_layers": 2}
_LXMERT_LABELS = {"num_qa_labels": 7, "num_object_labels": 5, "num_attr_labels": 5}
_PERCEIVER = {
    "num_latents": 8,
    "d_latents": 32,
    "d_model": 24,
    "num_blocks": 1,
    "num_self_attends_per_block": 2,
    "num_self_attention_heads": 4,
    "num_cross_attention_heads": 4,
}
_BLIP = {
    "text_config": encoder(encoder_hidden_size=32, is_decoder=True, sep_token_id=3),
    "vision_config": vision(),
    "projection_dim": 16,
    "image_text_hidden_size": 16,
}
_BLIP_2: Config = {
    "vision_config": vision(),
    "qformer_config": qformer(use_qformer_text_input=True),
    "text_config": opt(model_type="opt"),
    "num_query_tokens": 8,
    "image_text_hidden_size": 16,
}

FAMILIES = (
    Family(
        "clip",
        "CLIPModel",
        {"text_config": encoder(), "vision_config": vision(), "projection_dim": 16},
        _texts_and_images,
    ),
    Family("siglip", "SiglipModel", {"text_config": _SIGLIP_TEXT, "vision_config": vision()}, _texts_and_images),
    Family(
        "siglip2",
        "Siglip2Model",
        {"text_config": _SIGLIP_TEXT, "vision_config": layers(patch_size=8, num_patches=16)},
        lambda: _texts() | _images_of_three_shapes(),
    ),
    Family(
        "flava",
        "FlavaModel",
        {
            "text_config": layers(vocab_size=100, max_position_embeddings=40),
            "image_config": vision(),
            "multimodal_config": layers(),
            "hidden_size": 32,
            "projection_dim": 16,
        },
        _pairs,
    ),
    Family("vilt", "ViltModel", vision(max_image_length=-1, max_position_embeddings=40, vocab_size=100), _pairs),
    Family(
        "visual_bert",
        "VisualBertModel",
        encoder(visual_embedding_dim=24),
        lambda: _regions("visual_embeds", visual_token_type_ids=torch.ones(2, 10, dtype=torch.long)),
    ),
    Family(
        "lxmert",
        "LxmertModel",
        encoder(**_LXMERT, **_LXMERT_LABELS),
        lambda: _regions("visual_feats", visual_pos=torch.rand(2, 10, 4)),
    ),
    Family("perceiver", "PerceiverModel", _PERCEIVER, lambda: {"inputs": torch.randn(2, 50, 24)}),
    # Whether a text fits an image: read by one transformer over both (itm), or from one embedding of each (itc).
    Family("blip_itm", "BlipForImageTextRetrieval", _BLIP, lambda: _pairs() | {"use_itm_head": True}),
    Family("blip_itc", "BlipForImageTextRetrieval", _BLIP, lambda: _pairs() | {"use_itm_head": False}),
    Family("blip_caption", "BlipForConditionalGeneration", _BLIP, _pairs),
    Family(
        "blip_2_itm",
        "Blip2ForImageTextRetrieval",
        _BLIP_2,
        lambda: _texts_and_images() | {"use_image_text_matching_head": True},
    ),
    Family(
        "blip_2_itc",
        "Blip2ForImageTextRetrieval",
        _BLIP_2,
        lambda: _texts_and_images() | {"use_image_text_matching_head": False},
    ),
)
