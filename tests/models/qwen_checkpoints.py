"""Small Qwen-VL models of transformers with random weights, and prompts with images and videos for them."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from math import prod
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mmkernels.testing.families import FAMILIES
from mmkernels.testing.models import build as build_model
from mmkernels.testing.models import randomise
from mmkernels.testing.parts import IMAGE, IMAGE_END, IMAGE_START, TEXT_IDS, VIDEO

PATCH = 3 * 2 * 8 * 8  # numbers of a patch
MERGED = 4  # patches of a token

# Whether transformers' positions follow parts of a second. Older versions round them down, as Qwen's own code does not.
FRACTIONS = "int(next(second_per_grid_ts))" not in inspect.getsource(transformers.Qwen2_5_VLModel.get_rope_index)

# Changes to the families' configurations: `text_config__x` sets x in text_config.
VARIANTS: dict[str, dict[str, Any]] = {
    "qwen2_vl": {},
    "qwen2_5_vl": {"vision_config__tokens_per_second": 3},
    "qwen3_vl": {},
    "qwen2_vl_tied": {"shard": True, "tie_word_embeddings": True, "text_config__num_key_value_heads": 4},
    "qwen2_5_vl_deep": {  # windows of 3 x 3 tokens, most layers within them
        "shard": True,
        "vision_config__depth": 4,
        "vision_config__fullatt_block_indexes": [0, 2],
        "vision_config__window_size": 48,
        "text_config__rms_norm_eps": 1e-3,
    },
    "qwen3_vl_tied": {  # features of layers that are not the first; heads together wider than the text
        "shard": True,
        "tie_word_embeddings": True,
        "vision_config__depth": 4,
        "vision_config__deepstack_visual_indexes": [1, 3],
        "vision_config__num_position_embeddings": 25,
        "text_config__head_dim": 32,
        "text_config__rope_parameters__mrope_section": [6, 5, 5],
    },
}
PLAIN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")

Image = tuple[int, int, int]
"""(t, h, w) in patches; t above 1: of a video."""
Row = Sequence["int | Image"]
"""A prompt: so many tokens of text, or an image; ``(1, h, w)`` is an image, ``(-t, h, w)`` a video of t steps."""


def build(variant: str) -> Any:
    """Returns transformers' model of a variant, with every parameter redrawn."""
    name = next(plain for plain in PLAIN if variant == plain or variant.startswith(f"{plain}_"))
    family = FAMILIES[name]
    return randomise(build_model(family.model, config(variant)).eval(), std=0.15)


def config(variant: str) -> dict[str, Any]:
    """Returns the arguments of transformers' configuration."""
    name = next(plain for plain in PLAIN if variant == plain or variant.startswith(f"{plain}_"))
    values = copy.deepcopy(FAMILIES[name].config)
    for key, value in VARIANTS[variant].items():
        *outer, last = key.split("__")
        target = values
        for section in outer:
            target = target[section]
        if key != "shard":
            target[last] = value
    return values


def prompts(variant: str, *rows: Row, padding: str = "left", seed: int = 0) -> dict[str, Any]:
    """Returns what a processor would return: inputs of both models. Seconds are given to a "qwen2_5_vl"."""
    generator = torch.Generator().manual_seed(seed)
    texts = [_text(variant, row, generator) for row in rows]
    ids, mask = (
        pad_sequence(part, batch_first=True, padding_side=padding)
        for part in (texts, [torch.ones_like(text) for text in texts])
    )
    found: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    found["mm_token_type_ids"] = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    media = [item for row in rows for item in row if not isinstance(item, int)]
    for kind, suffix, sign in (("image", "", 1), ("video", "_videos", -1)):
        grid = [(abs(t), h, w) for t, h, w in media if t * sign > 0]
        if grid:
            found[f"pixel_values{suffix}"] = torch.randn(sum(map(prod, grid)), PATCH, generator=generator)
            found[f"{kind}_grid_thw"] = torch.tensor(grid)
            if kind == "video" and variant.startswith("qwen2_5"):
                part = 0.37 if FRACTIONS else 0.0
                found["second_per_grid_ts"] = torch.tensor([1 + part + (1 - part) * n for n in range(len(grid))])
    return found


def _text(variant: str, row: Row, generator: torch.Generator) -> Tensor:
    draw = lambda count: torch.randint(TEXT_IDS.start, TEXT_IDS.stop, (count,), generator=generator)
    parts = []
    for item in row:
        if isinstance(item, int):
            parts.append(draw(item))
            continue
        t, h, w = item
        marker = IMAGE if t > 0 else VIDEO
        steps = abs(t) if variant.startswith("qwen3") else 1
        for step in range(steps):
            count = abs(t) * h * w // MERGED // steps
            parts.append(torch.tensor([IMAGE_START] + [marker] * count + [IMAGE_END]))
            if step + 1 < steps:
                parts.append(draw(2))  # the time of the next step
    return torch.cat(parts)


def other_pixels(given: dict[str, Any]) -> dict[str, Any]:
    """Returns the same prompts with other images and videos."""
    return {name: x.flip(0) if name.startswith("pixel_values") else x for name, x in given.items()}


def labelled(given: dict[str, Any]) -> dict[str, Any]:
    """Returns the inputs with labels: text is predicted, images and padding are not, nor a row's first token.

    (Padding on the left would predict that. Transformers gives its embedding no gradient then.)
    """
    ids, mask = given["input_ids"], given["attention_mask"]
    ignored = (mask == 0) | (ids == IMAGE) | (ids == VIDEO) | (mask.cumsum(1) == 1)
    return given | {"labels": ids.masked_fill(ignored, -100)}
