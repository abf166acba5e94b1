"""The GPU kernels of `max_sim`: tile sizes, what is compiled ahead of time, what is tuned."""

from __future__ import annotations

import torch
from torch import Generator

from mmkernels.ops.contrastive.max_sim.cases import tokens
from mmkernels.plan import TARGETS, Config, Limit, Plan, Problem, Search, Tiles, Variant
from mmkernels.spec import Inputs

_GRADS = ("query", "document")
_HOPPER = ("sm_90",)
# (query tokens, document tokens, warps, stages). Chosen by registers and shared memory; none has been timed on a GPU
# yet, see benchmarks/tune.py. A query token's gradient fetches rows one by one: few tokens, for many programs.
_SCORES = {"sm_80": (128, 64, 8, 3), "sm_90": (128, 128, 8, 3), "sm_100": (128, 128, 8, 3), "gfx942": (128, 64, 8, 2)}
_DOCUMENT = {"sm_90": (64, 128, 8, 3), "sm_100": (64, 128, 8, 3)}
_TILES: dict[str, Tiles] = {
    target: {
        "scores": (_SCORES.get(target, (64, 64, 4, 2)),),
        "query_gradient": ((16, 64, 4, 2),),
        "document_gradient": (_DOCUMENT.get(target, (32, 64, 4, 2)),),
    }
    for target in TARGETS
}


def _tokens(dim: int, *, lengths: bool = True, paired: bool = False) -> Inputs:
    query, document = (torch.empty(8, length, dim, dtype=torch.bfloat16) for length in (32, 1024))
    inputs: Inputs = {"query": query, "document": document, "paired": paired}
    return inputs | ({f"{name}_lengths": torch.full((8,), 16) for name in _GRADS} if lengths else {})


def _timed(g: Generator, dim: int) -> Inputs:
    return {"query": tokens(g, 32, 1024, dim), "document": tokens(g, 32, 1024, dim)}


def _heaviest(g: Generator, dim: int) -> Inputs:
    return _timed(g, dim) | {f"{name}_lengths": torch.full((32,), 1000) for name in _GRADS}


def _least_shared(config: Config, dim: int, size: int) -> int:
    """Of the pipeline over a document's tokens."""
    return (config.stages - 1) * config.block_k * min(512, dim * size)


def _search(*grads: str) -> Search:
    sizes = (64, 128)
    problem = Problem(_timed, grads)
    return Search(sizes, sizes, (4, 8), (2, 3, 4), (problem,), Problem(_heaviest, grads), _least_shared)


PLAN = Plan(
    tiles=_TILES,
    float32=(32, 32, 32),
    variants=(
        Variant("bfloat16 D128 max_sim", lambda: _tokens(128), _GRADS, TARGETS),
        Variant("bfloat16 D128 scores max_sim", lambda: _tokens(128, lengths=False), (), _HOPPER),
        Variant("bfloat16 D768 pairs max_sim", lambda: _tokens(768, paired=True), _GRADS, _HOPPER),
    ),
    limits=(Limit(variants=("* D128 *",), targets=_HOPPER),),
    searches={"scores": _search(), "document_gradient": _search("document")},
)
