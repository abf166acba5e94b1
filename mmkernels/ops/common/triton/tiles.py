"""What the tiles of several families' Triton kernels share."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def split_columns(x, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """Returns the left and the right half of a tile: an epilogue of half a tile needs half of the registers."""
    return tl.split(tl.permute(tl.reshape(x, [BLOCK_Q, 2, BLOCK_K // 2]), (0, 2, 1)))
