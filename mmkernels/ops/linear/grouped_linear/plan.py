"""The GPU kernels of `grouped_linear`: tile sizes, what is compiled ahead of time, what is tuned."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator

from mmkernels.ops.linear import plans
from mmkernels.ops.linear.grouped_linear.spec import routed
from mmkernels.plan import TARGETS, Limit, Plan, Problem, Search, Variant
from mmkernels.spec import Inputs

_GROUPS, _ACTIVE = 64, 6
# By the rows of a group on average, see triton/forward.py; "weights" of the gradient of the weight. Chosen by registers
# and shared memory; none has been timed on a GPU yet, see benchmarks/tune.py.
_FEW, _SOME, _MANY = (16, 128, 4, 4), (64, 128, 4, 4), (128, 256, 8, 4)
_TILES = {
    "sm_80": (_FEW, _SOME, (128, 128, 8, 3), (128, 128, 8, 3)),
    "sm_89": (_FEW, (64, 128, 4, 3), (128, 128, 8, 3), (128, 128, 8, 3)),
    "sm_90": (_FEW, _SOME, _MANY, (128, 128, 8, 4)),
    "sm_100": (_FEW, _SOME, _MANY, (128, 128, 8, 4)),
    "gfx942": ((16, 128, 4, 2), (64, 128, 4, 2), (128, 128, 8, 2), (128, 128, 8, 2)),
}
_KERNELS = ("few", "some", "many", "weights")


def _variant(
    rows: int,
    dtype: torch.dtype = torch.bfloat16,
    channels: int = 2048,
    *,
    transposed: bool = False,
    bias: bool = False,
) -> Callable[[], Inputs]:
    def make() -> Inputs:
        sizes = (_GROUPS, channels, 2816) if transposed else (_GROUPS, 2816, channels)
        weight = torch.empty(sizes, dtype=dtype)
        inputs: Inputs = {
            "x": torch.empty(rows, channels, dtype=dtype),
            "weight": weight.mT if transposed else weight,
            "lengths": torch.zeros(_GROUPS, dtype=torch.int64),
        }
        return inputs | ({"bias": torch.empty(_GROUPS, 2816, dtype=dtype)} if bias else {})

    return make


def _problem(tokens: int, grads: tuple[str, ...] = ()) -> Problem:
    def make(g: Generator, dim: int) -> Inputs:
        channels = dim if dim < 256 else 2048
        lengths = routed(tokens, _ACTIVE, _GROUPS, g)
        draw = lambda *shape: torch.randn(shape, generator=g, device=g.device)
        return {"x": draw(tokens * _ACTIVE, channels), "weight": draw(_GROUPS, 2816, channels), "lengths": lengths}

    return Problem(make, grads)


def _search(rows: tuple[int, ...], tokens: int, grads: tuple[str, ...] = ()) -> Search:
    timed = _problem(tokens, grads)
    return Search(rows, (64, 128, 256), (4, 8), (2, 3, 4), (timed,), timed, plans.least_shared)


_BOTH, _ALL = ("x", "weight"), ("x", "weight", "bias")
PLAN = Plan(
    tiles={
        target: {name: (entry,) for name, entry in zip(_KERNELS, entries, strict=True)}
        for target, entries in _TILES.items()
    },
    float32=plans.FLOAT32,
    variants=(
        Variant("bfloat16 C2048 few rows", _variant(6)),
        Variant("bfloat16 C2048 some rows", _variant(3072), _BOTH),
        Variant("bfloat16 C2048 many rows", _variant(24_576), _BOTH),
        Variant("bfloat16 C2048 transposed", _variant(24_576, transposed=True), _BOTH, ("sm_90",)),
        Variant("float16 C100 bias", _variant(384, torch.float16, 100, bias=True), _ALL, ("sm_90", "gfx942")),
        Variant("float32 C2048 many rows", _variant(24_576, torch.float32), _BOTH, ("sm_90",)),
    ),
    # Where the op's time goes.
    limits=(Limit(("product_kernel", "weight_gradient_kernel"), ("* C2048 * rows *",), TARGETS),),
    searches={
        "few": _search((16, 32), 16),
        "some": _search((32, 64, 128), 512),
        "many": _search((64, 128, 256), 4096),
        "weights": _search((64, 128, 256), 4096, ("weight",)),
    },
)
