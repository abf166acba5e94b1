"""The GPU kernels of `pool_tokens`: tile sizes, what is compiled ahead of time."""

from __future__ import annotations

from typing import Any

import torch

from mmkernels.plan import TARGETS, Plan, Variant
from mmkernels.spec import Inputs

MOST_CHANNELS = 1 << 14
"""Of mode "attention", whose backward pass holds a token in registers."""


def _why_not(args: Any) -> str | None:
    if args.mode == "attention" and args.x.shape[-1] > MOST_CHANNELS:
        return f'mode "attention" of more than {MOST_CHANNELS} channels'
    return None


def _inputs(**more: Any) -> Inputs:
    inputs: Inputs = {"x": torch.empty(64, 1024, dtype=torch.bfloat16), "grid": ((1, 8, 8),), **more}
    if more.get("mode") == "attention":
        inputs["scores"] = torch.empty(64, dtype=torch.bfloat16)
    return inputs


PLAN = Plan(
    # block_k: the most channels of a tile. None has been timed on a GPU yet.
    tiles={target: {"pool": ((1, 1024, 4, 1),), "token": ((1, MOST_CHANNELS, 8, 1),)} for target in TARGETS},
    float32=(MOST_CHANNELS,) * 3,
    variants=(
        Variant("bfloat16 C1024 mean", lambda: _inputs(window=(1, 2, 2)), ("x",)),
        Variant("bfloat16 C1024 max", lambda: _inputs(window=(1, 2, 2), mode="max"), ("x",)),
        Variant("bfloat16 C1024 attention", lambda: _inputs(size=(1, 3, 3), mode="attention"), ("x", "scores")),
    ),
    why_not=_why_not,
)
