"""What the plans of the linear ops share: tiles of products, inputs of variants and of tuning."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor

from mmkernels.ops.linear.cases import head, targets
from mmkernels.plan import Config, Problem, Search, Tiles
from mmkernels.spec import Inputs

FLOAT32 = (64, 64, 64)
_STEP_BYTES = 128
_ROWS, _TOKENS = 2048, 32_000  # of a variant
# Chosen by registers and shared memory; none has been timed on a GPU yet, see benchmarks/tune.py.
_PRODUCT = {
    "sm_80": (128, 128, 8, 3),
    "sm_89": (128, 128, 8, 3),
    "sm_90": (128, 256, 8, 4),
    "sm_100": (128, 256, 8, 3),
    "gfx942": (128, 128, 8, 2),
}


def product_tiles() -> dict[str, Tiles]:
    """Returns the default tiles of the logits and of the products with their gradients, by architecture.

    A product walks over what it sums in steps of 128 bytes, so that no tile depends on the dim.
    """
    return {target: dict.fromkeys(("logits", "products"), (entry,)) for target, entry in _PRODUCT.items()}


def variant(
    names: tuple[str, str], dim: int, dtype: torch.dtype = torch.bfloat16, *, transposed: bool = False, **more: Any
) -> Inputs:
    """Returns uninitialised arguments; `names`: of hidden and weight."""
    weight = torch.empty(dim, _TOKENS, dtype=dtype).mT if transposed else torch.empty(_TOKENS, dim, dtype=dtype)
    hidden = torch.empty(_ROWS, dim, dtype=dtype)
    return dict(zip(names, (hidden, weight), strict=True)) | {"target": torch.zeros(_ROWS, dtype=torch.int64)} | more


def problem(
    names: tuple[str, str], rows: int, tokens: int, *, grads: bool, whole: bool = False, **more: Any
) -> Problem:
    """Returns what kernels are timed on. A dim of 256 stands for all that are larger."""

    def make(g: Generator, dim: int) -> Inputs:
        made: tuple[Tensor, Tensor] = head(g, rows, tokens, dim if dim < 256 else 2048)
        return dict(zip(names, made, strict=True)) | {"target": targets(g, rows, tokens)} | more

    return Problem(make, names if grads else (), whole)


def search(timed: Problem, heaviest: Problem) -> Search:
    """Returns the search of a kernel on tiles of products."""
    return Search((64, 128, 256), (64, 128, 256), (4, 8), (2, 3, 4), (timed,), heaviest, least_shared)


def least_shared(config: Config, dim: int, size: int) -> int:
    """Of the pipeline over what both operands are summed over."""
    return (config.stages - 1) * (config.block_q + config.block_k) * min(_STEP_BYTES, dim * size)
