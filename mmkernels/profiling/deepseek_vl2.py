"""DeepSeek-VL2 for the profiler: images are cut into tiles, and seen as a whole too; experts read the text."""

from __future__ import annotations

from dataclasses import replace
from math import sqrt
from typing import Any

import torch
from PIL import Image
from torch import nn

from mmkernels.models.deepseek_vl2 import DeepSeekVL2
from mmkernels.models.deepseek_vl2_config import SIZES, DeepSeekVL2Config
from mmkernels.models.deepseek_vl2_tiles import best_resolution, cut_images, num_tokens
from mmkernels.options import BadInput
from mmkernels.profiling.adapter import Reduction
from mmkernels.profiling.options import Choice, Options
from mmkernels.profiling.reading import DECODE, PREFILL
from mmkernels.profiling.vision_language import Inputs, Layout, Size, VisionLanguageAdapter, read_config

_NAMED = {
    "tiny": Size("tiny"),
    "small": Size(
        "deepseek_vl2_small",
        {"vision_layers": 2, "text_layers": 2},
        "published widths, 2 layers each of encoder and text, one of them with experts",
    ),
    "base": Size("deepseek_vl2_tiny"),
}


class DeepSeekVL2Adapter(VisionLanguageAdapter):
    model_class = DeepSeekVL2
    named = _NAMED
    stages = (
        VisionLanguageAdapter.stages[0],
        replace(VisionLanguageAdapter.stages[1], about="the projector, and the ends of rows and views put between"),
        PREFILL,
        DECODE,
    )

    def config(self, options: Options) -> DeepSeekVL2Config:
        if options.folder is not None:
            config: DeepSeekVL2Config = read_config(DeepSeekVL2, options)
            return config
        return SIZES[self.named[options.size or ""].name]

    def layout(self, config: DeepSeekVL2Config, photo: Image.Image, resolution: int | None) -> Layout:
        """The tiles that suit the photograph when it is scaled to about resolution^2 pixels."""
        assert resolution is not None
        side, unit = config.image_size, config.tile_side
        width, height = best_resolution(_scaled(photo, resolution), config.candidate_resolutions)
        across, down = width // side, height // side
        places = (1 + down * across) * unit**2
        return Layout(
            unit, unit, down, across, thumbnail=True, others=num_tokens((across, down), unit) - places, side=resolution
        )

    def pixels(
        self, options: Options, config: DeepSeekVL2Config, photos: list[Image.Image], layout: Layout
    ) -> tuple[Any, ...]:
        """Each of them is cut, however many there are."""
        assert layout.side is not None
        scaled = [photo.resize(_scaled(photo, layout.side), Image.Resampling.BICUBIC) for photo in photos]
        found = cut_images(scaled, config, cut=True)
        return found.pixel_values, list(found.tiles)

    def text_ids(self, config: DeepSeekVL2Config) -> int:
        return config.image_token_id

    def with_reducer(self, model: Any, choice: Choice) -> nn.Module:
        """There is no reducer: each row of an image's tokens ends with a newline."""
        built: nn.Module = model
        return built

    def reducer_changes(self, choice: Choice) -> dict[str, Any]:
        return {}

    def reduction(self, model: Any, inputs: Inputs) -> Reduction:
        layout = inputs.layout
        rows, columns = layout.down * layout.rows, layout.across * layout.columns
        each = torch.arange(rows * columns).tolist()
        return Reduction(layout.tokens, rows, columns, each, learned=False, side=model.config.merge)


def _scaled(photo: Image.Image, resolution: int) -> tuple[int, int]:
    """Returns width and height of about resolution^2 pixels, in the photograph's shape."""
    scale = resolution / sqrt(photo.width * photo.height)
    if min(photo.size) * scale < 1:
        size = f"{photo.width} x {photo.height}"
        raise BadInput(f"--image must be a pixel wide or more with --resolutions {resolution}, got {size}")
    return round(photo.width * scale), round(photo.height * scale)
