"""The GPU kernels of `unmerge_tokens`: tile sizes and what is compiled ahead of time."""

from __future__ import annotations

import torch

from mmkernels.plan import TARGETS, Limit, Plan, Tiles, Variant
from mmkernels.spec import Inputs

# (1, channels, warps, stages): 16 bytes a thread of bfloat16. Not timed on a GPU yet.
_MOVE = ((1, 64, 1, 1), (1, 128, 1, 1), (1, 1024, 4, 1))
_TILES: dict[str, Tiles] = {target: dict.fromkeys(("sum", "spread"), _MOVE) for target in TARGETS}


def _merged() -> Inputs:
    return {"x": torch.empty(512, 1024, dtype=torch.bfloat16), "assignment": torch.arange(1024) // 2}


PLAN = Plan(
    tiles=_TILES,
    float32=(1024, 1024, 1024),
    variants=(Variant("bfloat16 C1024 unmerge training", _merged, ("x",)),),
    limits=(Limit(),),
)
