"""What `TokenReducer` does with one image, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels.nn import TokenReducer

Size = tuple[int, int, int]
Formula = Callable[[TokenReducer, Tensor, Size, "Tensor | None"], Tensor]
"""Of the reducer, an image's tokens [t * h * w, C], its grid, and its scores or its metric."""


def image_by_image(
    reducer: TokenReducer, formula: Formula, x: Tensor, grid: list[Size], extra: Tensor | None = None
) -> list[Tensor]:
    """Returns the reduced tokens of each packed image: those that are protected, then what the formula says."""
    images, protect = [], reducer.protect
    counts = [protect + prod(size) for size in grid]
    extras = [None] * len(grid) if extra is None else extra.split(counts)
    for image, size, more in zip(x.split(counts), grid, extras, strict=True):
        body = formula(reducer, image[protect:], size, None if more is None else more[protect:])
        images.append(torch.cat([image[:protect], body]))
    return images


def _volume(x: Tensor, size: Size) -> Tensor:
    """Returns [1, C, t, h, w]."""
    return x.view(*size, -1).permute(3, 0, 1, 2)[None]


def _tokens(x: Tensor) -> Tensor:
    return x[0].flatten(1).T


def pool(reducer: TokenReducer, x: Tensor, size: Size, _: Tensor | None) -> Tensor:
    kernel = [min(n, step) for n, step in zip(size, reducer.window)]
    return _tokens(F.avg_pool3d(_volume(x, size), kernel, ceil_mode=True, count_include_pad=False))


def pooled_to(*out: int) -> Formula:
    """Returns the formula of a budget for which an image is pooled to the grid `out`."""
    return lambda reducer, x, size, _: _tokens(F.adaptive_avg_pool3d(_volume(x, size), out))


def shuffle(reducer: TokenReducer, x: Tensor, size: Size, _: Tensor | None) -> Tensor:
    (t, h, w), (a, b, c) = size, reducer.window
    x = F.pad(_volume(x, size)[0], (0, -w % c, 0, -h % b, 0, -t % a))  # zeros at the ends
    x = x.unfold(1, a, a).unfold(2, b, b).unfold(3, c, c)  # [C, t', h', w', a, b, c]
    merged = x.permute(1, 2, 3, 4, 5, 6, 0).flatten(3).flatten(0, 2)
    projector: Any = reducer.module
    normed = F.layer_norm(merged, merged.shape[1:], projector.norm.weight, projector.norm.bias, projector.norm.eps)
    return projector.mlp(normed)


def perceive(reducer: TokenReducer, x: Tensor, size: Size, _: Tensor | None) -> Tensor:
    return reducer.module(x)


def _kept(reducer: TokenReducer, count: int) -> int:
    """Returns how many of an image's tokens, which are not protected, stay."""
    if reducer.budget is not None:
        return min(count, reducer.budget - reducer.protect)
    assert reducer.keep is not None
    return -int(-count * reducer.keep // 1) if isinstance(reducer.keep, float) else reducer.keep


def tome(reducer: TokenReducer, x: Tensor, size: Size, metric: Tensor | None) -> Tensor:
    """One round: of tokens at every other place the most similar join one of the others. protect is even."""
    assert reducer.protect % 2 == 0
    unit = F.normalize(x if metric is None else metric, dim=1).detach()
    a, b = torch.arange(0, len(x), 2), torch.arange(1, len(x), 2)
    best, to = (unit[a] @ unit[b].T).max(1)
    away = best.argsort(descending=True, stable=True)[: len(x) - _kept(reducer, len(x))]
    place = torch.arange(len(x))
    place[a[away]] = b[to[away]]
    left, row = place.unique(return_inverse=True)
    sums = torch.zeros(len(left), x.shape[1], dtype=x.dtype).index_add(0, row, x)
    return sums / row.bincount()[:, None]


def select(reducer: TokenReducer, x: Tensor, size: Size, scores: Tensor | None) -> Tensor:
    assert scores is not None
    best = scores.argsort(descending=True, stable=True)[: _kept(reducer, len(x))]
    return x[best.sort().values]


def diverse(reducer: TokenReducer, x: Tensor, size: Size, quality: Tensor | None) -> Tensor:
    """The token that makes the determinant of the similarities largest, one by one."""
    unit = F.normalize(x.detach().double(), dim=1)
    unit = unit if quality is None else unit * quality.double()[:, None]
    chosen: list[int] = []
    for _ in range(_kept(reducer, len(x))):
        rest = [n for n in range(len(x)) if n not in chosen]
        volumes = [
            round(float(torch.linalg.slogdet((y := unit[[*chosen, n]]) @ y.T)[1]), 9) for n in rest
        ]  # of equal ones the first
        chosen.append(rest[max(range(len(rest)), key=volumes.__getitem__)])
    return x[sorted(chosen)]
