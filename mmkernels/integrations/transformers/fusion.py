"""`mmkernels.co_attention` inside transformers' GroundingDINO and MM-GroundingDINO."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mmkernels.ops.attention.co_attention import co_attention
from mmkernels.transformers_version import VersionError

CLAMP = 50_000.0
"""How far below the largest score the layer lets a score be, for 16 bits' sake; no checkpoint comes near it."""

_CLASSES = ("GroundingDinoBiMultiHeadAttention", "MMGroundingDinoBiMultiHeadAttention")
_PROJECTIONS = (
    "vision_proj",
    "text_proj",
    "values_vision_proj",
    "values_text_proj",
    "out_vision_proj",
    "out_text_proj",
)
_NUMBERS = ("num_heads", "head_dim", "scale", "dropout")
_ARGUMENTS = ["vision_features", "text_features", "vision_attention_mask", "text_attention_mask"]
_OUTPUT = "output_attentions"

Output = tuple[tuple[Tensor, None], tuple[Tensor, None]]


def fuse_co_attention(model: nn.Module) -> int:
    """Lets a GroundingDINO's fusion layers run on `mmkernels.co_attention`, which never builds their score matrix.

    In these layers the image's features and the text's attend to each other by one matrix of scores, of which
    transformers keeps several copies of ``batch * heads * 13,294 * 256`` for an image of usual size. The results are
    the same, in training too, with the layers' masks, dropout, and clamping of scores; where a mask hides a whole side,
    what the other one gets is 0 and not NaN. Weights, configuration and checkpoints stay as they are, and copies of
    the model are fused too. A second call does nothing.

    A fused model has no attention weights of these layers: a call with ``output_attentions=True``, or of a model whose
    configuration says so, is refused. `restore_co_attention` is the way back.

    Args:
        model: a ``GroundingDinoForObjectDetection``, an ``MMGroundingDinoForObjectDetection``, or any module that
            contains their fusion layers. It is changed in place.

    Returns:
        how many layers run on the op now.

    Raises:
        TypeError: `model` is no module. ValueError: it has no such layer.
        VersionError: (an ImportError) the layer is not the one that this function is written for.

    Source: Liu et al., "Grounding DINO", 2023, section 3.1, the feature enhancer; Li et al., "Grounded Language-Image
    Pre-training" (GLIP), 2022, equation 4.

    Example:
        >>> import torch, transformers
        >>> from mmkernels.integrations.transformers import fuse_co_attention
        >>> from transformers.models.grounding_dino.modeling_grounding_dino import GroundingDinoFusionLayer
        >>> layer = GroundingDinoFusionLayer(transformers.GroundingDinoConfig(d_model=64, encoder_ffn_dim=128))
        >>> fuse_co_attention(layer)
        1
        >>> (vision, _), (text, _) = layer(torch.randn(1, 300, 64), torch.randn(1, 7, 64))
        >>> vision.shape, text.shape
        (torch.Size([1, 300, 64]), torch.Size([1, 7, 64]))
    """
    layers = _layers(model)
    if not layers:
        raise ValueError(f"model must contain a {' or '.join(_CLASSES)}, got a {type(model).__name__} without one")
    for layer in layers:
        _check(layer)
    for layer in layers:
        layer.forward = partial(_forward, layer)
    for module in model.modules():
        if _takes_weights(module) and _layers(module) and _refuse not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_refuse, with_kwargs=True)
    return len(layers)


def restore_co_attention(model: nn.Module) -> int:
    """Undoes `fuse_co_attention`: the layers run as transformers wrote them.

    Args:
        model: as there; one that is not fused stays as it is.

    Returns:
        how many layers ran on the op.

    Example:
        >>> import transformers
        >>> from mmkernels.integrations.transformers import fuse_co_attention, restore_co_attention
        >>> from transformers.models.grounding_dino.modeling_grounding_dino import GroundingDinoFusionLayer
        >>> layer = GroundingDinoFusionLayer(transformers.GroundingDinoConfig(d_model=64, encoder_ffn_dim=128))
        >>> restore_co_attention(layer), fuse_co_attention(layer), restore_co_attention(layer)
        (0, 1, 1)
    """
    fused = [layer for layer in _layers(model) if "forward" in vars(layer)]
    for layer in fused:
        del layer.forward
    for module in model.modules():
        for number in [number for number, hook in module._forward_pre_hooks.items() if hook is _refuse]:
            del module._forward_pre_hooks[number]
            module._forward_pre_hooks_with_kwargs.pop(number, None)
    return len(fused)


def _layers(model: nn.Module) -> list[nn.Module]:
    """Returns the layers of a model that attend in both directions by one matrix."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    return [x for x in model.modules() if any(base.__name__ in _CLASSES for base in type(x).__mro__)]


def _check(layer: nn.Module) -> None:
    """Raises unless a layer is as this module expects."""
    method = inspect.unwrap(type(layer).forward)
    arguments = [name for name in inspect.signature(method).parameters if name != "self"]
    missing = [name for name in (*_PROJECTIONS, *_NUMBERS) if not hasattr(layer, name)]
    owner = method.__qualname__.partition(".")[0]
    if missing or arguments != _ARGUMENTS or owner not in _CLASSES:
        got = f"no {', '.join(missing)}" if missing else f"forward({', '.join(arguments)}) of {owner}"
        raise VersionError(f"{type(layer).__name__} must be the layer that mmkernels is written for, got {got}")


def _takes_weights(module: nn.Module) -> bool:
    return _OUTPUT in inspect.signature(type(module).forward).parameters


def _refuse(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raises if a call asks for attention weights. (A hook that runs before a module's forward.)"""
    asked = kwargs.get(_OUTPUT)
    if asked is None:
        asked = getattr(getattr(module, "config", None), _OUTPUT, False)
    if asked:
        why = "fused layers never build attention weights; call restore_co_attention(model) to get them"
        raise NotImplementedError(f"{_OUTPUT} must be False after fuse_co_attention, got True: {why}")


def _forward(
    layer: Any,
    vision_features: Tensor,
    text_features: Tensor,
    vision_attention_mask: Tensor | None = None,
    text_attention_mask: Tensor | None = None,
) -> Output:
    """Returns what the layer's own ``forward`` returns, with None for the weights.

    Args:
        vision_features, text_features: ``[B, R, d]`` and ``[B, L, d]``.
        vision_attention_mask, text_attention_mask: bool ``[B, R]`` and ``[B, L]``, True: padding.
    """
    masks = {"vision_attention_mask": vision_attention_mask, "text_attention_mask": text_attention_mask}
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
