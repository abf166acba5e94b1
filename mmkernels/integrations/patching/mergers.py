"""Pixel shuffles and patch mergers of transformers' models by `merge_patches`: one copy, of all images at once."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from mmkernels.integrations.patching.changes import Known, by_class
from mmkernels.integrations.patching.classes import Methods, original_class, original_method
from mmkernels.ops.tokens.merge_patches import merge_patches
from mmkernels.runtime.checks import is_known

_MODELS = "transformers.models"


def _steps(scale: float) -> int:
    """Returns how many tokens become one along each side, 0 where that is no whole number."""
    steps = round(1 / scale)
    return steps if steps * scale == 1 else 0


def _square(x: Tensor, steps: int) -> Tensor:
    """Returns the tokens of square images, ``[images, side * side, C]``, ``steps * steps`` of them in one."""
    side = int(x.shape[1] ** 0.5)
    return _spread(x.unflatten(1, (side, side)), steps).flatten(1, 2)  # [images, (side / steps)^2, steps^2 C]


def _spread(x: Tensor, steps: int) -> Tensor:
    """Returns the same of ``[images, rows, columns, C]``, in this form.

    The images are frames of one video: their number is a size, so that one graph serves any number of images.
    """
    images, rows, columns = x.shape[:3]
    if is_known(images == 0):
        return x.reshape(0, rows // steps, columns // steps, x.shape[3] * steps * steps)
    y, _ = merge_patches(x.flatten(0, 2), (images, rows, columns), (1, steps, steps))
    return y.unflatten(0, (images, rows // steps, columns // steps))


def _of_rows_by_scale(module: Any, vision_features: Tensor, scale_factor: float = 0.5) -> Tensor:
    steps = _steps(scale_factor)
    if not steps:
        theirs: Tensor = original_method(module, "pixel_shuffle")(vision_features, scale_factor)
        return theirs
    return _spread(vision_features, steps)


def _of_tokens(module: Any, x: Tensor, scale_factor: int = 2) -> Tensor:
    return _square(x, scale_factor)


def _of_tokens_by_factor(module: Any, image_hidden_states: Tensor, pixel_shuffle_factor: int) -> Tensor:
    return _square(image_hidden_states, pixel_shuffle_factor)


def _of_tokens_to_rows(module: Any, image_features: Tensor) -> Tensor:
    side = int(image_features.shape[1] ** 0.5)
    y = _square(image_features, module.downsample_factor)
    return y.unflatten(1, (side // module.downsample_factor, side // module.downsample_factor))


def _of_rows(module: Any, hidden_states: Tensor) -> Tensor:
    return _spread(hidden_states, module.factor)


def _llama4(module: Any, encoded_patches: Tensor) -> Tensor:
    steps = _steps(module.pixel_shuffle_ratio)
    if not steps:
        theirs: Tensor = original_method(module, "forward")(encoded_patches)
        return theirs
    y: Tensor = module.mlp(_square(encoded_patches, steps))
    return y


def _muse_glimmer(module: Any, hidden_states: Tensor, grid_thw: Tensor, **keywords: Any) -> Tensor:
    if keywords.get("pixel_shuffle_index") is not None:  # which may lie in another order
        theirs: Tensor = original_method(module, "pixel_shuffle")(hidden_states, grid_thw, **keywords)
        return theirs
    return merge_patches(hidden_states, grid_thw, (1, module.merge_size, module.merge_size), order="channel")[0]


def _mistral3(module: Any, image_features: Tensor, image_sizes: Any) -> Tensor:
    """Ours of ``forward(image_features [tokens, C], image_sizes)``: the sizes (height, width) are those of pixels."""
    steps = module.spatial_merge_size
    sizes = image_sizes.tolist() if isinstance(image_sizes, Tensor) else image_sizes
    grid = [(1, int(height) // module.patch_size, int(width) // module.patch_size) for height, width in sizes]
    if any(rows % steps or columns % steps for _, rows, columns in grid):  # theirs drops what is left
        theirs: Tensor = original_method(module, "forward")(image_features, image_sizes)
        return theirs
    merged: Tensor = module.merging_layer(merge_patches(image_features, grid, (1, steps, steps), order="channel")[0])
    return merged


def _paddleocr(module: Any, image_features: Tensor, image_grid_thw: Tensor) -> Tensor:
    window, norm = (1, *module.merge_kernel_size), module.pre_norm
    if is_plain(norm, nn.LayerNorm):
        x, _ = merge_patches(
            image_features,
            image_grid_thw,
            window,
            norm="layer",
            norm_first=True,
            weight=norm.weight,
            bias=norm.bias,
            eps=norm.eps,
        )
    else:
        x, _ = merge_patches(norm(image_features), image_grid_thw, window)
    y: Tensor = module.linear_2(module.act(module.linear_1(x)))
    return y


def _minicpm(module: Any, hidden_states: Tensor, target_sizes: Tensor) -> list[Tensor]:
    """Ours of ``forward(hidden_states [1, tokens, C], target_sizes [images, 2])``."""
    grid: Any = [(1, rows, columns) for rows, columns in target_sizes.tolist()]
    x = hidden_states[0, : sum(rows * columns for _, rows, columns in grid)]
    for layer in module.mlp:
        x, grid = merge_patches(x, grid, (1, *module.merge_kernel_size))
        x = layer(x)
    return list(x.split([rows * columns for _, rows, columns in grid]))


def _grouped(module: Any, x: Tensor) -> Tensor:
    """Ours of ``forward(x [tokens, C])``: a root-mean-square norm of tokens that come window by window."""
    norm, patches = module.ln_q, module.hidden_size // x.shape[-1]
    if x.dim() != 2 or not is_plain(norm, _beside(module, "RMSNorm")):
        theirs: Tensor = original_method(module, "forward")(x)
        return theirs
    grid, window = [(1, 1, x.shape[0])], (1, 1, patches)
    weight, eps = norm.weight, norm.variance_epsilon
    y, _ = merge_patches(x, grid, window, order="grouped", norm="rms", norm_first=True, weight=weight, eps=eps)
    projected: Tensor = module.mlp(y)
    return projected


def _beside(module: Any, name: str) -> Any:
    """Returns the class of this name, behind what is common, in the file of a module's class; None: there is none."""
    own = original_class(module)
    common = own.__name__.removesuffix("PatchMerger")
    return getattr(sys.modules[own.__module__], f"{common}{name}", None)


