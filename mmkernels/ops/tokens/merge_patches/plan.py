"""The GPU kernels of `merge_patches`: tile sizes, what is compiled ahead of time."""

from __future__ import annotations

from math import prod
from typing import Any

import torch

from mmkernels.plan import TARGETS, Plan, Variant
from mmkernels.spec import Inputs

MOST_ELEMENTS = 1 << 15
"""Of a merged token with a norm, padded to powers of two: one program holds it in registers."""


def _why_not(args: Any) -> str | None:
    if args.norm and padded(args.x.shape[-1]) * padded(prod(args.window)) > MOST_ELEMENTS:
        return f"a norm of a merged token of more than {MOST_ELEMENTS} channels (in powers of two)"
    return None


def padded(n: int) -> int:
    """Returns the next power of two."""
    return 1 << (n - 1).bit_length()


def _inputs(norm: str | None = None, order: str = "spatial", first: bool = False) -> Inputs:
    inputs: Inputs = {"x": torch.empty(64, 1024, dtype=torch.bfloat16), "grid": ((1, 8, 8),), "order": order}
    if norm is not None:
        width = 1024 if first else 4096
        inputs |= {"norm": norm, "norm_first": first, "weight": torch.empty(width, dtype=torch.bfloat16)}
    return inputs


PLAN = Plan(
    # block_k: the most elements of a tile without a norm. None has been timed on a GPU yet.
    tiles={target: {"copy": ((1, 4096, 4, 1),), "norm": ((1, MOST_ELEMENTS, 8, 1),)} for target in TARGETS},
    float32=(MOST_ELEMENTS,) * 3,
    variants=(
        Variant("bfloat16 C1024", _inputs, ("x",)),
        Variant("bfloat16 C1024 channel", lambda: _inputs(order="channel"), ("x",)),
        Variant("bfloat16 C1024 layer norm", lambda: _inputs("layer"), ("x", "weight")),
        Variant("bfloat16 C1024 grouped rms norm first", lambda: _inputs("rms", "grouped", True), ("x", "weight")),
    ),
    why_not=_why_not,
)
