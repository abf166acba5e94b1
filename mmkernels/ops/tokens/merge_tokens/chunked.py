"""Merged tokens in plain PyTorch: some channels at a time, so that no wide copy of all of x is made."""

from __future__ import annotations

from torch import Tensor

from mmkernels.ops.common.dtypes import wide_dtype
from mmkernels.ops.tokens.groups import group_means, group_sums
from mmkernels.ops.tokens.merge_tokens.spec import Arguments

STRIP_BYTES = 4 << 20
"""Of a wide copy of some channels."""


def forward(args: Arguments) -> tuple[Tensor, Tensor]:
    """Returns the means [N', C] and the sums of sizes [N']."""
    x, sizes, group, count = args.x, args.sizes, args.assignment, sum(args.kept)
    wide = wide_dtype(x)
    merged = x.new_empty(count, x.shape[1])
    step = max(1, STRIP_BYTES // (wide.itemsize * max(1, x.shape[0])))
    for first in range(0, x.shape[1], step):
        some = slice(first, first + step)
        merged[:, some] = group_means(x[:, some], sizes, group, count)[0]
    ones = x.new_ones(x.shape[0], dtype=wide)
    return merged, group_sums(ones if sizes is None else sizes, group, count)
