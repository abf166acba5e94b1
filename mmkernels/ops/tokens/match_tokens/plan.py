"""The GPU kernels of `match_tokens`: tile sizes, what is compiled ahead of time, what is tuned."""

from __future__ import annotations

import torch
from torch import Generator

from mmkernels.ops.tokens.match_tokens.spec import packed
from mmkernels.plan import TARGETS, Config, Limit, Plan, Problem, Search, Tiles, Variant
from mmkernels.spec import Inputs

# (rows, columns, warps, stages). Chosen by registers and shared memory; none has been timed on a GPU yet.
_BEST = {
    "sm_80": (128, 128, 8, 3),
    "sm_89": (128, 64, 8, 3),
    "sm_90": (128, 128, 8, 3),
    "sm_100": (128, 128, 8, 3),
    "gfx942": (128, 64, 8, 2),
}
_TIMED_IMAGES = (4096,) * 4
_TILES: dict[str, Tiles] = {target: {"best": (_BEST[target],), "sum": ((16, 64, 4, 1),)} for target in TARGETS}


def _images(tokens: int, dim: int, keep: float) -> Inputs:
    metric = torch.empty(2 * tokens, dim, dtype=torch.bfloat16)
    return {"metric": metric, "lengths": (tokens, tokens), "keep": keep}


def _timed(g: Generator, dim: int) -> Inputs:
    return {"metric": packed(g, _TIMED_IMAGES, dim), "lengths": _TIMED_IMAGES, "keep": 0.75}


def _least_shared(config: Config, dim: int, size: int) -> int:
    """Of the pipeline over the channels of both operands."""
    return (config.stages - 1) * (config.block_q + config.block_k) * min(128, dim * size)


PLAN = Plan(
    tiles=_TILES,
    float32=(64, 64, 64),
    variants=(
        Variant("bfloat16 D64 match", lambda: _images(2048, 64, 0.75)),
        Variant("bfloat16 D64 rounds match", lambda: _images(2048, 64, 0.4), (), ("sm_90",)),
    ),
    limits=(Limit(variants=("* D64 *",), targets=("sm_90",)),),
    searches={
        "best": Search(
            (64, 128), (64, 128), (4, 8), (2, 3), (Problem(_timed),), Problem(_timed), _least_shared
        )
    },
)  # fmt: skip
