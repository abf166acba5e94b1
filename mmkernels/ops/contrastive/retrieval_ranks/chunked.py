"""Retrieval ranks in plain PyTorch: bands of queries, each against the whole gallery."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.ops.common.dtypes import wide_dtype
from mmkernels.ops.contrastive.retrieval_ranks.spec import Arguments, ranks_of
from mmkernels.ops.contrastive.strips import STRIP_BYTES
from mmkernels.runtime.checks import check_range


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
