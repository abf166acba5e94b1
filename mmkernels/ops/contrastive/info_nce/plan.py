"""The GPU kernels of `info_nce`: tile sizes, what is compiled ahead of time, what is tuned."""

from __future__ import annotations

import torch
from torch import Generator

from mmkernels.ops.contrastive import cases, plans
from mmkernels.plan import TARGETS, Limit, Plan, Problem, Variant
from mmkernels.spec import Inputs

_GRADS = ("image", "text", "logit_scale")
_HOPPER = ("sm_90",)


def _hidden() -> Inputs:
    """By place; ids hide pairs; several queries an image."""
    return plans.features(768, queries=4) | plans.ids() | {"same_id": "ignore"}


def _everything() -> Inputs:
    """By id, with all that there is."""
    inputs = plans.features(768) | plans.ids() | {"label_smoothing": 0.1, "return_stats": True}
    return inputs | {"hard_texts": inputs["text"]}


def _with_hard_ids(inputs: Inputs) -> Inputs:
    """With a queue of texts whose ids count."""
    hard = {"hard_texts": inputs["text"], "hard_text_ids": inputs["text_ids"]}
    return inputs | hard


def _heaviest(*grads: str, stats: bool = False) -> Problem:
    def make(g: Generator, dim: int) -> Inputs:
        inputs = plans.heavy_pairs(g, dim)
        size = len(inputs["image"])
        inputs["image_ids"] = torch.arange(size) // 2
        return inputs | {"hard_texts": cases.features(g, size, dim), "label_smoothing": 0.1, "return_stats": stats}

    return Problem(make, grads)


PLAN = Plan(
    tiles=plans.product_tiles("contrastive", "contrastive_grad"),
    float32=plans.FLOAT32,
    variants=(
        Variant("bfloat16 D768 place info_nce", lambda: plans.features(768), _GRADS, TARGETS),
        Variant("bfloat16 D768 everything info_nce", _everything, (*_GRADS, "hard_texts"), _HOPPER),
        Variant("bfloat16 D768 hidden info_nce", _hidden, _GRADS, _HOPPER),
        Variant(
            "bfloat16 D768 everything, hard ids info_nce",
            lambda: _with_hard_ids(_everything()),
            (*_GRADS, "hard_texts"),
            _HOPPER,
        ),
        Variant(
            "bfloat16 D768 hidden, hard ids info_nce",
            lambda: _with_hard_ids(_hidden()),
            (*_GRADS, "hard_texts"),
            _HOPPER,
        ),
        Variant("float32 D100 place info_nce", lambda: plans.features(100, torch.float32), _GRADS, _HOPPER),
    ),
    # Where the op's time goes: nearly all tiles of nearly all calls.
    limits=(Limit(("info_nce_kernel", "info_nce_gradient_kernel"), ("* D768 place *",), _HOPPER),),
    searches={
        "contrastive": plans.product_search(plans.timed_pairs, _heaviest(stats=True)),
        "contrastive_grad": plans.product_search(plans.timed_pairs, _heaviest("image", "text"), ("image", "text")),
    },
)
