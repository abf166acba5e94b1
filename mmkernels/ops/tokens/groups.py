"""Tokens in groups, one for each token that is left: sums and means by plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from mmkernels.ops.common.dtypes import wide_dtype

__all__ = ["group_means", "group_sums"]


def group_sums(x: Tensor, group: Tensor, count: int) -> Tensor:
    """Returns the sum of each group's rows.

    Args:
        x: [N] or [N, C].
        group: int64 [N], from 0 to count - 1.
    """
    return x.new_zeros(count, *x.shape[1:]).index_add(0, group, x)


def group_means(x: Tensor, sizes: Tensor | None, group: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Returns the mean of each group's rows, weighted by size, [count, C] in the wide dtype, and the sum of its sizes.

    Args:
        x: [N, C].
        sizes: [N] in the wide dtype; None: 1 each.
        group: int64 [N].
    """
    wide = wide_dtype(x)
    sizes = x.new_ones(x.shape[0], dtype=wide) if sizes is None else sizes
    total = group_sums(sizes, group, count)
    return group_sums(x.to(wide) * sizes[:, None], group, count) / total[:, None], total
