"""Retrieval ranks in plain PyTorch: bands of queries, each against the whole gallery."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmkernels.ops.common.dtypes import wide_dtype
from mmkernels.ops.contrastive.retrieval_ranks.spec import Arguments, before_of, ranks_of
from mmkernels.ops.contrastive.strips import STRIP_BYTES
from mmkernels.runtime.checks import check_range

_RIGHT_ROWS = 64  # so many right answers' scores are the diagonal of one product


def forward(args: Arguments) -> Tensor:
    """Returns int64 [N]."""
    query, gallery, target = args.query, args.gallery, args.target
    check_range("target", target, 0, len(gallery) - 1)
    wide = wide_dtype(query)
    ranks = torch.empty(query.shape[0], dtype=torch.int64, device=query.device)
    items = gallery.to(wide)
    step = max(1, STRIP_BYTES // (wide.itemsize * gallery.shape[0]))
    for first in range(0, query.shape[0], step):
        at = slice(first, first + step)
        ranks[at] = ranks_of(query[at].to(wide) @ items.mT, target[at])
    return ranks


def block(args: Any) -> Tensor:
    """Returns int64 [N], see `block.Block`. A right answer's score comes from a product of matrices as the others."""
    query, right, wide = args.query, args.right, wide_dtype(args.query)
    items = args.gallery.to(wide)
    before = torch.empty(query.shape[0], dtype=torch.int64, device=query.device)
    step = max(1, STRIP_BYTES // (wide.itemsize * len(items)))
    for first in range(0, query.shape[0], step):
        at = slice(first, first + step)
        rows = query[at].to(wide)
        pairs = zip(rows.split(_RIGHT_ROWS), right[at].to(wide).split(_RIGHT_ROWS), strict=True)
        best = torch.cat([(x @ y.mT).diagonal() for x, y in pairs])
        before[at] = before_of(rows @ items.mT, best, args.right_index[at])
    return before
