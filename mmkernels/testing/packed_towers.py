"""Towers of transformers that pack images, video frames or recordings into one row: small by rule, each by itself."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmkernels.testing.models import Config, Family, Inputs
from mmkernels.testing.parts import pixels
from mmkernels.testing.shrink import shrink

_GRID = torch.tensor([[1, 4, 6], [2, 4, 4], [1, 2, 4]])  # an image, two steps of a video, a small image
_IMAGES = torch.tensor([[1, 4, 6], [1, 4, 4], [1, 4, 8]])
_FLAT = torch.tensor([[4, 8], [4, 4], [8, 4]])


class _Tower(NamedTuple):
    model: str
    draw_inputs: Callable[[], Inputs]
    sizes: Config | None = None


def _rows(numbers: int, name: str = "hidden_states", grid: Tensor = _GRID, **more: Any) -> Callable[[], Inputs]:
    """Patches of images, each a row of this many numbers."""
    return lambda: {name: torch.randn(int(grid.prod(1).sum()), numbers), "grid_thw": grid} | more


def _squares(*batch: int, grid: Tensor = _GRID) -> Callable[[], Inputs]:
    """Patches as small images."""
    return lambda: {"pixel_values": torch.randn(*batch, int(grid.prod(1).sum()), 3, 8, 8), "grid_thw": grid}


def _strip() -> Inputs:
    """Patches beside each other in one long image, whose windows of two by two become one token twice."""
    sizes = torch.tensor([[4, 8], [4, 8]])
    return {"pixel_values": torch.randn(1, 3, 8, 8 * int(sizes.prod(1).sum())), "target_sizes": sizes}


def _images_with_class_tokens() -> Inputs:
    grid = torch.tensor([[1, 2, 3], [1, 2, 2], [1, 1, 2]])
    return {"pixel_values": torch.randn(int(grid.prod(1).sum()), 16, 16, 3), "image_grid_thw": grid}


def _images_in_one_row() -> Inputs:
    return {"pixel_values": torch.randn(int(_FLAT.prod(1).sum()), 192), "image_grid_hw": _FLAT}


def _two_sizes() -> Inputs:
    return {"pixel_values": pixels(2), "image_sizes": torch.tensor([[32, 32], [16, 24]])}


def _recordings(**more: Any) -> Callable[[], Inputs]:
    """Two recordings, one after the other."""
    return lambda: {"input_features": torch.randn(16, 70), "feature_lens": torch.tensor([40, 30])} | more


def _padded_recordings() -> Inputs:
    mask = torch.arange(200) < torch.tensor([[200], [130]])
    return {"input_features": torch.randn(2, 16, 200), "input_features_mask": mask.long()}


_TOWERS = {
    "cohere_compass": _Tower("CohereCompassVisionModel", _rows(384)),
    "cosmos3_edge": _Tower("Cosmos3EdgeVisionModel", _rows(192, "pixel_values")),
    "dots3_note": _Tower("Dots3NoteVisionModel", _rows(192, "pixel_values")),
    "ernie4_5_vl_moe": _Tower("Ernie4_5_VLMoeVisionTransformerPretrainedModel", _rows(192)),
    "exaone4_5": _Tower("Exaone4_5_VisionModel", _rows(384)),
    "glm4v": _Tower("Glm4vVisionModel", _rows(384, grid=_IMAGES)),
    "glm4v_moe": _Tower("Glm4vMoeVisionModel", _rows(384, grid=_IMAGES)),
    "glm5_next": _Tower("Glm5NextVisionModel", _rows(384)),
    "glm_image": _Tower("GlmImageVisionModel", _rows(192, "pixel_values", grid=_IMAGES)),
    "glm_ocr": _Tower("GlmOcrVisionModel", _rows(384)),
    "hunyuan_vl": _Tower("HunYuanVLVisionTransformer", _rows(192, "pixel_values", grid=_IMAGES)),
    "hy_v4_vl": _Tower("HYV4VLVisionModel", _rows(192, "pixel_values")),
    "inkling2": _Tower("Inkling2VisionModel", _images_with_class_tokens),
    "kimi_k25": _Tower("Kimi_K25VisionModel", _squares(grid=_IMAGES)),
    "lfm3_vl": _Tower("Lfm3VlVisionModel", _rows(384, "pixel_values")),
    "minicpm_ocr": _Tower("MiniCPMOcrVisionModel", _strip, {"insert_layer_id": 0}),
    "minicpmv4_6": _Tower("MiniCPMV4_6VisionModel", _strip, {"insert_layer_id": 0}),
    "minicpmv4_7": _Tower("MiniCPMV4_7VisionModel", _strip, {"insert_layer_id": 0}),
    "minimax_m3_vl": _Tower("MiniMaxM3VLVisionModel", _rows(384, "pixel_values")),
    "muse_glimmer": _Tower("MuseGlimmerVisionModel", _rows(384, "pixel_values")),
    "muse_spark": _Tower("MuseSparkVisionModel", _rows(384, "pixel_values")),
    "paddleocr_vl": _Tower("PaddleOCRVisionModel", _squares(1)),
    "pixtral": _Tower("PixtralVisionModel", _two_sizes),
    "qwen2_5_omni": _Tower("Qwen2_5OmniVisionEncoder", _rows(384)),
    "qwen2_5_omni audio": _Tower("Qwen2_5OmniAudioEncoder", _recordings(aftercnn_lens=torch.tensor([20, 15]))),
    "qwen2_5_vl": _Tower("Qwen2_5_VisionTransformerPretrainedModel", _rows(384), {"window_size": 32}),
    "qwen2_vl": _Tower("Qwen2VisionTransformerPretrainedModel", _rows(384)),
    "qwen3_5": _Tower("Qwen3_5VisionModel", _rows(384)),
    "qwen3_5_moe": _Tower("Qwen3_5MoeVisionModel", _rows(384)),
    "qwen3_asr": _Tower("Qwen3ASREncoder", _padded_recordings, {"n_window_infer": 100}),
    "qwen3_omni_moe": _Tower("Qwen3OmniMoeVisionEncoder", _rows(384)),
    "qwen3_omni_moe audio": _Tower("Qwen3OmniMoeAudioEncoder", _recordings()),
    "qwen3_vl": _Tower("Qwen3VLVisionModel", _rows(384)),
    "qwen3_vl_moe": _Tower("Qwen3VLMoeVisionModel", _rows(384)),
    "qwen4_exp": _Tower("Qwen4ExpVisionModel", _rows(384)),
    "radio": _Tower("RadioModel", _images_in_one_row),
    "video_llama_3": _Tower("VideoLlama3VisionModel", _rows(192, "pixel_values", merge_sizes=torch.tensor([2, 2, 2]))),
}
"""By transformers' folder, followed by what is special about an entry."""

TOWERS = tuple(_TOWERS)


def packed_tower(name: str) -> Family | None:
    """Returns one of `TOWERS`; None: the installed transformers has no such model, or it does not pack yet."""
    tower = _TOWERS[name]
    folder = name.partition(" ")[0]
    module = f"models.{folder}.modeling_{folder}"
    try:
        model_class = getattr(importlib.import_module(f"transformers.{module}"), tower.model, None)
    except ImportError:
        return None
    if model_class is None or "cu_seq_lens_q" not in Path(inspect.getsourcefile(model_class) or "").read_text():
        return None
    sizes = shrink(model_class.config_class().to_dict()) | {"experts_implementation": "eager"} | (tower.sizes or {})
    return Family(name, f"{module}:{tower.model}", sizes, tower.draw_inputs)
