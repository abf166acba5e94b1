"""The GPU kernels of `linear_cross_entropy`: tile sizes, what is compiled ahead of time, what is tuned."""

from __future__ import annotations

import torch

from mmkernels.ops.linear import plans
from mmkernels.plan import TARGETS, Limit, Plan, Variant
from mmkernels.spec import Inputs

_NAMES = ("input", "linear_weight")


def _everything() -> Inputs:
    """But for the softcap, with which the weights of tokens take another way."""
    weight, bias = torch.empty(32_000), torch.empty(32_000)
    return plans.variant(_NAMES, 2304, linear_bias=bias, weight=weight, label_smoothing=0.1, z_loss=1e-4)


PLAN = Plan(
    tiles=plans.product_tiles(),
    float32=plans.FLOAT32,
    variants=(
        Variant("bfloat16 D4096 linear_cross_entropy", lambda: plans.variant(_NAMES, 4096), _NAMES, TARGETS),
        Variant(
            "bfloat16 D2304 softcap linear_cross_entropy",
            lambda: plans.variant(_NAMES, 2304, softcap=30.0),
            _NAMES,
            ("sm_90",),
        ),
        Variant(
            "bfloat16 D2304 everything linear_cross_entropy",
            _everything,
            (*_NAMES, "linear_bias"),
            ("sm_90", "gfx942"),
        ),
        Variant(
            "float16 D100 linear_cross_entropy",
            lambda: plans.variant(_NAMES, 100, torch.float16),
            _NAMES,
            ("sm_90",),
        ),
    ),
    # Where the op's time goes.
    limits=(
        Limit(
            ("states_kernel", "hidden_gradient_kernel", "weight_gradient_kernel", "exponentials_to_gradients_kernel"),
            ("* D4096 *",),
            ("sm_90",),
        ),
    ),
    searches={
        name: plans.search(
            plans.problem(_NAMES, 4096, 65_536, grads=True, whole=True),
            plans.problem(
                _NAMES, 1024, 8192, grads=True, weight=torch.ones(8192), linear_bias=torch.zeros(8192), z_loss=1e-4
            ),
        )
        for name in ("logits", "products")
    },
)
