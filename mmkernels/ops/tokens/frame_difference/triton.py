"""Frame differences in Triton: a program reads some tokens and those at the same places of the frame before.

The second read of a token is from the second-level cache, where frames are smaller than that.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.ops.common.triton.constants import INFINITY
from mmkernels.ops.common.triton.launch import ceil_div
from mmkernels.ops.tokens.frame_difference.spec import Arguments
from mmkernels.ops.tokens.triton.cosine import near_one
from mmkernels.ops.tokens.triton.images import COLUMNS, find_image, image_table
from mmkernels.ops.tokens.triton.rows import row_offsets, strides_of
from mmkernels.runtime.triton import launch
from mmkernels.runtime.tuning import config

OP = "frame_difference"


@triton.jit
def difference_kernel(
    x, table, out, strides, tokens, images, channels, STEPS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Store the differences of some tokens. Grid: (tiles of tokens,)."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    entry = table + find_image(table, tl.minimum(token, tokens - 1), images, STEPS) * COLUMNS
    positions = tl.load(entry + 3) * tl.load(entry + 4)
    has_before = token - tl.load(entry) >= positions
    reads = (has_before & (token < tokens))[:, None]
    row = (x + row_offsets(token, strides))[:, None]
    before = (x + row_offsets(tl.where(has_before, token - positions, token), strides))[:, None]
    dot = tl.zeros([BLOCK_Q], tl.float32)
    square, square_before = dot, dot
    exponent = tl.full([BLOCK_Q], 1, tl.int32)
    exponent_before = exponent
    for first in range(0, channels, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        mask = reads & (c < channels)[None, :]
        at = c.to(tl.int64)[None, :] * strides.column
        a = tl.load(before + at, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(row + at, mask=mask, other=0.0).to(tl.float32)
        a, exponent_before, shift_before = near_one(a, exponent_before)
        b, exponent, shift = near_one(b, exponent)
        # In the same way for all, so that they are equal where both rows are.
        dot = dot * shift_before * shift + tl.sum(a * b, 1)
        square_before = square_before * shift_before * shift_before + tl.sum(a * a, 1)
        square = square * shift * shift + tl.sum(b * b, 1)
    product = square * square_before
    length = tl.sqrt_rn(tl.where(product == 0.0, 1.0, product))  # rounded as the square of a square is
    difference = 1.0 - tl.div_rn(dot, length)
    tl.store(out + token, tl.where(has_before, difference, INFINITY), mask=token < tokens)


def forward(args: Arguments) -> Tensor:
    """Returns float32 [tokens]."""
    x, grid = args.x, tuple(args.grid)
    images = len(grid) // 3
    tokens, channels = x.shape[:-1].numel(), x.shape[-1]
    out = x.new_empty(tokens, dtype=torch.float32)
    if not tokens:
        return out
    plan = config(OP, "difference", x.device, x.dtype, channels)
    launch(
        difference_kernel, (ceil_div(tokens, plan.block_q),), plan,
        x, image_table(x.device, grid, grid, False), out, strides_of(x), tokens, images, channels,
        STEPS=images.bit_length(), BLOCK_Q=plan.block_q, BLOCK_C=plan.block_k,
    )  # fmt: skip
    return out
