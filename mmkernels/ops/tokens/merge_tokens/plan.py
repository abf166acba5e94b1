"""The GPU kernels of `merge_tokens`: tile sizes and what is compiled ahead of time."""

from __future__ import annotations

import torch

from mmkernels.plan import TARGETS, Limit, Plan, Tiles, Variant
from mmkernels.spec import Inputs

# (rows, channels, warps, stages): a program has one row, whatever the first says. Not timed on a GPU yet.
_MOVE = ((16, 64, 4, 1), (16, 128, 4, 1), (16, 1024, 4, 1))
_TILES: dict[str, Tiles] = {target: dict.fromkeys(("sum", "spread", "dots"), _MOVE) for target in TARGETS}


def _given() -> Inputs:
    """The matching's kernels are compiled as `match_tokens`'."""
    x = torch.empty(1024, 1024, dtype=torch.bfloat16)
    assignment = torch.arange(1024) // 2
    return {"x": x, "lengths": (1024,), "keep": 512, "assignment": assignment, "sizes": torch.ones(1024)}


PLAN = Plan(
    tiles=_TILES,
    float32=(1024, 1024, 1024),
    variants=(Variant("bfloat16 C1024 merge training", _given, ("x", "sizes")),),
    limits=(Limit(),),
)
