"""The GPU kernels of `retrieval_ranks`: tile sizes, what is compiled ahead of time, what is tuned."""

from __future__ import annotations

from torch import Generator

from mmkernels.ops.contrastive import plans
from mmkernels.plan import Limit, Plan, Problem, Variant
from mmkernels.spec import Inputs


def _timed(g: Generator, dim: int) -> Inputs:
    return plans.gallery(plans.timed_pairs(g, dim))


def _heavy(g: Generator, dim: int) -> Inputs:
    return plans.gallery(plans.heavy_pairs(g, dim))


PLAN = Plan(
    tiles=plans.product_tiles("ranks"),
    float32=plans.FLOAT32,
    variants=(Variant("bfloat16 D768 none ranks", lambda: plans.gallery(plans.features(768)), (), ("sm_90",)),),
    limits=(Limit(("ranks_kernel",), ("* D768 none *",), ("sm_90",)),),
    searches={"ranks": plans.product_search(_timed, Problem(_heavy))},
)
