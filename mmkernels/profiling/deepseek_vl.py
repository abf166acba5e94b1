"""DeepSeek-VL for the profiler: all images have the size that the model was made for, and as many tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mmkernels.models.blocks.encoder import Heads
from mmkernels.models.blocks.visual import Visual
from mmkernels.models.deepseek_vl import DeepSeekVL
from mmkernels.options import BadInput
from mmkernels.profiling.adapter import Stage
from mmkernels.profiling.encoder import output_of, returning
from mmkernels.profiling.options import Options
from mmkernels.profiling.reading import DECODE, PREFILL
from mmkernels.profiling.vision_language import Inputs, Layout, Size, VisionLanguageAdapter, read_config
from mmkernels.transformers_version import import_transformers

_FEW = {"vision_layers": 2, "text_layers": 2}
_NAMED = {
    "deepseek_vl": {
        "tiny": Size("tiny"),
        "small": Size("deepseek_vl_1.3b", _FEW, "published widths, 2 layers each of encoder and text"),
        "base": Size("deepseek_vl_1.3b"),
    },
    "deepseek_vl_hybrid": {
        "tiny": Size("tiny_hybrid"),
        "small": Size(
            "deepseek_vl_7b",
            _FEW | {"sam_layers": 3},  # windows twice, and a layer that attends to all of the image
            "published widths, 2 layers each of encoder and text, 3 of SAM",
        ),
        "base": Size("deepseek_vl_7b"),
    },
}
_HALF = [0.5, 0.5, 0.5]

Encoded = tuple[Tensor, Heads]


def _encode(model: Any, inputs: Inputs, state: None) -> Encoded:
    """Returns what the encoder makes of the images, with what reducers with scores need, which is the same work."""
    encoded: Encoded = model.vision.with_heads(inputs.images[0])
    return encoded


@contextmanager
def _encoded(vision: Any, state: Encoded) -> Iterator[None]:
    """Lets the encoder return at once what it has returned before."""
    with returning(vision, state[0]):
        vision.with_heads = lambda *_: state
        try:
            yield
        finally:
            del vision.with_heads


def _merge(model: Any, inputs: Inputs, state: Encoded) -> Visual:
    with _encoded(model.vision, state):
        visual: Visual = model.encode(*inputs.images)
    return visual


def _encode_large(model: Any, inputs: Inputs, state: Encoded) -> tuple[Encoded, Any]:
    with _encoded(model.vision, state):
        return state, output_of(model.sam, lambda: model.encode(*inputs.images))


def _merge_both(model: Any, inputs: Inputs, state: tuple[Encoded, Any]) -> Visual:
    with returning(model.sam, state[1]):
        return _merge(model, inputs, state[0])


class FixedSizeAdapter(VisionLanguageAdapter):
    """A `VisionLanguageModel` whose images all are squares of one size, and whose `vision` is a `VisionTransformer`.

    Attributes:
        processor: transformers' class that prepares images.
    """

    processor: str
    square = True
    stages: tuple[Stage, ...] = (
        Stage("encode", "the image encoder, all images", _encode, shared=True),
        Stage("merge", "the projector, and the reducer with its scores", _merge),
        PREFILL,
        DECODE,
    )

    def config(self, options: Options) -> Any:
        if options.folder is not None:
            return read_config(self.model_class, options)
        size = self.named[options.size or ""]
        return self.model_class.sizes[size.name]

    def layout(self, config: Any, photo: Image.Image, resolution: int | None) -> Layout:
        side = config.image_size // config.patch_size
        return Layout(side, side)

    def pixels(self, options: Options, config: Any, photos: list[Image.Image], layout: Layout) -> tuple[Any, ...]:
        made = getattr(import_transformers("preparing images"), self.processor)
        if options.folder is not None and (options.folder / "preprocessor_config.json").exists():
            processor = made.from_pretrained(str(options.folder))
        else:
            processor = made(image_mean=_HALF, image_std=_HALF, **self.processor_options(config))
        found = processor(photos, return_tensors="pt")
        names = ("pixel_values", "high_res_pixel_values")
        return tuple(torch.as_tensor(found[name]) for name in names if name in found)

    def processor_options(self, config: Any) -> dict[str, Any]:
        """Returns what the processor of a model of these sizes is made of."""
        return {"size": _square(config.image_size)}

    def text_ids(self, config: Any) -> int:
        return int(config.image_token_id)


class DeepSeekVLAdapter(FixedSizeAdapter):
    """DeepSeek-VL with one encoder, or the hybrid one with SAM beside it.

    Args:
        hybrid: which of them.
    """

    model_class = DeepSeekVL

    def __init__(self, *, hybrid: bool) -> None:
        self.hybrid = hybrid
        self.named = _NAMED["deepseek_vl_hybrid" if hybrid else "deepseek_vl"]
        self.processor = "DeepseekVLHybridImageProcessorPil" if hybrid else "DeepseekVLImageProcessorPil"
        if hybrid:
            encode, merge, *rest = FixedSizeAdapter.stages
            about = "the second image encoder, at the higher resolution, all images"
            self.stages = (
                encode,
                Stage("encode SAM", about, _encode_large, shared=True),
                Stage(merge.name, merge.about, _merge_both),
                *rest,
            )

    def config(self, options: Options) -> Any:
        config = super().config(options)
        if (config.sam_layers > 0) != self.hybrid:
            other = "deepseek_vl" if self.hybrid else "deepseek_vl_hybrid"
            raise BadInput(f"--model must be a checkpoint of {options.model}, got one of {other}")
        return config

    def processor_options(self, config: Any) -> dict[str, Any]:
        found = super().processor_options(config)
        return found | {"high_res_size": _square(config.sam_image_size)} if self.hybrid else found


def _square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}
