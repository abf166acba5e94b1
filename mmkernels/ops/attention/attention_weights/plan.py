"""The GPU kernels of `attention_weights`: tile sizes, what is compiled ahead of time, what is tuned."""

from __future__ import annotations

from mmkernels.ops.attention import plans
from mmkernels.plan import TARGETS, Plan, Problem, Search

# (rows, keys, warps, stages) for head dims up to 64, 128 and 256, the same on every architecture.
_TILES = {"weights": ((64, 128, 4, 1), (64, 128, 8, 1), (64, 64, 8, 1))}

PLAN = Plan(
    tiles=dict.fromkeys(TARGETS, _TILES),
    float32=plans.FLOAT32,
    variants=plans.score_variants("weights"),
    limits=(plans.NO_SPILLS,),
    searches={
        "weights": Search(
            (32, 64, 128), (64, 128), (4, 8), (1, 2), (Problem(plans.long_scores),), Problem(plans.few_scores),
            plans.least_shared,
        )
    },
    why_not=plans.why_not,
)  # fmt: skip
