"""What the attention ops' gradients of a shared bias have in common: what a program sums over, gradients in parts."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mmkernels.ops.attention.triton.arguments import SplitStrides
from mmkernels.ops.common.triton.launch import ceil_div
from mmkernels.runtime.triton import multiprocessors


class BiasSums(NamedTuple):
    """What one tile of the bias's gradient sums over: batch entries, heads, and tiles of queries where all share it.

    `heads_of_bias` and `tiles_of_bias` are the heads and tiles of queries of the bias.
    """

    heads_of_bias: int
    tiles_of_bias: int
    batch: int
    heads: int
    tiles: int

    @classmethod
    def of(cls, bias: Tensor, batch: int, heads: int, tiles: int) -> BiasSums:
        """Returns those of a bias that is broadcast to `batch`, `heads` and `tiles` of queries."""
        sum_rows = bias.shape[2] == 1
        return cls(
            heads_of_bias=bias.shape[1],
            tiles_of_bias=1 if sum_rows else tiles,
            batch=batch if bias.shape[0] == 1 else 1,
            heads=heads if bias.shape[1] == 1 else 1,
            tiles=tiles if sum_rows else 1,
        )

    def parts(self, bias: Tensor, programs: int) -> tuple[int, Tensor]:
        """Returns into how many parts to split the sums, and zeros for the parts' gradients, [parts, *bias.shape].

        Args:
            programs: of one part.
        """
        summed = self.batch * self.heads * self.tiles
        splits = max(1, min(2 * multiprocessors(bias.device) // max(1, programs), summed // 4))
        if splits == 1:
            return 1, torch.zeros_like(bias)[None]
        return splits, bias.new_zeros(splits, *bias.shape, dtype=torch.float32)


def count_programs(bias: Tensor, sums: BiasSums, k_len: int, block_k: int) -> int:
    """Returns the programs of one part."""
    return ceil_div(k_len, block_k) * sums.tiles_of_bias * bias.shape[0] * bias.shape[1]


def split_strides(parts: Tensor | None) -> SplitStrides:
    """Returns the strides of a gradient in parts; 0 for one that is not wanted."""
    return SplitStrides(*((0,) * 5 if parts is None else parts.stride()))


def sum_of_parts(parts: Tensor, x: Tensor) -> Tensor:
    """Returns the gradient of x from its parts."""
    return parts[0] if parts.shape[0] == 1 else like(parts.sum(0), x)


def like(grad: Tensor, x: Tensor) -> Tensor:
    """Returns `grad` summed to x's shape, in x's dtype and memory layout."""
    return torch.empty_like(x).copy_(grad.sum_to_size(x.shape or (1,)).view(x.shape))
