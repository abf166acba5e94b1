"""Bipartite soft matching in plain PyTorch: bands of the tokens that may merge, each against all of the others."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.ops.tokens.keep import Round
from mmkernels.ops.tokens.match_tokens.spec import Arguments, in_rounds, match_images, nan_is_worst

STRIP_BYTES = 4 << 20
"""Of a band of similarities."""


def forward(args: Arguments) -> Tensor:
    """Returns int64 [N]."""
    return in_rounds(args, _match)


def _match(metric: Tensor, step: Round, protect: int) -> Tensor:
    return match_images(metric, step, protect, _best_by_bands)


def _best_by_bands(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    best, partner = a.new_empty(len(a)), torch.empty(len(a), dtype=torch.int64, device=a.device)
    rows = max(1, STRIP_BYTES // (a.element_size() * len(b)))
    for first in range(0, len(a), rows):
        at = slice(first, first + rows)
        best[at], partner[at] = nan_is_worst(a[at] @ b.mT).max(1)
    return best, partner
