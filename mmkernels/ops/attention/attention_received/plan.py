"""The GPU kernels of `attention_received`: tile sizes, what is compiled ahead of time, what is tuned."""

from __future__ import annotations

from mmkernels.ops.attention import plans
from mmkernels.plan import Plan, Problem, Search

# (rows, keys, warps, stages) for head dims up to 64, 128 and 256.
_HOPPER = {"received": ((64, 128, 8, 3), (64, 128, 8, 2), (64, 64, 8, 2))}
_AMPERE = {"received": ((64, 64, 4, 3), (64, 64, 4, 2), (64, 32, 8, 2))}
_CDNA = {"received": ((64, 64, 4, 1), (64, 64, 4, 1), (64, 32, 4, 1))}

PLAN = Plan(
    tiles={"sm_80": _AMPERE, "sm_89": _AMPERE, "sm_90": _HOPPER, "sm_100": _HOPPER, "gfx942": _CDNA},
    float32=plans.FLOAT32,
    variants=plans.score_variants("received"),
    limits=(plans.NO_SPILLS,),
    searches={
        "received": Search(
            (32, 64, 128), (64, 128), (4, 8), (1, 2, 3), (Problem(plans.long_scores),), Problem(plans.few_scores),
            plans.least_shared,
        )
    },
    why_not=plans.why_not,
)  # fmt: skip
