"""Pooling of visual tokens and audio frames in transformers' models by `pool_tokens`, where the tokens lie.

Transformers pools images in PyTorch's layout for pictures, so that tokens are transposed before and after it. Where a
model pools behind its last linear layer, here the tokens are pooled before it: a mean of what a linear layer gives is
what it gives for a mean, and there are fewer of them.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor, nn

from mmkernels.integrations.patching.changes import Change, Known, Left, by_class
from mmkernels.integrations.patching.classes import is_patched, original_class, original_method
from mmkernels.integrations.patching.mergers import is_plain
from mmkernels.ops.tokens.pool_tokens import pool_tokens

_MODELS = "transformers.models"


# Audio frames.


def _frames(module: Any, input: Tensor) -> Tensor:
    """Ours of ``nn.AvgPool1d.forward(input [N, C, frames])``: the frames of a transposed input lie in rows."""
    (size,) = module.kernel_size if isinstance(module.kernel_size, tuple) else (module.kernel_size,)
    if input.dim() != 3 or input.stride(1) != 1 or input.shape[2] < size:
        theirs: Tensor = original_method(module, "forward")(input)
        return theirs
    pooled, _ = pool_tokens(input.transpose(1, 2), (input.shape[2], 1, 1), (size, 1, 1), edges="drop")
    return pooled.transpose(1, 2)


def _why_not_frames(module: Any) -> str:
    if original_class(module.avg_pooler) is not nn.AvgPool1d:
        return f"its frames are pooled by a {original_class(module.avg_pooler).__name__}"
    pool = module.avg_pooler
    if "forward" in vars(pool):
        return "the forward of its pooling was set on the module, as accelerate's hooks do"
    apart = pool.kernel_size == pool.stride and pool.padding in (0, (0,)) and not pool.ceil_mode
    return "" if apart else "its windows of frames overlap or are padded"


def _audio_tower(path: str) -> Known:
    return Known(
        path=f"{_MODELS}.{path}",
        methods={},
        arguments={},
        what="pooled audio frames",
        op="pool_tokens",
        effect="frames are pooled where they lie",
        attributes=("avg_pooler.kernel_size", "avg_pooler.stride"),
        why_not=_why_not_frames,
    )


AUDIO_TOWERS = (
    _audio_tower("qwen2_audio.modeling_qwen2_audio.Qwen2AudioEncoder"),
    _audio_tower("audioflamingo3.modeling_audioflamingo3.AudioFlamingo3Encoder"),
)
"""Towers that call their ``avg_pooler``; others have one, and average without it."""

_find_audio_towers = by_class(AUDIO_TOWERS)


def _find_frames(model: nn.Module) -> Iterator[Change | Left]:
    for found in _find_audio_towers(model):
        pool: Any = found.module.avg_pooler
        if isinstance(found, Left):
            yield found
        else:
            yield replace(found, module=pool, methods={"forward": _frames})


# Tokens of images.


def _gemma3(module: Any, vision_outputs: Tensor) -> Tensor:
    """Ours of ``forward(vision_outputs [images, side * side, C])``."""
    side, step = module.patches_per_image, module.kernel_size
    pooled, _ = pool_tokens(vision_outputs, (1, side, side), (1, step, step), edges="drop")
    projected = torch.matmul(module.mm_soft_emb_norm(pooled), module.mm_input_projection_weight)
    return projected.type_as(vision_outputs)


def _video_llama3(module: Any, hidden_states: Tensor, grid_thw: Tensor, merge_sizes: Tensor) -> Tensor:
    """Ours of ``pixel_unshuffle(hidden_states [tokens, C], ...)``: half of the size, bilinear, is a mean of 2 x 2.

    The tokens come window by window.
    """
    sizes = set(merge_sizes.tolist())
    if sizes == {1}:
        return hidden_states
    if sizes != {2}:
        theirs: Tensor = original_method(module, "pixel_unshuffle")(hidden_states, grid_thw, merge_sizes)
        return theirs
    return pool_tokens(hidden_states, [(hidden_states.shape[0], 1, 1)], (4, 1, 1))[0]


# Before the last linear layer.


def _perception_lm(module: Any, features: Tensor) -> Tensor:
    """Ours of ``forward(features [images, side * side, C])``."""
    side = math.isqrt(features.shape[1])
    if not is_plain(module.pooling, type(module.pooling)) or not _commutes(module.linear_2) or side == 0:
        theirs: Tensor = original_method(module, "forward")(features)
        return theirs
    if side * side != features.shape[1]:
        raise ValueError(f"features must be of square images, got {features.shape[1]} tokens an image")
    size = side // module.pooling.pooling_ratio
    pooled, _ = pool_tokens(module.gelu(module.linear_1(features)), (1, side, side), size=(1, size, size))
    projected: Tensor = module.linear_2(pooled)
    return projected


def _why_not_perception_lm(module: Any) -> str:
    return "" if hasattr(module.pooling, "pooling_ratio") else "it does not pool"


def _commutes(layer: nn.Module) -> bool:
    """Returns whether a layer is linear and nothing else: LoRA's dropout draws anew for each token."""
    return original_class(layer) is nn.Linear


