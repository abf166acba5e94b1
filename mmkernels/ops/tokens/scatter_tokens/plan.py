"""The GPU kernels of `scatter_tokens`: tile sizes, what is compiled ahead of time, what is tuned."""

from __future__ import annotations

import torch
from torch import Generator

from mmkernels.ops.tokens import plans
from mmkernels.plan import Plan, Problem, Search, Variant
from mmkernels.spec import Inputs

_BOTH = ("embeddings", "visual")


def _inputs(dim: int, dtype: torch.dtype, mode: str, *, mask: bool = False) -> Inputs:
    embeddings, visual = torch.empty(2, 512, dim, dtype=dtype), torch.empty(576, dim, dtype=dtype)
    positions = torch.zeros(2, 512, dtype=torch.bool) if mask else torch.arange(576)
    return {"embeddings": embeddings, "visual": visual, "positions": positions, "mode": mode}


def _timed(g: Generator, dim: int) -> Inputs:
    wide = dim if dim < 256 else 4096
    inputs = _inputs(wide, torch.float64, "replace")
    return inputs | {name: torch.randn(inputs[name].shape, generator=g, dtype=torch.float64) for name in _BOTH}


PLAN = Plan(
    tiles=plans.moving_tiles("compose"),
    float32=plans.FLOAT32,
    variants=(
        Variant("bfloat16 D1024 replace training", lambda: _inputs(1024, torch.bfloat16, "replace"), _BOTH),
        Variant("float32 D1000 add mask", lambda: _inputs(1000, torch.float32, "add", mask=True), _BOTH, ("sm_90",)),
        Variant("float16 D64 add training", lambda: _inputs(64, torch.float16, "add"), _BOTH, ("sm_90",)),
    ),
    limits=(plans.NO_SPILLS,),
    searches={"compose": Search((16, 32), (64, 128, 256, 512), (4, 8), (1,), (Problem(_timed),), Problem(_timed))},
)
