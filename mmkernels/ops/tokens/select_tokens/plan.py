"""The GPU kernels of `select_tokens`: tile sizes, what is compiled ahead of time, what is tuned."""

from __future__ import annotations

import torch
from torch import Generator

from mmkernels.ops.tokens import plans
from mmkernels.plan import Plan, Problem, Search, Variant
from mmkernels.spec import Inputs

_TOKENS = 1024
_SUM = (16, 256, 4, 1)  # rows, columns, warps, stages. Not timed on a GPU yet.


def _inputs(dim: int, dtype: torch.dtype, merge: bool | str = False, over: str = "image") -> Inputs:
    x = torch.empty(_TOKENS, dim, dtype=dtype)
    lengths = (_TOKENS // 4, _TOKENS - _TOKENS // 4)
    return {"x": x, "lengths": lengths, "keep": 0.25, "scores": torch.zeros(_TOKENS), "merge_rest": merge, "over": over}


def _timed(g: Generator, dim: int, merge: bool | str = "mean") -> Inputs:
    wide, tokens = dim if dim < 256 else 1024, 16 * _TOKENS
    random = lambda *size: torch.randn(size, generator=g, dtype=torch.float64)
    lengths = (tokens // 4,) * 4
    return {"x": random(tokens, wide), "lengths": lengths, "keep": 0.25, "scores": random(tokens), "merge_rest": merge}


_X = ("x",)
_MERGED = (Problem(_timed),)

PLAN = Plan(
    tiles={
        target: {**moving, "nearest": plans.PRODUCT_TILES[target], "sum": (_SUM,)}
        for target, moving in plans.moving_tiles("compose").items()
    },
    float32=(64, 64, 64),
    variants=(
        Variant("bfloat16 D1024 training", lambda: _inputs(1024, torch.bfloat16), _X),
        Variant("bfloat16 D1024 merged training", lambda: _inputs(1024, torch.bfloat16, "mean"), _X),
        Variant("float32 D1000 merged budget", lambda: _inputs(1000, torch.float32, "mean", "batch"), _X, ("sm_90",)),
        Variant("float16 D64 merged training", lambda: _inputs(64, torch.float16, "mean"), _X, ("sm_90",)),
    ),
    limits=(plans.NO_SPILLS,),
    searches={
        "nearest": Search((32, 64, 128), (32, 64, 128), (4, 8), (2, 3, 4), _MERGED, Problem(_timed)),
        "sum": Search((16, 32), (64, 128, 256, 512), (4, 8), (1,), _MERGED, Problem(_timed)),
    },
)