class _Video(threading.local):
    """What a thread's call of ``get_video_features`` knows of its projector; None outside of such a call."""

    def __init__(self) -> None:
        self.call: _Call | None = None  # of the instance, which is what compiled code guards


class _Call:
    def __init__(self, model: Any) -> None:
        self.model, self.pooled = model, False


_video = _Video()


@contextmanager
def _call_of(model: Any) -> Iterator[None]:
    before, _video.call = _video.call, _Call(model)
    try:
        yield
    finally:
        _video.call = before


def _video_features(module: Any, *args: Any, **keywords: Any) -> Any:
    """Ours of LLaVA-OneVision's ``get_video_features``: theirs, whose projector pools.

    It goes on with our ``apply_pooling``, which knows whether the projector has pooled, where another thread unpatches
    the model meanwhile.
    """
    call: Any = module
    if not torch.compiler.is_compiling() and is_patched(module):
        call = object.__new__(type(module))
        call.__dict__ = module.__dict__  # the same one
    with _call_of(module):
        return original_method(call, "get_video_features")(*args, **keywords)


def _project(module: Any, image_features: Tensor) -> Tensor:
    """Ours of the projector's ``forward(image_features [frames, side * side, C])``."""
    call = _video.call
    if call is None or call.model.multi_modal_projector is not module or not _commutes(module.linear_2):
        theirs: Tensor = original_method(module, "forward")(image_features)
        return theirs
    call.pooled = True
    projected: Tensor = module.linear_2(_halved(call.model, module.act(module.linear_1(image_features))))
    return projected


def _pool(module: Any, image_features: Tensor) -> Tensor:
    """Ours of ``apply_pooling(image_features [frames, side * side, C])``."""
    call = _video.call
    return image_features if call is not None and call.pooled else _halved(module, image_features)


def _halved(model: Any, x: Tensor) -> Tensor:
    config = model.config.vision_config
    side = config.image_size // config.patch_size
    half = -(-side // 2)
    return pool_tokens(x, (1, side, side), size=(1, half, half), mode="bilinear")[0]


_EARLY = "pooled before the last linear layer"

TABLE = (
    Known(
        path=f"{_MODELS}.gemma3.modeling_gemma3.Gemma3MultiModalProjector",
        methods={"forward": _gemma3},
        arguments={"forward": ("vision_outputs",)},
        what="pooled image tokens",
        op="pool_tokens",
        effect="tokens are pooled where they lie",
        attributes=("patches_per_image", "kernel_size", "mm_soft_emb_norm", "mm_input_projection_weight"),
    ),
    Known(
        path=f"{_MODELS}.video_llama_3.modeling_video_llama_3.VideoLlama3VisionModel",
        methods={"pixel_unshuffle": _video_llama3},
        arguments={"pixel_unshuffle": ("hidden_states", "grid_thw", "merge_sizes")},
        what="pooled image tokens",
        op="pool_tokens",
        effect="all images at once, where the tokens lie",
    ),
    Known(
        path=f"{_MODELS}.perception_lm.modeling_perception_lm.PerceptionLMMultiModalProjector",
        methods={"forward": _perception_lm},
        arguments={"forward": ("features",)},
        what="pooled image tokens",
        op="pool_tokens",
        effect=_EARLY,
        attributes=("linear_1", "gelu", "linear_2", "pooling"),
        why_not=_why_not_perception_lm,
    ),
    Known(
        path=f"{_MODELS}.llava_onevision.modeling_llava_onevision.LlavaOnevisionModel",
        methods={"get_video_features": _video_features, "apply_pooling": _pool},
        arguments={"apply_pooling": ("image_features",)},
        what="pooled video tokens",
        op="pool_tokens",
        effect=_EARLY,
        attributes=("get_video_features", "multi_modal_projector.linear_2"),
    ),
    Known(
        path=f"{_MODELS}.llava_onevision.modeling_llava_onevision.LlavaOnevisionMultiModalProjector",
        methods={"forward": _project},
        arguments={"forward": ("image_features",)},
        what="pooled video tokens",
        op="pool_tokens",
        effect=_EARLY,
        attributes=("linear_1", "act", "linear_2"),
    ),
)
"""Classes of transformers that pool tokens of images, and what pools them here."""

_find_tokens = by_class(TABLE)


@cache
def _signed_as(theirs: Any, ours: Any) -> Any:
    """Returns ours with their signature: transformers' ``generate`` looks up which arguments it may pass."""

    @wraps(theirs)
    def signed(module: Any, *args: Any, **keywords: Any) -> Any:
        return ours(module, *args, **keywords)

    return signed


def _with_their_signature(found: Change | Left) -> Change | Left:
    if isinstance(found, Left) or "get_video_features" not in found.methods:
        return found
    theirs: Any = original_class(found.module)
    signed = _signed_as(theirs.get_video_features, _video_features)
    return replace(found, methods={**found.methods, "get_video_features": signed})


def find(model: nn.Module) -> Iterator[Change | Left]:
    """Yields the pooling of a model: a `mmkernels.integrations.patching.changes.Kind`."""
    yield from _find_frames(model)
    yield from map(_with_their_signature, _find_tokens(model))
