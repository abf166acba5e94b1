"""The GPU kernels of `unmerge_tokens`: tile sizes and what is compiled ahead of time."""

from __future__ import annotations

import torch

from mmkernels.plan import TARGETS, Limit, Plan, Tiles, Variant
from mmkernels.spec import Inputs

# (rows, channels, warps, stages): a program has one row, whatever the first says. Not timed on a GPU yet.
_MOVE = ((16, 64, 4, 1), (16, 128, 4, 1), (16, 1024, 4, 1))
_TILES: dict[str, Tiles] = {target: dict.fromkeys(("sum", "spread"), _MOVE) for target in TARGETS}


def _merged() -> Inputs:
    return {"x": torch.empty(512, 1024, dtype=torch.bfloat16), "assignment": torch.arange(1024) // 2}


PLAN = Plan(
    tiles=_TILES,
    float32=(1024, 1024, 1024),
    variants=(Variant("bfloat16 C1024 unmerge training", _merged, ("x",)),),
    limits=(Limit(),),
)
