"""Qwen-VL for the profiler: images of any size and shape."""

from __future__ import annotations

from math import floor, sqrt
from typing import Any

import torch
from PIL import Image

from mmkernels.models.qwen_vl import QwenVL
from mmkernels.models.qwen_vl_config import SIZES, QwenVLConfig
from mmkernels.options import BadInput
from mmkernels.profiling.options import Options
from mmkernels.profiling.vision_language import Layout, Size, VisionLanguageAdapter, read_config
from mmkernels.transformers_version import import_transformers

MOST_STRETCHED = 200
"""The largest ratio of an image's sides, as in transformers' processor."""

_FEW = {"vision_layers": 2, "text_layers": 2}
"""Layers of "small", at published widths: what a CPU profiles in minutes."""
_ABOUT = "published widths, 2 layers each of encoder and text"
_NAMED = {
    "qwen2": {"tiny": Size("tiny_qwen2"), "small": Size("qwen2_2b", _FEW, _ABOUT), "base": Size("qwen2_2b")},
    "qwen2_5": {
        "tiny": Size("tiny"),
        "small": Size("qwen2_5_3b", _FEW | {"full_layers": (1,)}, _ABOUT),  # one layer of each kind
        "base": Size("qwen2_5_3b"),
    },
    "qwen3": {
        "tiny": Size("tiny_qwen3"),
        "small": Size("qwen3_2b", _FEW | {"deep_layers": (0,)}, _ABOUT),
        "base": Size("qwen3_2b"),
    },
}
_HALF = [0.5, 0.5, 0.5]
_NORM = {"qwen2": {}, "qwen2_5": {}, "qwen3": {"image_mean": _HALF, "image_std": _HALF}}
"""What differs from CLIP's mean and standard deviation of pixels."""


class QwenVLAdapter(VisionLanguageAdapter):
    """One of the three variants.

    Args:
        variant: as of `QwenVLConfig`.
    """

    model_class = QwenVL

    def __init__(self, variant: str) -> None:
        self.variant = variant
        self.named = _NAMED[variant]

    def config(self, options: Options) -> QwenVLConfig:
        if options.folder is None:
            size = self.named[options.size or ""]
            return SIZES[size.name]
        config: QwenVLConfig = read_config(QwenVL, options)
        if config.variant != self.variant:
            raise BadInput(f"--model must be a checkpoint of {options.model}, got one of the variant {config.variant}")
        return config

    def layout(self, config: QwenVLConfig, photo: Image.Image, resolution: int | None) -> Layout:
        """At most resolution^2 pixels, in whole tokens, as near to the photograph's shape as they come."""
        assert resolution is not None
        unit = config.patch_size * config.merge
        if resolution < unit:
            raise BadInput(f"--resolutions must be at least {unit}, the side of a token in pixels; got {resolution}")
        width, height = photo.size
        if max(width, height) > MOST_STRETCHED * min(width, height):
            must = f"at most {MOST_STRETCHED} times as long as wide"
            raise BadInput(f"--image must be {must}, as {self.model_class.__name__} has it; got {width} x {height}")
        scale = resolution / sqrt(width * height) / unit
        return Layout(max(1, floor(height * scale + 1e-6)), max(1, floor(width * scale + 1e-6)))

    def pixels(
        self, options: Options, config: QwenVLConfig, photos: list[Image.Image], layout: Layout
    ) -> tuple[Any, ...]:
        unit = config.patch_size * config.merge
        size = (layout.columns * unit, layout.rows * unit)
        scaled = [photo.resize(size, Image.Resampling.BICUBIC) for photo in photos]
        found = self._processor(options, config)(scaled, do_resize=False, return_tensors="pt")
        return torch.as_tensor(found["pixel_values"]), torch.as_tensor(found["image_grid_thw"])

    def _processor(self, options: Options, config: QwenVLConfig) -> Any:
        """Returns the checkpoint's processor, if it has one, else the variant's; it runs without torchvision."""
        made = import_transformers("preparing images").Qwen2VLImageProcessorPil
        if options.folder is not None and (options.folder / "preprocessor_config.json").exists():
            return made.from_pretrained(str(options.folder))
        return made(
            patch_size=config.patch_size,
            temporal_patch_size=config.patch_frames,
            merge_size=config.merge,
            **_NORM[self.variant],
        )

    def text_ids(self, config: QwenVLConfig) -> int:
        return min(config.image_token_id, config.video_token_id)