def is_plain(module: nn.Module, expected: type[nn.Module]) -> bool:
    """Returns whether a module is of this very class and nothing else sees its calls, so that an op may replace them.

    A module with a hook, or of another class since FSDP2, PEFT or quantisation changed it, is called as it is.
    """
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return original_class(module) is expected and "forward" not in vars(module) and not any(hooks)


_COPY = "one copy in place of two"
_ALL = "one copy of all images in place of a loop"
_NORM = "a norm in one pass"


def _shuffle(path: str, method: Methods, arguments: Sequence[str], *attributes: str, effect: str = _COPY) -> Known:
    (name,) = method
    return Known(
        path=f"{_MODELS}.{path}",
        methods=method,
        arguments={name: arguments},
        what="pixel shuffle",
        op="merge_patches",
        effect=effect,
        attributes=attributes,
    )


def _merger(path: str, forward: Any, arguments: Sequence[str], *attributes: str, effect: str = _ALL) -> Known:
    return Known(
        path=f"{_MODELS}.{path}",
        methods={"forward": forward},
        arguments={"forward": arguments},
        what="patch merger",
        op="merge_patches",
        effect=effect,
        attributes=attributes,
    )


_BY_SCALE = {"pixel_shuffle": _of_rows_by_scale}, ("vision_features", "scale_factor")
_TOKENS = {"pixel_shuffle": _of_tokens}, ("x", "scale_factor")
_TO_ROWS = {"pixel_shuffle": _of_tokens_to_rows}, ("image_features",), "downsample_factor"
_SIZES = _mistral3, ("image_features", "image_sizes"), "spatial_merge_size", "patch_size", "merging_layer"
_MINICPM = _minicpm, ("hidden_states", "target_sizes"), "mlp", "merge_kernel_size"
_RMS = _grouped, ("x",), "ln_q.weight", "ln_q.variance_epsilon", "hidden_size", "mlp"

