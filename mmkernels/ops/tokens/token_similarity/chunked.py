"""Similarity to other tokens in plain PyTorch: a mean by one product, the largest and smallest in strips of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.ops.common.dtypes import wide_dtype
from mmkernels.ops.tokens.cosine import unit_rows
from mmkernels.ops.tokens.token_similarity.spec import Arguments, image_pairs

STRIP_BYTES = 8 << 20
"""Of the tokens' rows, or of the similarities, that are held at once."""


def forward(args: Arguments) -> Tensor:
    """Returns [tokens]."""
    parts = [part for x, others in image_pairs(args) for part in _strips(x, unit_rows(others), args.reduce)]
    return torch.cat(parts) if parts else args.x.new_empty(0, dtype=wide_dtype(args.x))


def _strips(x: Tensor, others: Tensor, reduce: str) -> list[Tensor]:
    direction = others.mean(0) if reduce == "mean" else None
    rows = max(1, STRIP_BYTES // (others.element_size() * max(x.shape[1], 1 if reduce == "mean" else len(others))))
    parts = []
    for strip in x.split(rows):
        unit = unit_rows(strip)
        if direction is not None:
            parts.append(unit @ direction)
        else:
            similarity = unit @ others.mT
            parts.append(similarity.amax(1) if reduce == "max" else similarity.amin(1))
    return parts
