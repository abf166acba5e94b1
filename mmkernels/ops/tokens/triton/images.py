"""Where the images of a packed call lie: a small table on the device, and how a kernel looks a row up in it.

The host knows all sizes, so nothing waits for the device; the table of a call is kept for the next with the same sizes.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.ops.common.triton.launch import ceil_div
from mmkernels.ops.tokens.ranking import image_of, on_device, starts_of
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
def find_image(table, row, images, STEPS: tl.constexpr, WIDTH: tl.constexpr = COLUMNS):
    """Returns the number of the image that a row of the output belongs to, by bisection.

    Args:
        table: of `WIDTH` columns, the first of which is an image's first row of the output.
        images: how many there are, which `STEPS` halvings bring to one.
    """
    first, beyond = row * 0, row * 0 + images
    for _ in range(STEPS):
        middle = (first + beyond) // 2
        before = tl.load(table + middle * WIDTH) <= row
        first = tl.where(before, middle, first)
        beyond = tl.where(before, beyond, middle)
    return first


class TokenStrides(NamedTuple):
    """Where ``[tokens, C]`` or ``[images, tokens, C]`` lies, in elements; of packed tokens `image` is 0."""

    image: Any
    token: Any
    channel: Any


def token_strides(x: Tensor) -> TokenStrides:
    """Returns the strides of tokens."""
    return TokenStrides(x.stride(0) if x.dim() == 3 else 0, x.stride(-2), x.stride(-1))


class TokenTiles(NamedTuple):
    """Tiles of tokens, each of one image."""

    images: Tensor
    """int64 [tiles]."""
    firsts: Tensor
    """int64 [tiles]: the first token of each."""


def token_tiles(lengths: Sizes, rows: int, device: torch.device) -> TokenTiles:
    """Returns the tiles of `rows` tokens, the last of each image of fewer.

    Args:
        lengths: the tokens of each image.
    """
    counts = tuple(ceil_div(n, rows) for n in lengths)
    images = image_of(counts, device)
    tile = torch.arange(len(images), device=device) - on_device(starts_of(counts), device)[images]
    return TokenTiles(images, on_device(starts_of(lengths), device)[images] + rows * tile)
