"""The GPU kernels of `select_diverse`: tile sizes, what is compiled ahead of time."""

from __future__ import annotations

import torch

from mmkernels.plan import TARGETS, Plan, Variant
from mmkernels.spec import Inputs

# (tokens, channels, warps, stages). "nearest" multiplies tiles of tokens with each other.
_TILES = {"step": ((32, 128, 4, 2),), "nearest": ((64, 64, 4, 2),)}
_CDNA = {"step": ((32, 128, 4, 1),), "nearest": ((64, 64, 4, 1),)}


def _inputs(method: str, *, quality: bool = False, dtype: torch.dtype = torch.bfloat16) -> Inputs:
    inputs: Inputs = {"x": torch.empty(576, 1024, dtype=dtype), "lengths": (576,), "keep": (2,), "method": method}
    return inputs | ({"quality": torch.empty(576)} if quality else {})


PLAN = Plan(
    tiles={target: _CDNA if target == "gfx942" else _TILES for target in TARGETS},
    float32=(32, 32, 32),
    variants=(
        Variant("bfloat16 determinant", lambda: _inputs("determinant")),
        Variant("bfloat16 qualities", lambda: _inputs("determinant", quality=True)),
        Variant("bfloat16 distance", lambda: _inputs("distance")),
        Variant("float32 distance", lambda: _inputs("distance", dtype=torch.float32), targets=("sm_90",)),
    ),
)