TABLE = (
    _shuffle("internvl.modeling_internvl.InternVLModel", *_BY_SCALE),
    _shuffle("qianfan_ocr.modeling_qianfan_ocr.QianfanOCRModel", *_BY_SCALE),
    _shuffle("nemotron_h_omni.modeling_nemotron_h_omni.NemotronH_Omni_Reasoning_V3", *_BY_SCALE),
    _shuffle("idefics3.modeling_idefics3.Idefics3Connector", *_TOKENS),
    _shuffle("smolvlm.modeling_smolvlm.SmolVLMConnector", *_TOKENS),
    _shuffle("granite_docling.modeling_granite_docling.GraniteDoclingConnectorPath", *_TOKENS),
    _shuffle(
        "modernvbert.modeling_modernvbert.ModernVBertConnector",
        {"pixel_shuffle": _of_tokens_by_factor},
        ("image_hidden_states", "pixel_shuffle_factor"),
    ),
    _shuffle("aya_vision.modeling_aya_vision.AyaVisionMultiModalProjector", *_TO_ROWS),
    _shuffle("cohere2_vision.modeling_cohere2_vision.Cohere2VisionMultiModalProjector", *_TO_ROWS),
    _shuffle(
        "lfm2_vl.modeling_lfm2_vl.Lfm2VlMultiModalProjector",
        {"pixel_unshuffle": _of_rows},
        ("hidden_states",),
        "factor",
    ),
    _shuffle(
        "llama4.modeling_llama4.Llama4VisionPixelShuffleMLP",
        {"forward": _llama4},
        ("encoded_patches",),
        *("pixel_shuffle_ratio", "mlp"),
    ),
    _shuffle(
        "muse_glimmer.modeling_muse_glimmer.MuseGlimmerVisionModel",
        {"pixel_shuffle": _muse_glimmer},
        ("hidden_states", "grid_thw", "kwargs"),
        "merge_size",
        effect=_ALL,
    ),
    _merger("mistral3.modeling_mistral3.Mistral3PatchMerger", *_SIZES),
    _merger("lighton_ocr.modeling_lighton_ocr.LightOnOcrPatchMerger", *_SIZES),
    _merger(
        "paddleocr_vl.modeling_paddleocr_vl.PaddleOCRProjector",
        _paddleocr,
        ("image_features", "image_grid_thw"),
        *("merge_kernel_size", "pre_norm.weight", "linear_1", "act", "linear_2"),
    ),
    _merger("minicpmv4_6.modeling_minicpmv4_6.MiniCPMV4_6Merger", *_MINICPM),
    _merger("minicpmv4_7.modeling_minicpmv4_7.MiniCPMV4_7Merger", *_MINICPM),
    _merger("minicpm_ocr.modeling_minicpm_ocr.MiniCPMOcrMerger", *_MINICPM),
    _merger("qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VLPatchMerger", *_RMS, effect=_NORM),
    _merger("qwen2_5_omni.modeling_qwen2_5_omni.Qwen2_5OmniPatchMerger", *_RMS, effect=_NORM),
    _merger("exaone4_5.modeling_exaone4_5.Exaone4_5_PatchMerger", *_RMS, effect=_NORM),
)
"""Classes of transformers that merge patches, and what merges them here."""

find = by_class(TABLE)
