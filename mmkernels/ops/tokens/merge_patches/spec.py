"""The definition of merging patches: space to depth on a token grid, and a norm; its cases and benchmark shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from mmkernels.ops.common.cases import normal
from mmkernels.ops.common.dtypes import wide_dtype
from mmkernels.runtime.arguments import Differentiable, Sizes
from mmkernels.spec import Benchmark, Case, Cost, Inputs, OpSpec
from mmkernels.targets import BandwidthShare, Speedup


class Arguments(NamedTuple):
    """The record of `merge_patches`."""

    x: Differentiable  # [tokens, C] or [images, tokens, C]
    weight: Differentiable | None  # [C] or [C'], of the norm
    bias: Differentiable | None
    grid: Sizes  # t, h, w of each image, one after the other
    window: Sizes
    order: str  # "spatial", "channel" or "grouped"
    norm: str  # "layer", "rms", or "" for none
    norm_first: bool
    eps: float


class Results(NamedTuple):
    """What `merge_patches` returns."""

    y: Differentiable  # [tokens', C']


def merged_grid(grid: Sizes, window: Sizes) -> Sizes:
    """Returns t', h', w' of each image, one after the other, rounded up."""
    return tuple((size + window[at % 3] - 1) // window[at % 3] for at, size in enumerate(grid))


def count_tokens(grid: Sizes) -> int:
    """Returns how many tokens all images have."""
    return sum(prod(grid[at : at + 3]) for at in range(0, len(grid), 3))


def reference(args: Arguments) -> Tensor:
    """Returns [tokens', C'] by the naive formula."""
    x = args.x.flatten(0, -2)
    if not args.norm:
        return _gather(x, args)
    return _gather(_normalize(x, args), args) if args.norm_first else _normalize(_gather(x, args), args)


def reference_backward(args: Any) -> tuple[Tensor, ...]:
    """Returns the gradients, written out: autograd does not record inside of an op boundary."""
    x, grad = args.x.flatten(0, -2), args.grad_y
    of_weight = of_bias = None
    if args.norm and not args.norm_first:
        grad, of_weight, of_bias = _normalize_backward(_gather(x, args), grad, args)
    grad = _scatter(grad, args)
    if args.norm and args.norm_first:
        grad, of_weight, of_bias = _normalize_backward(x, grad, args)
    found = ((args.x, grad), (args.weight, of_weight), (args.bias, of_bias))
    needs = (args.need_x, args.need_weight, args.need_bias)
    return tuple(
        torch.empty_like(to, memory_format=torch.contiguous_format).copy_(given.view(to.shape))
        if need and to is not None and given is not None
        else args.x.new_empty(0)
        for (to, given), need in zip(found, needs, strict=True)
    )


def _runs(args: Any) -> Iterator[tuple[int, Sizes]]:
    """Images of the same grid that follow each other: how many, and their (t, h, w)."""
    for size, same in groupby(args.grid[at : at + 3] for at in range(0, len(args.grid), 3)):
        yield len(list(same)), tuple(size)


_AXES = {"spatial": (0, 1, 3, 5, 2, 4, 6, 7), "channel": (0, 1, 3, 5, 7, 2, 4, 6)}
"""Of [images, t', window t, h', window h, w', window w, C] in a merged token."""


def _gather(x: Tensor, args: Any) -> Tensor:
    """Space to depth: [tokens, C] -> [tokens', C']."""
    if args.order == "grouped":
        return torch.cat([x.unflatten(0, (x.shape[0] // prod(args.window), prod(args.window))).flatten(1)])
    parts, first = [], 0
    for images, size in _runs(args):
        part = x[first : first + images * prod(size)].unflatten(0, (images, *size))
        first += images * prod(size)
        t, h, w = (-n % step for n, step in zip(size, args.window, strict=True))
        part = F.pad(part, (0, 0, 0, w, 0, h, 0, t)) if t or h or w else part
        for axis in (3, 2, 1):
            part = part.unflatten(axis, (-1, args.window[axis - 1]))
        parts.append(part.permute(_AXES[args.order]).flatten(4).flatten(0, 3))
    return torch.cat(parts) if parts else x.repeat(1, prod(args.window))


def _scatter(y: Tensor, args: Any) -> Tensor:
    """Depth to space: [tokens', C'] -> [tokens, C]."""
    patches = prod(args.window)
    if args.order == "grouped":
        return y.unflatten(1, (patches, y.shape[1] // patches)).flatten(0, 1)
    parts, first = [], 0
    axes = _AXES[args.order]
    for images, size in _runs(args):
        merged = [-(-n // step) for n, step in zip(size, args.window, strict=True)]
        part = y[first : first + images * prod(merged)]
        first += images * prod(merged)
        whole = (images, *merged, *args.window, y.shape[1] // patches)
        inner = whole[4:] if args.order == "spatial" else (whole[7], *whole[4:7])
        part = part.reshape(images, *merged, *inner).permute([axes.index(axis) for axis in range(8)])
        part = part.flatten(5, 6).flatten(3, 4).flatten(1, 2)
        parts.append(part[:, : size[0], : size[1], : size[2]].flatten(0, 3))
    return torch.cat(parts) if parts else y[:, : y.shape[1] // patches]


def _normalize(x: Tensor, args: Any) -> Tensor:
    """In plain operators: the compiler knows no derivative of PyTorch's norms in forward mode."""
    y, _ = _unit(x.to(wide_dtype(x)), args)
    y = y if args.weight is None else y * args.weight
    return (y if args.bias is None else y + args.bias).to(x.dtype)


def _unit(x: Tensor, args: Any) -> tuple[Tensor, Tensor]:
    """Returns x normalized, without weights, and the factor that did so."""
    centred = x - x.mean(-1, keepdim=True) if args.norm == "layer" else x
    scale = (centred.square().mean(-1, keepdim=True) + args.eps).rsqrt()
    return centred * scale, scale


def _normalize_backward(x: Tensor, grad: Tensor, args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of x, weight and bias; sums are in float32, or float64."""
    x, grad = x.to(wide_dtype(x)), grad.to(wide_dtype(x))
    unit, scale = _unit(x, args)
    flow = grad if args.weight is None else grad * args.weight
    of_x = flow - unit * (flow * unit).mean(-1, keepdim=True)
    of_x = of_x - flow.mean(-1, keepdim=True) if args.norm == "layer" else of_x
    return of_x * scale, (grad * unit).sum(0), grad.sum(0)


def _case(id: str, channels: int, grid: Any, window: Sizes = (1, 2, 2), **more: Any) -> Case:
    norm, affine = more.get("norm"), more.pop("affine", True)
    grads = ("x", *(("weight", "bias") if norm == "layer" else ("weight",) if norm else ())[: 2 * affine])
    return Case(id, lambda g: _inputs(g, channels, grid, window, affine, **more), grads)


def _inputs(g: Generator, channels: int, grid: Any, window: Sizes, affine: bool = True, **more: Any) -> Inputs:
    images = more.pop("images", 0)
    shape = (images, prod(grid), channels) if images else (sum(prod(size) for size in grid), channels)
    inputs: Inputs = {"x": normal(g, *shape), "grid": grid, "window": window, **more}
    if "norm" in more and affine:
        width = channels * (1 if more.get("norm_first") else prod(window))
        inputs["weight"] = 1.0 + 0.2 * normal(g, width)
        if more["norm"] == "layer":
            inputs["bias"] = 0.2 * normal(g, width)
    return inputs


def _cost(inputs: Inputs, backward: bool) -> Cost:
    """Each element is read and written once; so are the gradients, and with a norm x again."""
    x, norm = inputs["x"], "norm" in inputs
    moved = 2 + (3 if norm else 2) * backward
    return Cost(x.numel() * (8.0 + 16.0 * backward if norm else 0.0), float(moved * x.numel() * x.element_size()))


def _tiles(images: int, **more: Any) -> Callable[[Generator], Inputs]:
    def make(g: Generator) -> Inputs:
        inputs = _inputs(g, 1024, (1, 32, 32), (1, 2, 2), images=images, **more)
        return inputs | {name: x.float() for name, x in inputs.items() if isinstance(x, Tensor)}

    return make


_NORM: dict[str, Any] = {"norm": "layer"}

SPEC = OpSpec(
    name="merge_patches",
    cases=(
        _case("layer norm of mixed resolutions", 12, ((1, 4, 6), (1, 2, 2), (2, 4, 2)), norm="layer"),
        _case("uniform", 8, (1, 4, 6), images=3),
        _case("channel major", 9, ((1, 4, 4), (1, 2, 6)), order="channel"),
        _case("channel major, layer norm first", 7, ((1, 4, 2),), order="channel", norm="layer", norm_first=True),
        _case("channel major, rms norm", 20, ((1, 4, 4),), order="channel", norm="rms"),
        _case("padded", 16, ((1, 3, 5), (1, 1, 1), (1, 2, 2)), pad=True),
        _case("padded, odd window, channel major", 5, ((3, 4, 5),), (2, 3, 3), pad=True, order="channel"),
        _case("padded, rms norm", 33, ((1, 3, 3),), pad=True, norm="rms"),
        _case("video, rms norm first", 17, (4, 2, 2), (2, 1, 2), images=2, norm="rms", norm_first=True),
        _case("grouped, layer norm first", 24, ((1, 4, 4), (1, 2, 2)), order="grouped", norm="layer", norm_first=True),
        _case("grouped, layer norm without weights", 40, ((1, 4, 2),), order="grouped", norm="layer", affine=False),
        _case("pairs of audio frames", 21, ((6, 1, 1), (2, 1, 1)), (2, 1, 1)),
        _case("no images", 6, (), norm="layer"),
    ),
    cost=_cost,
    benchmarks=(
        Benchmark(
            "13 tiles of 1024",
            _tiles(13),
            {"images": 13, "tokens": 1024, "C": 1024},
            ("x",),
            headline=True,
            targets=(
                *(Speedup(dtype, False, 1.8, "InternVL") for dtype in ("fp32", "bf16")),
                *(Speedup(dtype, False, 0.8, "clone") for dtype in ("fp32", "bf16")),
            ),
        ),
        Benchmark(
            "13 tiles of 1024, layer norm",
            _tiles(13, **_NORM),
            {"images": 13, "tokens": 1024, "C": 1024, "norm": "layer"},
            ("x", "weight", "bias"),
            targets=tuple(Speedup(dtype, False, 2.2, "InternVL") for dtype in ("fp32", "bf16")),
        ),
        Benchmark(
            "4 tiles of 1024",
            _tiles(4),
            {"images": 4, "tokens": 1024, "C": 1024},
            ("x",),
            targets=(
                *(Speedup(dtype, False, 1.8, "InternVL") for dtype in ("fp32", "bf16")),
                *(Speedup(dtype, False, 0.8, "clone") for dtype in ("fp32", "bf16")),
                BandwidthShare("bf16", False, 0.8, device="gpu"),
            ),
        ),
        Benchmark(
            "4 tiles of 1024, layer norm",
            _tiles(4, **_NORM),
            {"images": 4, "tokens": 1024, "C": 1024, "norm": "layer"},
            ("x", "weight", "bias"),
            targets=tuple(Speedup(dtype, False, 2.2, "InternVL") for dtype in ("fp32", "bf16")),
        ),
        Benchmark(
            "one image of 256",
            lambda g: _inputs(g, 1024, ((1, 16, 16),), (1, 2, 2)),
            {"images": 1, "tokens": 256, "C": 1024},
            ("x",),
            targets=(Speedup("fp32", False, 1.0, "InternVL"),),
        ),
    ),
)
