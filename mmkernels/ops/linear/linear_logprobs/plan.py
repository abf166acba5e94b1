"""The GPU kernels of `linear_logprobs`: tile sizes, what is compiled ahead of time, what is tuned."""

from __future__ import annotations

import torch

from mmkernels.ops.linear import plans
from mmkernels.plan import TARGETS, Limit, Plan, Variant
from mmkernels.spec import Inputs

_NAMES = ("hidden", "weight")
_EVERYTHING: Inputs = {"softcap": 30.0, "temperature": 0.7, "return_entropy": True, "return_correct": True}


def _everything() -> Inputs:
    """With a weight whose rows are not contiguous."""
    bias = torch.empty(32_000)
    return plans.variant(_NAMES, 2304, transposed=True, bias=bias, **_EVERYTHING)


PLAN = Plan(
    tiles=plans.product_tiles(),
    float32=plans.FLOAT32,
    variants=(
        Variant("bfloat16 D4096 linear_logprobs", lambda: plans.variant(_NAMES, 4096), _NAMES, TARGETS),
        Variant(
            "bfloat16 D4096 entropy linear_logprobs",
            lambda: plans.variant(_NAMES, 4096, return_entropy=True),
            _NAMES,
            ("sm_90",),
        ),
        Variant("bfloat16 D2304 everything linear_logprobs", _everything, (*_NAMES, "bias"), ("sm_90", "gfx942")),
        Variant("float32 D100 linear_logprobs", lambda: plans.variant(_NAMES, 100, torch.float32), _NAMES, ("sm_90",)),
    ),
    # Where the op's time goes.
    limits=(
        Limit(
            ("states_kernel", "gradients_kernel", "hidden_gradient_kernel", "weight_gradient_kernel"),
            ("* D4096 *",),
            ("sm_90",),
        ),
    ),
    searches={
        name: plans.search(
            plans.problem(_NAMES, 4096, 65_536, grads=grads),
            plans.problem(_NAMES, 1024, 8192, grads=grads, bias=torch.zeros(8192), **_EVERYTHING),
        )
        for name, grads in (("logits", False), ("products", True))
    },
)
