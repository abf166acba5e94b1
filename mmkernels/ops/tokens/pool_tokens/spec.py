"""The definition of pooling tokens: sums over runs along t, h and w; its cases and benchmark shapes."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from mmkernels.ops.common.cases import normal
from mmkernels.ops.common.dtypes import wide_dtype
from mmkernels.ops.tokens.pool_tokens.axes import Axis, image_axes
from mmkernels.runtime.arguments import Differentiable, Sizes
from mmkernels.spec import Benchmark, Case, Cost, Inputs, OpSpec
from mmkernels.targets import BandwidthShare, Speedup


class Arguments(NamedTuple):
    """The record of `pool_tokens`."""

    x: Differentiable  # [tokens, C] or [images, tokens, C]
    scores: Differentiable | None  # [tokens] or [images, tokens], of mode "attention"
    grid: Sizes  # t, h, w of each image, one after the other
    out: Sizes  # t', h', w' of each
    window: Sizes  # (): the grid is cut into t' x h' x w' parts, or resized
    mode: str
    antialias: bool


class Results(NamedTuple):
    """What `pool_tokens` returns."""

    y: Differentiable  # [tokens', C]
    which: Tensor  # int32 [tokens', C], of mode "max": which token of its part is the largest; else empty
    lse: Tensor  # [tokens'], of mode "attention": of the scores of a part, float32 or float64; else empty


class Cells(NamedTuple):
    """The parts of the grid that tokens are pooled from.

    Args:
        tokens: int64 [tokens', most tokens of a part]; past the end of a part its first token.
        live: bool, of the same shape.
    """

    tokens: Tensor
    live: Tensor


def axes(args: Any) -> Iterator[tuple[Axis, ...]]:
    """The axes of each image."""
    for at in range(0, len(args.grid), 3):
        size, out = tuple(args.grid[at : at + 3]), tuple(args.out[at : at + 3])
        yield image_axes(args.mode, args.antialias, size, out, tuple(args.window))


def reference(args: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """The naive formula: a matrix for each axis, or the tokens of each part gathered."""
    x, wide = args.x.flatten(0, -2), wide_dtype(args.x)
    none = x.new_empty(0, dtype=torch.int32), x.new_empty(0, dtype=wide)
    if args.mode not in ("max", "attention"):
        return _resize(x.to(wide), args, transpose=False).to(x.dtype), *none
    cells = _cells(args, x.device)
    parts = x[cells.tokens]  # [tokens', most, C]
    if args.mode == "max":
        if not len(parts):
            return x.repeat(1, 1)[:0], none[0].view(0, 1).repeat(1, x.shape[1]), none[1]
        y, which = parts.masked_fill(~cells.live[..., None], -torch.inf).max(1)
        return y, which.to(torch.int32), none[1]
    assert args.scores is not None
    scores = args.scores.flatten().to(wide)[cells.tokens].masked_fill(~cells.live, -torch.inf)
    weights = scores.softmax(1) if len(parts) else scores
    return (weights[..., None] * parts.to(wide)).sum(1).to(x.dtype), none[0], scores.detach().logsumexp(1)


def reference_backward(args: Any) -> tuple[Tensor, Tensor]:
    """Returns the gradients, written out: autograd does not record inside of an op boundary."""
    x, wide = args.x.flatten(0, -2), wide_dtype(args.x)
    grad, of_scores = args.grad_y.to(wide), x.new_empty(0)
    if args.mode not in ("max", "attention"):
        of_x = _resize(grad, args, transpose=True)
    else:
        cells = _cells(args, x.device)
        of_x = torch.zeros(x.shape, dtype=wide, device=x.device)
        if args.mode == "max":
            rows = cells.tokens.gather(1, args.which.long()) if len(grad) else args.which.long()
            of_x = of_x.scatter_add(0, rows, grad)
        else:
            scores = args.scores.flatten().to(wide)
            weights = (scores[cells.tokens] - args.lse[:, None]).exp().masked_fill(~cells.live, 0.0)
            of_x = of_x.index_add(0, cells.tokens.flatten(), (weights[..., None] * grad[:, None]).flatten(0, 1))
            products = (grad[:, None] * x[cells.tokens].to(wide)).sum(-1)
            # Their mean, not that of the results: a rounded result is off by more than what is left where one token
            # has all of the weight.
            flows = products - (weights * products).sum(1, keepdim=True)
            of_scores = torch.zeros_like(scores).index_add(0, cells.tokens.flatten(), (weights * flows).flatten())
            of_scores = of_scores.view(args.scores.shape).to(args.scores.dtype)
    need_scores = args.need_scores and args.scores is not None
    return (
        of_x.to(x.dtype).reshape(args.x.shape).contiguous() if args.need_x else x.new_empty(0),
        of_scores if need_scores else x.new_empty(0),
    )


def _cells(args: Any, device: torch.device) -> Cells:
    rows: list[list[int]] = []
    first = 0
    for at, (of_t, of_h, of_w) in zip(range(0, len(args.grid), 3), axes(args), strict=True):
        t, h, w = args.grid[at : at + 3]
        rows += [
            [
                first + ((a + i) * h + b + j) * w + c + k
                for i in range(len(ts))
                for j in range(len(hs))
                for k in range(len(ws))
            ]
            for a, ts in of_t
            for b, hs in of_h
            for c, ws in of_w
        ]
        first += t * h * w
    most = max([len(row) for row in rows] + [0])
    index = [row + row[:1] * (most - len(row)) for row in rows]
    live = [[True] * len(row) + [False] * (most - len(row)) for row in rows]
    shape = (len(rows), most)
    return Cells(
        torch.tensor(index, dtype=torch.int64, device=device).view(shape),
        torch.tensor(live, dtype=torch.bool, device=device).view(shape),
    )


def _resize(x: Tensor, args: Any, *, transpose: bool) -> Tensor:
    """Sums along one axis after the other: [tokens, C] -> [tokens', C], or the other way round."""
    parts, first = [], 0
    sizes = args.out if transpose else args.grid
    for at, each in zip(range(0, len(args.grid), 3), axes(args), strict=True):
        size = tuple(sizes[at : at + 3])
        part = x[first : first + prod(size)].unflatten(0, size)
        first += prod(size)
        for dim, axis in enumerate(each):
            part = part.movedim(dim, 0)
            part = _along_transposed(part, axis, args.grid[at + dim]) if transpose else _along(part, axis)
            part = part.movedim(0, dim)
        parts.append(part.reshape(-1, x.shape[1]))
    return torch.cat(parts) if parts else x.repeat(1, 1)


def _along(x: Tensor, axis: Axis) -> Tensor:
    """Returns the results along the first axis. NaN and infinity reach only those that take them."""
    index, weights = _taps(axis, x)
    return torch.where(weights != 0, x[index] * weights, 0.0).sum(1)


def _along_transposed(grad: Tensor, axis: Axis, size: int) -> Tensor:
    index, weights = _taps(axis, grad)
    flows = torch.where(weights != 0, grad[:, None] * weights, 0.0)
    return grad.new_zeros(size, *grad.shape[1:]).index_add(0, index.flatten(), flows.flatten(0, 1))


def _taps(axis: Axis, like: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the inputs of each result, int64 [results, most], and their weights, [results, most, 1, 1, 1]."""
    most = max([len(taps.weights) for taps in axis])
    index = [[taps.first + (n if n < len(taps.weights) else 0) for n in range(most)] for taps in axis]
    weights = [list(taps.weights) + [0.0] * (most - len(taps.weights)) for taps in axis]
    return (
        torch.tensor(index, dtype=torch.int64, device=like.device),
        torch.tensor(weights, dtype=like.dtype, device=like.device)[..., None, None, None],
    )


def _case(id: str, channels: int, grid: Any, window: Any = None, **more: Any) -> Case:
    grads = ("x", "scores") if more.get("mode") == "attention" else ("x",)
    return Case(id, lambda g: _inputs(g, channels, grid, window, **more), grads)


def _inputs(g: Generator, channels: int, grid: Any, window: Any = None, **more: Any) -> Inputs:
    images = more.pop("images", 0)
    shape = (images, prod(grid)) if images else (sum(prod(size) for size in grid),)
    inputs: Inputs = {"x": normal(g, *shape, channels), "grid": grid, **more}
    if window is not None:
        inputs["window"] = window
    if more.get("mode") == "attention":
        inputs["scores"] = 2.0 * normal(g, *shape)
    return inputs


def _cost(inputs: Inputs, backward: bool) -> Cost:
    """Each element of x and y is read or written once; so are the gradients."""
    x = inputs["x"]
    tokens = x.numel() // max(x.shape[-1], 1)
    if inputs.get("window") is not None:
        shrunk: float = prod(inputs["window"])
    else:
        grids = inputs["grid"] if isinstance(inputs["grid"][0], tuple) else [inputs["grid"]]
        size = inputs["size"] if isinstance(inputs["size"][0], tuple) else [inputs["size"]] * len(grids)
        shrunk = sum(map(prod, grids)) / sum(map(prod, size))
    moved = (1.0 + backward) * tokens * (1.0 + 1.0 / shrunk) * x.shape[-1]
    return Cost(2.0 * x.numel() * (1.0 + backward), moved * x.element_size())


def _photos(count: int) -> list[tuple[int, int, int]]:
    """Grids of 200 to 4,000 tokens and of several aspect ratios, even along each axis."""
    sides = ((14, 16), (16, 24), (24, 24), (32, 24), (26, 40), (48, 32), (64, 40), (62, 64))
    return [(1, *sides[n % len(sides)]) for n in range(count)]


_OF_CLONE = 0.7 * 2 / 1.25
"""The ratio to a copy of x at 70 % of its bytes a second: it reads and writes x, pooling of 2 x 2 writes a quarter."""

SPEC = OpSpec(
    name="pool_tokens",
    cases=(
        _case("attention over windows", 12, ((1, 4, 6), (2, 2, 2)), (1, 2, 2), mode="attention"),
        _case("mean, uniform", 24, (1, 4, 6), (1, 2, 2), images=3),
        _case("mean, adaptive", 9, ((1, 5, 7), (1, 2, 3)), size=(1, 3, 2)),
        _case("mean, partial windows of a video", 17, ((3, 3, 5),), (2, 2, 2), edges="partial"),
        _case("mean of pairs of audio frames", 40, ((7, 1, 1), (4, 1, 1)), (2, 1, 1), edges="drop"),
        _case("max", 33, ((1, 4, 4), (1, 2, 6)), (1, 2, 2), mode="max"),
        _case("max, adaptive", 7, (2, 5, 5), size=(1, 3, 3), mode="max", images=2),
        _case("attention, adaptive", 20, (1, 5, 5), size=(1, 3, 2), mode="attention", images=2),
        _case("bilinear, larger and smaller", 16, ((1, 2, 3), (1, 4, 4)), size=((1, 3, 4), (1, 2, 3)), mode="bilinear"),
        _case("bilinear, of a video", 5, ((3, 2, 3),), size=(2, 3, 2), mode="bilinear"),
        _case("bicubic", 21, ((1, 2, 5),), size=(1, 3, 2), mode="bicubic"),
        _case("bicubic, antialias", 18, ((1, 5, 4), (1, 2, 2)), size=(1, 2, 3), mode="bicubic", antialias=True),
        _case("one token from many", 13, ((1, 7, 9),), size=(1, 1, 1)),
        _case("no images", 6, (), (1, 2, 2)),
    ),
    cost=_cost,
    benchmarks=(
        Benchmark(
            "64 photos, mean",
            lambda g: _inputs(g, 1024, _photos(64), (1, 2, 2)),
            {"images": 64, "tokens": "224 to 3968", "C": 1024},
            targets=(
                *(Speedup(dtype, False, 3.0, "loop") for dtype in ("fp32", "bf16")),
                *(Speedup(dtype, False, _OF_CLONE, "clone") for dtype in ("fp32", "bf16")),
                BandwidthShare("bf16", False, 0.8, device="gpu"),
            ),
        ),
        Benchmark(
            "64 photos, bilinear",
            lambda g: _inputs(g, 1024, _photos(64), size=(1, 14, 14), mode="bilinear"),
            {"images": 64, "tokens": "224 to 3968", "C": 1024},
            targets=(Speedup("fp32", False, 3.0, "loop"),),
        ),
        Benchmark(
            "8 photos, mean",
            lambda g: _inputs(g, 1024, _photos(8), (1, 2, 2)),
            {"images": 8, "tokens": "224 to 3968", "C": 1024},
            ("x",),
            headline=True,
            targets=(Speedup("fp32", False, 3.0, "loop"), Speedup("fp32", False, _OF_CLONE, "clone")),
        ),
        Benchmark(
            "one image of 256",
            lambda g: _inputs(g, 1024, ((1, 16, 16),), (1, 2, 2)),
            {"images": 1, "tokens": 256, "C": 1024},
            ("x",),
            targets=(Speedup("fp32", False, 1.0, "loop"),),
        ),
    ),
)
