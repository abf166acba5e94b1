"""BLIP-2 for the profiler: the Q-Former's queries are the visual tokens of an image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from mmkernels.models.blip2 import BLIP2
from mmkernels.models.blip2_config import SIZES
from mmkernels.models.blocks.images import to_pixels
from mmkernels.models.blocks.visual import Visual
from mmkernels.options import BadInput
from mmkernels.profiling.adapter import Stage
from mmkernels.profiling.options import Options, Row
from mmkernels.profiling.reading import DECODE, DECODE_TOKENS, PREFILL, Prompt, random_text, with_markers

_NAMED = {"tiny": "tiny", "small": "small", "base": "opt_2.7b"}


@dataclass(frozen=True, kw_only=True)
class Inputs(Prompt):
    """A prompt, and its images ``[N, 3, S, S]``."""

    pixel_values: Tensor


def _encode(model: BLIP2, inputs: Inputs, state: None) -> Tensor:
    return model.encode_vision(inputs.pixel_values)


def _resample(model: BLIP2, inputs: Inputs, state: Tensor) -> Visual:
    return model.encode(image_features=state)


class BLIP2Adapter:
    sizes = tuple(_NAMED)
    about: Mapping[str, str] = {}
    total = "first token"
    square = True
    stages: tuple[Stage, ...] = (
        Stage("encode", "the image encoder, all images", _encode),
        Stage("resample", "the Q-Former, and its queries projected to tokens of the language model", _resample),
        PREFILL,
        DECODE,
    )

    def check(self, options: Options) -> None:
        assert options.images is not None and options.text_length is not None and options.tokens is not None
        most = SIZES[_NAMED[options.size or ""]].text_length
        tokens = options.tokens[-1]
        length = options.images * tokens + options.text_length + DECODE_TOKENS
        if length > most:
            raise BadInput(
                f"--tokens must leave the prompt and {DECODE_TOKENS} tokens more within {most}, got {length} by "
                f"{tokens}, --images {options.images} and --text-length {options.text_length}"
            )

    def build(self, options: Options, row: Row) -> nn.Module:
        return BLIP2.from_size(_NAMED[options.size or ""], num_queries=row, seed=options.seed)

    def inputs(self, options: Options, model: BLIP2, photos: list[Image.Image], row: Row) -> Inputs:
        assert options.images is not None and options.text_length is not None
        config, weight = model.config, model.head.weight
        marker = config.image_token_id
        text = random_text(marker, marker, length=options.text_length, images=options.images, seed=options.seed)
        ids = with_markers(text, marker, config.num_queries)
        pixels = to_pixels(photos, config.image_size).to(weight)
        return Inputs(input_ids=ids.to(weight.device), text_ids=marker, pixel_values=pixels)

    def logits(self, model: BLIP2, inputs: Inputs) -> Tensor:
        out: Tensor = model(inputs.input_ids, inputs.pixel_values).logits
        return out

    def loss(self, model: BLIP2, inputs: Inputs) -> Tensor:
        loss: Tensor = model(inputs.input_ids, inputs.pixel_values, labels=_labels(model, inputs)).loss
        return loss

    def naive_loss(self, model: BLIP2, inputs: Inputs) -> Tensor:
        logits, labels = self.logits(model, inputs), _labels(model, inputs)
        return F.cross_entropy(logits[0, :-1].float(), labels[0, 1:])


def _labels(model: Any, inputs: Inputs) -> Tensor:
    """Every token is learned but the images' markers."""
    return inputs.input_ids.masked_fill(inputs.input_ids == model.config.image_token_id, -100)
