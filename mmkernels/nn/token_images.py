"""The images of a tensor of visual tokens, with tokens at the front that their grids do not count; and budgets."""

from __future__ import annotations

from math import floor, prod, sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from mmkernels.ops.tokens.inputs import Lengths
from mmkernels.ops.tokens.pool_tokens.axes import pooled_grid
from mmkernels.runtime.arguments import Sizes

__all__ = ["TokenImages", "fit_grid", "grid_tokens"]


class TokenImages(NamedTuple):
    """Images of `counts` tokens, each behind `protect` others, such as a class token and registers."""

    counts: Sizes
    batched: bool
    """Whether tensors are ``[images, tokens, ...]``, and not packed, ``[tokens, ...]``."""
    protect: int

    def lengths(self, counts: Sizes) -> Lengths:
        """Returns the tokens of each image, of which `counts` are not protected: one number where x is batched."""
        return counts[0] + self.protect if self.batched else tuple(count + self.protect for count in counts)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the protected tokens and the others, both batched or packed as x."""
        if self.batched:
            return x[:, : self.protect], x[:, self.protect :]
        if not self.protect or not self.counts:
            return x[:0], x
        parts = x.split([size for count in self.counts for size in (self.protect, count)])
        return torch.cat(parts[::2]), torch.cat(parts[1::2])

    def join(self, front: Tensor, x: Tensor, counts: Sizes) -> Tensor:
        """Returns the protected tokens of each image and `counts` others behind them."""
        if not self.protect or not self.counts:
            return x
        if self.batched:
            return torch.cat([front, x], dim=1)
        parts = zip(front.split(self.protect), x.split(list(counts)), strict=True)
        return torch.cat([part for image in parts for part in image])


def grid_tokens(sizes: Sizes) -> Sizes:
    """Returns t * h * w of each image, of a flat list of (t, h, w)."""
    return tuple(prod(sizes[at : at + 3]) for at in range(0, len(sizes), 3))


def fit_grid(sizes: Sizes, budget: int, window: Sizes = (1, 1, 1)) -> Sizes:
    """Returns for each image the grid to pool it to, so that it has no more than `budget` windows; its own if it fits.

    Frames are kept, if each can have a window, and so is the aspect: one side of a frame is the shorter one that it
    says, rounded, and the other as long as then fits.
    """
    fitted: list[int] = []
    for at in range(0, len(sizes), 3):
        size = sizes[at : at + 3]
        windows = _shrunk(pooled_grid(size, window, (), "partial"), budget)
        fitted += (min(n * step, most) for n, step, most in zip(windows, window, size))
    return tuple(fitted)


def _shrunk(size: Sizes, budget: int) -> Sizes:
    """No branch, no ``//``: where sizes are symbols of a graph, each way and each remainder would be another graph."""
    t, h, w = size
    frames = min(t, budget)
    area = floor(budget / frames)
    shorter, longer = min(h, w), max(h, w)
    one = min(shorter, area, max(1, floor(sqrt(area * shorter / longer) + 0.5)))
    other = min(longer, floor(area / one))
    short, more = min(one, other), max(one, other) - min(one, other)
    higher = min(1, max(0, h - w))
    return (frames, short + higher * more, short + (1 - higher) * more)
