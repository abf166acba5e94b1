"""What the tests of the contrastive ops' CPU kernels share: instruction sets, and how a result is checked."""

from __future__ import annotations

import pytest
import torch
from harness import SPECS, check, draw, expected
from ops.cpu_tools import ISAS

from mmkernels.spec import Case, Inputs

WIDE = SPECS["info_nce"].always_wide | SPECS["sigmoid_contrastive"].always_wide

# Each instruction set; and of the one that multiplies bfloat16 as it is, that.
_PAIRS_ISA = "avx512_bf16"
WAYS = [(isa, torch.float32) for isa in ISAS]
WAYS += [(_PAIRS_ISA, torch.bfloat16)] if _PAIRS_ISA in ISAS else []
each_way = pytest.mark.parametrize(("isa", "dtype"), WAYS, ids=str)


def case_of(id: str, inputs: Inputs) -> Case:
    """With the gradients of all features and scalars."""
    differentiable = ("image", "text", "logit_scale", "logit_bias", "hard_texts")
    return Case(id, lambda _: inputs, tuple(name for name in differentiable if name in inputs))


def check_kernel(case: Case, dtype: torch.dtype, *, op: str = "info_nce", threads: int = 1) -> None:
    """As `harness.check`; the gradient of logit_scale may come to less than what its terms lose by rounding."""
    units = {}
    if "logit_scale" in case.grads:
        inputs, (_, truth) = draw(case), expected(SPECS[op], case, dtype)
        if "image" in truth.grads:
            of_each_image = (inputs["image"] * truth.grads["image"]).flatten(1).sum(1) / inputs["logit_scale"]
            units["logit_scale"] = max(1.0, float(of_each_image.norm()))
    check(SPECS[op], case, dtype, "cpu", threads=threads, units=units)
