"""What the tests of the contrastive ops' CPU kernels share: instruction sets, and how a result is checked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import SPECS, check, draw, expected, run
from ops.contrastive.tools import features
from ops.cpu_tools import ISAS

from mmkernels.spec import Case, Inputs, cast

WIDE = SPECS["info_nce"].always_wide | SPECS["sigmoid_contrastive"].always_wide

# Each instruction set; and of the one that multiplies bfloat16 as it is, that.
_PAIRS_ISA = "avx512_bf16"
WAYS = [(isa, torch.float32) for isa in ISAS]
WAYS += [(_PAIRS_ISA, torch.bfloat16)] if _PAIRS_ISA in ISAS else []
each_way = pytest.mark.parametrize(("isa", "dtype"), WAYS, ids=str)


Problem = Callable[[int], Inputs]
"""Returns the inputs of a draw; others for another number: where luck decides, `harness.check` needs several draws."""

_DIFFERENTIABLE = ("image", "text", "logit_scale", "logit_bias", "hard_texts")


def case_of(id: str, problem: Problem, grads: tuple[str, ...] | None = None) -> Case:
    """Returns the case of a problem; `grads`: what it is differentiated by, None: all features and scalars."""
    if grads is None:
        inputs = problem(0)
        grads = tuple(name for name in _DIFFERENTIABLE if name in inputs)
    return Case(id, lambda g: problem(int(torch.randint(2**31, (), generator=g))), grads)


def of_sigmoid(problem: Problem) -> Problem:
    """Returns what `sigmoid_contrastive` takes of a problem, and a bias."""
    names = ("image", "text", "logit_scale", "image_ids", "text_ids")
    bias = {"logit_bias": torch.tensor(-2.0, dtype=torch.float64)}
    return lambda number: {n: x for n, x in problem(number).items() if n in names} | bias


def check_kernel(
    case: Case,
    dtype: torch.dtype,
    *,
    op: str = "info_nce",
    threads: int = 1,
    function: Callable[..., Any] | None = None,
) -> None:
    """As `harness.check`; the gradient of logit_scale may come to less than what its terms lose by rounding."""
    units = {}
    if "logit_scale" in case.grads:
        inputs, (_, truth) = draw(case), expected(SPECS[op], case, dtype)
        if "image" in truth.grads:
            of_each_image = (inputs["image"] * truth.grads["image"]).flatten(1).sum(1) / inputs["logit_scale"]
            units["logit_scale"] = max(1.0, float(of_each_image.norm()))
    check(SPECS[op], case, dtype, "cpu", threads=threads, units=units, function=function)


def _scales(dim: int, scale: float, alike: float, cone: float) -> list[Case]:
    """Several draws of images and texts; `alike`: how much pairs are, `cone`: how much all of them are."""
    found = []
    for seed in range(8):
        inputs = features(300, dim=dim, scale=scale, seed=seed) | {"reduction": "none"}
        middle = cone * features(1, dim=dim, seed=seed + 100)["text"]
        inputs["text"] = F.normalize(inputs["text"] + middle, dim=1)
        inputs["image"] = F.normalize(inputs["image"] + middle + alike * inputs["text"], dim=1)
        found.append(Case(f"draw {seed}", lambda _, x=inputs: x, ("logit_scale",)))  # type: ignore[misc]
    return found


SCALES = {
    "at first": _scales(33, 4.0, 0.0, 0.0),
    "somewhat alike": _scales(64, 20.0, 0.5, 0.0),
    "in a cone": _scales(33, 10.0, 0.5, 3.0),
    "sharp, in a cone": _scales(33, 100.0, 1.0, 3.0),
    "all learnt": _scales(64, 100.0, 4.0, 0.0),
}


def check_scale_s_gradient(kind: str, function: Callable[..., Any] | None = None) -> None:
    """Assert the budget for the root mean square of draws: of one sum the error in a draw may be luck."""
    errors: list[tuple[float, float]] = []
    for case in SCALES[kind]:
        naive, true = expected(SPECS["info_nce"], case, torch.float32)
        ours = run(SPECS["info_nce"], case, cast(draw(case), torch.float32), "cpu", function)
        errors.append(tuple(float(x.grads["logit_scale"] - true.grads["logit_scale"]) for x in (ours, naive)))  # type: ignore[arg-type]
    mine, others = torch.tensor(errors, dtype=torch.float64).pow(2).mean(0).sqrt().tolist()
    assert mine <= 2 * others + 1e-6
