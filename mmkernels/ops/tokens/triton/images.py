"""Where the images of a packed call lie: a small table on the device, and how a kernel looks a row up in it.

The host knows all sizes, so nothing waits for the device; the table of a call is kept for the next with the same sizes.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.runtime.arguments import Sizes

COLUMNS = tl.constexpr(8)
"""Of an image's row in the table: first row of the output, first token, t, h, w, t', h', w' of the output."""


@lru_cache(maxsize=64)
def image_table(device: torch.device, grid: Sizes, out: Sizes, batched: bool) -> Tensor:
    """Returns int64 [images, 8]; a first token is 0 where x is [images, tokens, C]."""
    rows, first_row, first_token = [], 0, 0
    for at in range(0, len(grid), 3):
        rows.append((first_row, 0 if batched else first_token, *grid[at : at + 3], *out[at : at + 3]))
        first_row += prod(out[at : at + 3])
        first_token += prod(grid[at : at + 3])
    table = torch.tensor(rows, dtype=torch.int64)
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


@triton.jit
def find_image(table, row, images, STEPS: tl.constexpr):
    """Returns the number of the image that a row of the output belongs to, by bisection."""
    first, beyond = row * 0, row * 0 + images
    for _ in range(STEPS):
        middle = (first + beyond) // 2
        before = tl.load(table + middle * COLUMNS) <= row
        first = tl.where(before, middle, first)
        beyond = tl.where(before, beyond, middle)
    return first
