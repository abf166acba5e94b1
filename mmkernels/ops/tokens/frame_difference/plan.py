"""The GPU kernel of `frame_difference`: tile sizes, what is compiled ahead of time, what is tuned."""

from __future__ import annotations

import torch
from torch import Generator

from mmkernels.ops.tokens import plans
from mmkernels.plan import TARGETS, Plan, Problem, Search, Variant
from mmkernels.spec import Inputs

# (tokens, channels, warps, stages). None has been timed on a GPU yet.
_TILE = (16, 256, 8, 2)


def _inputs(dim: int, dtype: torch.dtype, *, images: int = 0) -> Inputs:
    shape = (images, 4 * 196, dim) if images else (4 * 196, dim)
    return {"x": torch.empty(shape, dtype=dtype), "grid": (4, 14, 14) if images else ((4, 14, 14),)}


def _timed(g: Generator, dim: int) -> Inputs:
    wide = dim if dim < 256 else 1152
    return {"x": torch.randn(64 * 196, wide, generator=g, dtype=torch.float64), "grid": ((64, 14, 14),)}


PLAN = Plan(
    tiles={target: {"difference": (_TILE,)} for target in TARGETS},
    float32=(128, 128, 128),
    variants=(
        Variant("bfloat16 C1152", lambda: _inputs(1152, torch.bfloat16)),
        Variant("bfloat16 C1152 batched", lambda: _inputs(1152, torch.bfloat16, images=2)),
        Variant("float32 C1000", lambda: _inputs(1000, torch.float32), targets=("sm_90",)),
        Variant("float16 C64", lambda: _inputs(64, torch.float16), targets=("sm_90",)),
    ),
    limits=(plans.NO_SPILLS,),
    searches={
        "difference": Search((16, 32), (128, 256, 512), (4, 8), (1, 2), (Problem(_timed),), Problem(_timed)),
    },
)
