"""GroundingDINO and MM-GroundingDINO: `mmkernels.co_attention` in their fusion layers."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from mmkernels.integrations.patching.changes import Change, Known, Left, by_class
from mmkernels.integrations.patching.classes import methods_of, original_class, original_method
from mmkernels.ops.attention.co_attention import co_attention

CLAMP = 50_000.0
"""How far below the largest score the layer lets a score be, for 16 bits' sake; no checkpoint comes near it."""

Weights = Tensor | None
Output = tuple[tuple[Tensor, Weights], tuple[Tensor, Weights]]

_asked = threading.local()


def attend(
    layer: Any,
    vision_features: Tensor,
    text_features: Tensor,
    vision_attention_mask: Tensor | None = None,
    text_attention_mask: Tensor | None = None,
) -> Output:
    """Returns what the layer's own ``forward`` returns, with None for the weights unless the encoder is asked for them.

    Args:
        vision_features, text_features: ``[B, R, d]`` and ``[B, L, d]``.
        vision_attention_mask, text_attention_mask: bool ``[B, R]`` and ``[B, L]``, True: padding.
    """
    masks = {"vision_attention_mask": vision_attention_mask, "text_attention_mask": text_attention_mask}
    if getattr(_asked, "weights", False):
        out: Output = original_method(layer, "forward")(vision_features, text_features, **masks)
        return out
    for name, mask in masks.items():
        if mask is not None and mask.dtype != torch.bool:
            raise TypeError(f"{name} must be bool (True = padding), got {mask.dtype}")
    heads = lambda x: x.unflatten(-1, (layer.num_heads, layer.head_dim)).transpose(1, 2)
    to_vision, to_text = co_attention(
        heads(layer.vision_proj(vision_features)),
        heads(layer.text_proj(text_features)),
        heads(layer.values_vision_proj(vision_features)),
        heads(layer.values_text_proj(text_features)),
        valid_a=None if vision_attention_mask is None else ~vision_attention_mask,
        valid_b=None if text_attention_mask is None else ~text_attention_mask,
        scale=layer.scale,
        dropout_p=layer.dropout if layer.training else 0.0,
        clamp=CLAMP,
    )
    vision = layer.out_vision_proj(to_vision.transpose(1, 2).flatten(2))
    text = layer.out_text_proj(to_text.transpose(1, 2).flatten(2))
    return (vision, None), (text, None)


def encode(encoder: Any, *args: Any, **kwargs: Any) -> Any:
    """Returns what the encoder's own ``forward`` returns; its layers make weights if it is to return them."""
    given = signature(original_class(encoder).forward).bind(encoder, *args, **kwargs).arguments
    asked = given.get("output_attentions")
    asked = encoder.config.output_attentions if asked is None else asked
    with _weights(asked):
        return original_method(encoder, "forward")(*args, **kwargs)


@contextmanager
def _weights(asked: bool) -> Iterator[None]:
    before, _asked.weights = getattr(_asked, "weights", False), asked
    try:
        yield
    finally:
        _asked.weights = before


_ATTENTION: dict[str, Any] = {
    "methods": {"forward": attend},
    "arguments": {"forward": ("vision_features", "text_features", "vision_attention_mask", "text_attention_mask")},
    "what": "attention in both directions",
    "op": "co_attention",
    "effect": "no score matrix",
    "attributes": (
        *("vision_proj", "text_proj", "values_vision_proj", "values_text_proj", "out_vision_proj", "out_text_proj"),
        *("num_heads", "head_dim", "scale", "dropout"),
    ),
}
_ENCODER: dict[str, Any] = {
    "methods": {"forward": encode},
    "arguments": {
        "forward": (
            *("vision_features", "vision_attention_mask", "vision_position_embedding", "spatial_shapes"),
            *("spatial_shapes_list", "level_start_index", "valid_ratios", "text_features", "text_attention_mask"),
            *("text_position_embedding", "text_self_attention_masks", "text_position_ids"),
            *("output_attentions", "output_hidden_states", "return_dict", "kwargs"),
        )
    },
    "what": "encoder",
    "op": "co_attention",
    "effect": "weights where they are asked for",
}
_PLACES = {"GroundingDino": "grounding_dino", "MMGroundingDino": "mm_grounding_dino"}


def _known(name: str, about: dict[str, Any]) -> list[Known]:
    return [
        Known(path=f"transformers.models.{place}.modeling_{place}.{prefix}{name}", **about)
        for prefix, place in _PLACES.items()
    ]


TABLE = (*_known("BiMultiHeadAttention", _ATTENTION), *_known("Encoder", _ENCODER))
"""The classes that get methods of this module."""

_find = by_class(TABLE)


def find(model: nn.Module) -> Iterator[Change | Left]:
    """Yields what is to be changed: a kind of patch. An attention inside of an encoder that is left is left too.

    It would not know whether the encoder is asked for weights.
    """
    found = list(_find(model))
    left = [each for each in found if isinstance(each, Left) and each.what == _ENCODER["what"]]
    unknown = {id(part): encoder.why for encoder in left for part in encoder.module.modules()}
    for each in found:
        if isinstance(each, Change) and id(each.module) in unknown:
            yield Left(each.module, each.what, f"of its encoder: {unknown[id(each.module)]}")
        else:
            yield each


def is_fused(module: nn.Module) -> bool:
    """Returns whether a module is an attention in both directions that runs on the op."""
    return methods_of(module).get("forward") is attend
