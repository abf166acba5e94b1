"""Which tokens an output token of `pool_tokens` is made of, axis by axis, and with which weights.

All modes are products over the axes t, h and w: along an axis an output takes a run of inputs. The host computes this
from sizes that it knows.
"""

from __future__ import annotations

from math import ceil, floor
from typing import NamedTuple

from mmkernels.runtime.arguments import Sizes

RESIZING = ("bilinear", "bicubic")
_CUBIC, _CUBIC_ANTIALIASED = -0.75, -0.5
"""The parameter of the cubic convolution: that of ``F.interpolate`` without and with ``antialias``."""


class Taps(NamedTuple):
    """What one output takes along an axis: inputs from `first` on, one for each weight."""

    first: int
    weights: tuple[float, ...]


Axis = tuple[Taps, ...]


def axis_of(mode: str, antialias: bool, size: int, out: int, step: int) -> Axis:
    """Returns the taps of each output along an axis.

    Args:
        size, out: of the axis, inputs and outputs.
        step: of the windows; 0: `out` parts of the axis, as ``F.adaptive_avg_pool1d`` cuts it.
    """
    if mode not in RESIZING or size == out:
        return tuple(_cell(i, size, out, step) for i in range(out))
    if antialias:
        return tuple(_antialiased(mode, i, size, out) for i in range(out))
    return tuple((_linear if mode == "bilinear" else _cubic)(i, size, out) for i in range(out))


def transposed(axis: Axis, size: int) -> Axis:
    """Returns for each of `size` inputs the outputs that take it, with the same weights."""
    first = [len(axis)] * size
    weights: list[list[float]] = [[] for _ in range(size)]
    for i, taps in enumerate(axis):
        for at, weight in enumerate(taps.weights, taps.first):
            first[at] = min(first[at], i)
            weights[at] += [0.0] * (i - first[at] - len(weights[at]))  # outputs between that leave it out
            weights[at].append(weight)
    return tuple(Taps(at, tuple(some)) for at, some in zip(first, weights, strict=True))


def image_axes(mode: str, antialias: bool, size: Sizes, out: Sizes, window: Sizes) -> tuple[Axis, ...]:
    """Returns the axes t, h and w of an image."""
    steps = window or (0, 0, 0)
    return tuple(axis_of(mode, antialias, *of) for of in zip(size, out, steps, strict=True))


def _cell(i: int, size: int, out: int, step: int) -> Taps:
    first = i * step if step else i * size // out
    end = min(first + step, size) if step else -(-(i + 1) * size // out)
    return Taps(first, (1.0 / (end - first),) * (end - first))


def _linear(i: int, size: int, out: int) -> Taps:
    place = max(size / out * (i + 0.5) - 0.5, 0.0)
    return _merged([(floor(place), 1.0 - place % 1), (floor(place) + 1, place % 1)], size)


def _cubic(i: int, size: int, out: int) -> Taps:
    place = size / out * (i + 0.5) - 0.5
    near = floor(place)
    return _merged([(near + n, _cubic_weight(near + n - place, _CUBIC)) for n in (-1, 0, 1, 2)], size)


def _antialiased(mode: str, i: int, size: int, out: int) -> Taps:
    scale = size / out
    wide = max(scale, 1.0)
    centre, support = scale * (i + 0.5), (1.0 if mode == "bilinear" else 2.0) * wide
    first, end = max(int(centre - support + 0.5), 0), min(int(centre + support + 0.5), size)
    places = [(at - centre + 0.5) / wide for at in range(first, end)]
    weights = [max(1.0 - abs(x), 0.0) if mode == "bilinear" else _cubic_weight(x, _CUBIC_ANTIALIASED) for x in places]
    return Taps(first, tuple(weight / sum(weights) for weight in weights))


def _cubic_weight(x: float, a: float) -> float:
    """Returns Keys' cubic convolution with parameter a at the distance x: Keys, 1981, eq. 15, where a is -0.5."""
    x = abs(x)
    if x < 1.0:
        return ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
    return (((x - 5.0) * x + 8.0) * x - 4.0) * a if x < 2.0 else 0.0


def _merged(taps: list[tuple[int, float]], size: int) -> Taps:
    """Inputs outside are those at the edge; weights of 0 at either end are left out."""
    weights: dict[int, float] = {}
    for at, weight in taps:
        at = min(max(at, 0), size - 1)
        weights[at] = weights.get(at, 0.0) + weight
    kept = [at for at, weight in weights.items() if weight != 0.0]
    return Taps(kept[0], tuple(weights[at] for at in range(kept[0], kept[-1] + 1)))


def pooled_grid(grid: Sizes, window: Sizes, size: Sizes, edges: str) -> Sizes:
    """Returns t', h', w' of each image, one after the other."""
    if not window:
        return tuple(size) if len(size) == len(grid) else tuple(size) * (len(grid) // 3)
    rounded = ceil if edges == "partial" else floor
    return tuple(rounded(n / window[at % 3]) for at, n in enumerate(grid))
