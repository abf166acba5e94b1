"""Inputs for any model class of transformers, by rule: from the names of its forward method's arguments."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mmkernels.testing.models import Inputs
from mmkernels.testing.parts import left_padded, pixels, right_padded, tokens

LENGTH = 12
SHORT = LENGTH - 4
"""Tokens of the rows, and those of the second row that are not padding."""

_BINS = ("num_mel_bins", "n_mels", "feature_projection_input_dim", "feature_size", "input_feat_size", "input_dim")

PADDINGS = {"left": left_padded, "right": right_padded}


def candidates(model: Any, times: int = 1) -> Iterator[Inputs]:
    """Yields inputs that a model may take, drawn from PyTorch's global generator; the caller tries which it takes.

    A model that reads text and more is given the text alone, if it takes that.

    Args:
        times: by what texts and grids of patches are larger than the smallest. A text is no longer than the model's
            table of positions.
    """
    names = _arguments(model)
    main = model.main_input_name
    config = model.config
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or LENGTH * times
    length = max(LENGTH, min(LENGTH * times, positions))
    text = {"input_ids": _text(config, length)} if "input_ids" in names else {}
    target = {}
    if "decoder_input_ids" in names and (config.is_encoder_decoder or main != "input_ids"):
        target = {"decoder_input_ids": tokens(2, LENGTH * times // 2)}
    if text:
        yield text | target
        if "bbox" in names:
            yield text | target | {"bbox": torch.tensor([10, 20, 60, 90]).expand(2, length, 4)}
    grids = [name for name in ("grid_thw", "image_grid_thw") if name in names]
    if grids:
        for name in (main, "hidden_states", "pixel_values"):
            if name in names:
                grid = torch.tensor([[1, 4 * times, 6], [1, 4 * times, 4]])
                yield {name: _patches(config, int(grid.prod(1).sum())), grids[0]: grid}
    for name in dict.fromkeys((main, "pixel_values", "input_features", "input_values")):
        if name in names and name != "input_ids":
            for value in _media(name, config):
                media = {name: value} | target
                if f"{name}_mask" in names:
                    media[f"{name}_mask"] = torch.ones(2, value.shape[1], dtype=torch.long)
                yield media
                if text:
                    yield text | media


def _text(config: Any, length: int) -> Tensor:
    """Returns text that ends as a tokenizer ends it: some models pool at the end, and at the first place without one.

    [2, length]
    """
    ids = tokens(2, length)
    end = _first([config, *(getattr(config, key, None) for key in config.sub_configs)], "eos_token_id", default=None)
    if isinstance(end, int):
        ids[:, -1] = end
    return ids


def padded(inputs: Inputs, side: str) -> Inputs:
    """Returns the inputs with padding on this side of the second row, which the mask says."""
    return inputs | PADDINGS[side](inputs["input_ids"], [LENGTH, SHORT])


def can_pad(model: Any, inputs: Inputs) -> bool:
    return "attention_mask" in _arguments(model) and "input_ids" in inputs


def _arguments(model: Any) -> set[str]:
    return set(inspect.signature(model.forward).parameters)


def _media(name: str, config: Any) -> Iterator[Tensor]:
    """Yields images or sound in the shapes that models take."""
    parts = [config, *(getattr(config, key, None) for key in config.sub_configs)]
    size = _first(parts, "image_size", "img_size", default=32)
    height, width = size[-2:] if isinstance(size, list | tuple) else (size, size)
    channels = _first(parts, "num_channels", "in_channels", "in_chans", default=3)
    bins = _first(parts, *_BINS, default=16)
    if name.startswith("pixel_values"):
        frames = _first(parts, "num_frames", "frames_per_clip", default=2)
        image = torch.randn(2, channels, height, width)
        yield image
        yield image[:, None].expand(-1, frames, -1, -1, -1).contiguous()
        yield pixels(2, size=64)
    elif name == "input_features":
        positions = _first(parts, "max_source_positions", default=32)
        yield torch.randn(2, bins, 2 * positions)
        yield torch.randn(2, 64, bins)
    else:
        yield torch.randn(2, 2000)
        yield torch.randn(2, 1, 2000)
        yield torch.randn(2, 64, bins)


def _patches(config: Any, patches: int) -> Tensor:
    """Returns the patches of images, [patches, channels * frames * size * size]."""
    channels, frames, size = (
        _first([config], *names, default=default)
        for names, default in (
            (("in_channels", "num_channels"), 3),
            (("temporal_patch_size",), 1),
            (("patch_size",), 8),
        )
    )
    return torch.randn(patches, channels * frames * size * size)


def _first(parts: list[Any], *names: str, default: Any) -> Any:
    found = (getattr(part, name, None) for part in parts for name in names)
    return next((value for value in found if value), default)
