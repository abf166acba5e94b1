"""The GPU kernels of `token_similarity`: tile sizes, what is compiled ahead of time, what is tuned."""

from __future__ import annotations

import torch
from torch import Generator

from mmkernels.ops.tokens import plans
from mmkernels.plan import Plan, Problem, Search, Variant
from mmkernels.spec import Inputs

# (rows, columns, warps, stages). None has been timed on a GPU yet.
_ROWS = (16, 256, 8, 2)


def _inputs(dim: int, dtype: torch.dtype, reduce: str) -> Inputs:
    x, others = torch.empty(1024, dim, dtype=dtype), torch.empty(300, dim, dtype=dtype)
    return {"x": x, "lengths": (256, 768), "others": others, "other_lengths": (32, 268), "reduce": reduce}


def _timed(g: Generator, dim: int, reduce: str) -> Inputs:
    wide, count = (dim, 2048) if dim < 256 else (4096, 256)
    random = lambda rows: torch.randn(4 * rows, wide, generator=g, dtype=torch.float64)
    return {
        "x": random(2880), "lengths": (2880,) * 4, "others": random(count), "other_lengths": (count,) * 4,
        "reduce": reduce,
    }  # fmt: skip


_MEAN = Problem(lambda g, dim: _timed(g, dim, "mean"))
_MAX = Problem(lambda g, dim: _timed(g, dim, "max"))

PLAN = Plan(
    tiles={target: {"row": (_ROWS,), "product": tiles} for target, tiles in plans.PRODUCT_TILES.items()},
    float32=(64, 64, 64),
    variants=(
        Variant("bfloat16 C4096 mean", lambda: _inputs(4096, torch.bfloat16, "mean")),
        Variant("bfloat16 C4096 max", lambda: _inputs(4096, torch.bfloat16, "max")),
        Variant("float32 C1000 min", lambda: _inputs(1000, torch.float32, "min"), targets=("sm_90",)),
        Variant("float16 C64 mean", lambda: _inputs(64, torch.float16, "mean"), targets=("sm_90",)),
    ),
    limits=(plans.NO_SPILLS,),
    searches={
        "row": Search((16, 32), (128, 256, 512), (4, 8), (1, 2), (_MEAN,), _MEAN),
        "product": Search((32, 64, 128), (32, 64, 128), (4, 8), (2, 3, 4), (_MAX,), _MAX),
    },
)
