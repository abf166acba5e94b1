"""The rows of bench_models.py: published widths, random weights, a few layers.

Widths are those that the model files name; layers, and the vocabulary where no loss is computed, are fewer, so that a
run takes seconds on two cores. Of Qwen2.5-VL's encoder one layer in four attends to the whole image (of the published
model one in eight).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
from models_pairs import Pair, blip2, internvl, qwen_vl
from models_targets import (
    AS_ONE_IMAGE,
    CAP,
    HALF_MEMORY,
    NAIVE,
    NO_ENCODER,
    NO_SLOWER,
    ONE_CALL,
    ONE_IMAGE,
    PEAK,
    SDPA,
    TEXT_AND_ATTENTION,
    TEXT_ONLY,
    THIRD_MEMORY,
    Limit,
)
from models_work import MAIN, BridgeStep, Encode, SecondTurn, TrainingStep, Work

from mmkernels.integrations.transformers import NAME
from mmkernels.targets import OURS
from mmkernels.testing.models import Inputs
from mmkernels.testing.parts import prompt, tokens

Grid = tuple[int, int, int]
"""Frames, rows and columns of an image's or video's patches."""


@dataclass(frozen=True)
class Case:
    """A pair of models, their inputs and work, and the row's targets.

    Args:
        id: in tables and JSON.
        pair: makes the models.
        inputs: draws keyword arguments from PyTorch's global generator, floats in float32, for a configuration: the
            row's own at `MAIN`, and those of other candidates on our side, by their names.
        work: what is timed.
        targets: on a CPU.
        subject: what is measured: `OURS`, or transformers' model on mmkernels' attention, `NAME`.
        baseline: over what the speed-up is: `SDPA`; or `NAIVE`, which runs too.
        others: further implementations of transformers' model that run, as `Work.use_attention` takes them.
    """

    id: str
    pair: Callable[[], Pair]
    inputs: Callable[[Any], dict[str, Inputs]]
    work: Work
    targets: tuple[Limit, ...]
    subject: str = OURS
    baseline: str = SDPA
    others: tuple[str, ...] = ()


# Inputs, under the names of transformers' processors.


def qwen_prompt(config: Any, grid: Grid, text: int, *, video: bool = False) -> Inputs:
    """Returns a prompt with one image or video before its text."""
    kind, marker = ("video", config.video_token_id) if video else ("image", config.image_token_id)
    inputs = prompt([prod(grid) // config.merge**2], before=4, after=text - 4, padding=0, batch=1, marker=marker)
    pixels = torch.randn(prod(grid), config.channels * config.patch_frames * config.patch_size**2)
    types = (inputs["input_ids"] == marker).long() * (2 if video else 1)
    inputs |= {f"{kind}_grid_thw": torch.tensor([grid]), "mm_token_type_ids": types}
    if video:
        return inputs | {"pixel_values_videos": pixels, "second_per_grid_ts": [1.0]}
    return inputs | {"pixel_values": pixels}


def _one_image(config: Any, *, side: int, text: int = 60) -> dict[str, Inputs]:
    patches = side // config.patch_size
    return {MAIN: qwen_prompt(config, (1, patches, patches), text)}


def _tiles(config: Any, *, tiles: int, text: int = 60) -> dict[str, Inputs]:
    count = (config.image_size // config.patch_size // config.merge) ** 2
    inputs = prompt([tiles * count], before=4, after=text - 4, padding=0, batch=1, marker=config.image_token_id)
    pixels = torch.randn(tiles, config.channels, config.image_size, config.image_size)
    return {MAIN: inputs | {"pixel_values": pixels}}


def _supervised(config: Any, *, side: int, length: int, share: float) -> dict[str, Inputs]:
    """Returns a prompt of `length` tokens, of which the last ones are to be predicted."""
    patches = side // config.patch_size
    inputs = qwen_prompt(config, (1, patches, patches), length - (patches // config.merge) ** 2)
    labels = inputs["input_ids"].clone()
    labels[:, : -round(share * length)] = -100
    return {MAIN: inputs | {"labels": labels}}


def _captions(config: Any, *, shortest: int, longest: int) -> dict[str, Inputs]:
    """Returns a batch of images, each with a caption to be predicted: one of each length, padded on the right."""
    lengths, queries = torch.arange(shortest, longest + 1), config.num_queries
    inputs = prompt([queries], before=0, after=longest, padding=0, batch=len(lengths), marker=config.image_token_id)
    mask = (torch.arange(queries + longest) < queries + lengths[:, None]).long()
    ids = inputs["input_ids"].where(mask == 1, config.pad_token_id)
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :queries] = -100
    pixels = torch.randn(len(lengths), config.channels, config.image_size, config.image_size)
    return {MAIN: {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels, "labels": labels}}


def _second_turn(config: Any, *, side: int, text: int) -> dict[str, Inputs]:
    question = {"input_ids": tokens(1, text)}
    first = _one_image(config, side=side)[MAIN]
    return {MAIN: question | {"first": first}, TEXT_ONLY: question}


def _video(config: Any, *, frames: int, side: int, text: int = 60) -> dict[str, Inputs]:
    """Returns a video, and an image of as many patches."""
    steps, patches = frames // config.patch_frames, side // config.patch_size
    wide = (1, steps // 2 * patches, 2 * patches)
    return {
        MAIN: qwen_prompt(config, (steps, patches, patches), text, video=True),
        ONE_IMAGE: qwen_prompt(config, wide, text),
    }


# Rows.

_SMALL = 1000  # tokens of the vocabulary
_WINDOWED = {"vision_layers": 4, "full_layers": (3,)}
_QWEN2_5 = partial(qwen_vl, "qwen2_5_3b")
_ENCODER = partial(_QWEN2_5, **_WINDOWED, text_layers=1, vocab_size=_SMALL)
_OF_ENCODER = (CAP, ONE_CALL, PEAK, NO_SLOWER)

CASES = (
    Case("Qwen2.5-VL-3B, 1036 x 1036", _ENCODER, partial(_one_image, side=1036), Encode(), _OF_ENCODER),
    Case(
        "transformers' Qwen2.5-VL-3B, 1036 x 1036",
        _ENCODER,
        partial(_one_image, side=1036),
        Encode(),
        _OF_ENCODER,
        subject=NAME,
    ),
    Case(
        "InternVL3-1B, 5 tiles",
        partial(internvl, "internvl3_1b", vision_layers=4, text_layers=4, vocab_size=_SMALL),
        partial(_tiles, tiles=5),
        Work(),
        (CAP,),
    ),
    Case(
        "Qwen3-VL-2B, 1024 x 1024",
        partial(qwen_vl, "qwen3_2b", vision_layers=4, deep_layers=(0, 1, 2), text_layers=4, vocab_size=_SMALL),
        partial(_one_image, side=1024),
        Work(),
        (CAP,),
    ),
    Case(
        "Qwen2.5-VL-3B, 10 % of 1,024 supervised",
        partial(_QWEN2_5, vision_layers=2, full_layers=(1,), text_layers=3),
        partial(_supervised, side=448, length=1024, share=0.1),
        TrainingStep(),
        (CAP, HALF_MEMORY),
    ),
    # Captions as long as COCO's: ten words or so, and the end.
    Case(
        "BLIP-2 small, stage 2, 16 captions",
        partial(blip2, "small"),
        partial(_captions, shortest=6, longest=21),
        BridgeStep(),
        (CAP, THIRD_MEMORY),
        baseline=NAIVE,
    ),
    Case(
        "Qwen2.5-VL-3B, 32 tokens after an image",
        partial(_QWEN2_5, vision_layers=1, full_layers=(0,), text_layers=4, vocab_size=_SMALL),
        partial(_second_turn, side=1036, text=32),
        SecondTurn(),
        (NO_ENCODER, TEXT_AND_ATTENTION),
    ),
    Case(
        "Qwen2.5-VL-3B, 16 frames of 252 x 252",
        partial(_QWEN2_5, **_WINDOWED, text_layers=4, vocab_size=_SMALL),
        partial(_video, frames=16, side=252),
        Work(),
        (AS_ONE_IMAGE,),
    ),
)
