"""The GPU kernels of `sigmoid_contrastive`: tile sizes, what is compiled ahead of time, what is tuned."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator

from mmkernels.ops.contrastive import plans
from mmkernels.plan import Limit, Plan, Problem, Variant
from mmkernels.spec import Inputs

_GRADS = ("image", "text", "logit_scale", "logit_bias")


def _place(dim: int) -> Callable[[], Inputs]:
    return lambda: plans.features(dim) | {"logit_bias": torch.ones(())}


def _timed(g: Generator, dim: int) -> Inputs:
    return plans.timed_pairs(g, dim) | {"logit_bias": torch.tensor(-10.0)}


def _heavy(g: Generator, dim: int) -> Inputs:
    inputs = plans.heavy_pairs(g, dim)
    return inputs | {"image_ids": torch.arange(len(inputs["image"])) // 2, "logit_bias": torch.tensor(-10.0)}


PLAN = Plan(
    tiles=plans.product_tiles("sigmoid"),
    float32=plans.FLOAT32,
    variants=(
        Variant("bfloat16 D768 place sigmoid", _place(768), _GRADS, ("sm_89", "sm_90")),
        Variant("bfloat16 D100 place sigmoid", _place(100), _GRADS, ("sm_90",)),
    ),
    limits=(Limit(("sigmoid_kernel",), ("* D768 place *",), ("sm_90",)),),
    searches={
        "sigmoid": plans.product_search(_timed, Problem(_heavy, ("image", "text")), ("image", "text"), whole=True)
    },
)
