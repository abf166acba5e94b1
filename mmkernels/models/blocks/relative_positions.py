"""Relative positions of an image's patches as further channels of queries and keys."""

from __future__ import annotations

import torch
from torch import Tensor


def with_relative_positions(
    query: Tensor, key: Tensor, rows: Tensor, columns: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Returns queries and keys whose products are scores with relative positions: ``[..., D + h + w]`` each.

    ``score(i, j) = scale * q_i k_j' + q_i R[row of i, row of j]' + q_i C[column of i, column of j]'``. A table of the
    last two terms would have an entry for each query and key: for an image of 64 x 64 patches, 200 million in a layer
    of 12 heads. As they depend on the key by its row and its column alone, they are a product too: of ``q_i R'`` and
    ``q_i C'`` with keys that are 1 at their row and column.

    Args:
        query, key: ``[B, H, h * w, D]``, row by row.
        rows: ``[h, h, D]``, for the row of a query and that of a key.
        columns: ``[w, w, D]``.
        scale: of the products without positions.

    Source: Li et al., "MViTv2", 2022, equation 4.

    Example:
        >>> import torch
        >>> patches = torch.randn(1, 2, 12, 8)  # 2 heads, 3 x 4 patches
        >>> query, key = with_relative_positions(patches, patches, torch.randn(3, 3, 8), torch.randn(4, 4, 8), 0.3)
        >>> query.shape, key.shape
        (torch.Size([1, 2, 12, 15]), torch.Size([1, 2, 12, 15]))
    """
    height, width = rows.shape[0], columns.shape[0]
    grid = query.unflatten(2, (height, width))  # [B, H, h, w, D]
    by_row = torch.einsum("bhrcd,rkd->bhrck", grid, rows).flatten(2, 3)  # [B, H, h w, h]
    by_column = torch.einsum("bhrcd,ckd->bhrck", grid, columns).flatten(2, 3)  # [B, H, h w, w]
    places = _places(height, width, key).expand(*key.shape[:-1], -1)
    return torch.cat([query * scale, by_row, by_column], dim=-1), torch.cat([key, places], dim=-1)


def _places(height: int, width: int, like: Tensor) -> Tensor:
    """Returns for each patch 1 at its row, then 1 at its column, else 0: ``[h * w, h + w]``."""
    one = lambda size: torch.eye(size, dtype=like.dtype, device=like.device)
    return torch.cat([one(height).repeat_interleave(width, 0), one(width).repeat(height, 1)], dim=1)
