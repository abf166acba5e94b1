"""InternVL for the profiler: images are cut into tiles, and a thumbnail goes with those of more than one tile."""

from __future__ import annotations

from math import log
from typing import Any

import torch
from PIL import Image

from mmkernels.models.internvl import InternVL
from mmkernels.models.internvl_config import SIZES, InternVLConfig
from mmkernels.options import BadInput
from mmkernels.profiling.options import Options
from mmkernels.profiling.vision_language import Layout, Size, VisionLanguageAdapter, read_config
from mmkernels.transformers_version import import_transformers

_MEAN, _STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
"""Of ImageNet's pixels, as in InternVL's processors."""

_NAMED = {
    "tiny": Size("tiny"),
    "small": Size(
        "internvl3_1b",
        {"vision_layers": 2, "text_layers": 2},
        "published widths, 2 layers each of encoder and text",
    ),
    "base": Size("internvl3_1b"),
}


class InternVLAdapter(VisionLanguageAdapter):
    model_class = InternVL
    named = _NAMED

    def config(self, options: Options) -> InternVLConfig:
        if options.folder is not None:
            config: InternVLConfig = read_config(InternVL, options)
            return config
        return SIZES[self.named[options.size or ""].name]

    def layout(self, config: InternVLConfig, photo: Image.Image, resolution: int | None) -> Layout:
        """The arrangement of tiles that is nearest to the photograph's shape, of at most resolution^2 pixels.

        If several are as near, it is the one of the most tiles. Below the size of a tile it is one smaller tile.
        """
        assert resolution is not None
        unit = config.patch_size * config.merge
        if resolution < unit:
            raise BadInput(f"--resolutions must be at least {unit}, the side of a token in pixels; got {resolution}")
        side = min(resolution, config.image_size) // unit
        most = (resolution // config.image_size) ** 2 if resolution > config.image_size else 1
        shape = log(photo.height / photo.width)
        choices = ((down, across) for down in range(1, most + 1) for across in range(1, most // down + 1))
        down, across = min(choices, key=lambda size: (abs(log(size[0] / size[1]) - shape), -size[0] * size[1]))
        return Layout(side, side, down, across, thumbnail=down * across > 1)

    def pixels(
        self, options: Options, config: InternVLConfig, photos: list[Image.Image], layout: Layout
    ) -> tuple[Any, ...]:
        side = layout.rows * config.patch_size * config.merge
        tiles = []
        for photo in photos:
            whole = photo.resize((layout.across * side, layout.down * side), Image.Resampling.BICUBIC)
            for down in range(layout.down):
                for across in range(layout.across):
                    tiles.append(whole.crop((across * side, down * side, (across + 1) * side, (down + 1) * side)))
            if layout.thumbnail:
                tiles.append(photo.resize((side, side), Image.Resampling.BICUBIC))
        made = import_transformers("preparing images").GotOcr2ImageProcessorPil
        if options.folder is not None and (options.folder / "preprocessor_config.json").exists():
            processor = made.from_pretrained(str(options.folder))
        else:
            processor = made(image_mean=_MEAN, image_std=_STD)
        found = processor(tiles, do_resize=False, crop_to_patches=False, return_tensors="pt")
        return torch.as_tensor(found["pixel_values"]), [layout.tiles] * len(photos)

    def text_ids(self, config: InternVLConfig) -> int:
        return config.image_token_id
