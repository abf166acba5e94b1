"""Pooling tokens in Triton: a program finds the tokens of one result, and adds a block of their channels."""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.ops.common.results import or_empty
from mmkernels.ops.common.triton.constants import INFINITY
from mmkernels.ops.common.triton.launch import ceil_div
from mmkernels.ops.tokens.merge_patches.plan import padded
from mmkernels.ops.tokens.merge_patches.spec import count_tokens
from mmkernels.ops.tokens.pool_tokens.axes import Axis, image_axes, transposed
from mmkernels.ops.tokens.triton.images import find_image, token_strides
from mmkernels.runtime.arguments import Sizes
from mmkernels.runtime.triton import launch
from mmkernels.runtime.tuning import config

OP = "pool_tokens"
_COLUMNS = tl.constexpr(16)
"""Of an image in `Tables.images`: first result, first token, t, h, w of what is read, t, h, w of the results, the first
entries of its axes t, h, w in `Tables.axes`, and of the forward pass' axes."""
_ENTRY = tl.constexpr(3)
"""Of a result along an axis in `Tables.axes`: its first input, how many, and where its weights begin."""


class Tables(NamedTuple):
    """int64 [images, 16], int32 [results along axes, 3], float32."""

    images: Any
    axes: Any
    weights: Any


class Taps(NamedTuple):
    """The inputs of a result.

    Args:
        image, entry: the image, and its row in the table.
        result: the result's number in the image.
        t, h, w: its entries in `Tables.axes`.
        count: how many inputs it has; count_h, count_w: along these axes.
    """

    image: Any
    entry: Any
    result: Any
    t: Any
    h: Any
    w: Any
    count: Any
    count_h: Any
    count_w: Any


@triton.jit
def taps_of(tables, row, images, STEPS: tl.constexpr):
    """Returns the `Taps` of a result."""
    image = find_image(tables.images, row, images, STEPS, _COLUMNS)
    entry = tables.images + image * _COLUMNS
    result = row - tl.load(entry)
    high, wide = tl.load(entry + 6), tl.load(entry + 7)
    t = tables.axes + (tl.load(entry + 8) + result // (high * wide)) * _ENTRY
    h = tables.axes + (tl.load(entry + 9) + result // wide % high) * _ENTRY
    w = tables.axes + (tl.load(entry + 10) + result % wide) * _ENTRY
    count_h, count_w = tl.load(h + 1), tl.load(w + 1)
    taps = Taps(image, entry, result, t, h, w, tl.load(t + 1) * count_h * count_w, count_h, count_w)
    return taps


@triton.jit
def tap_of(tables, taps, n):
    """Returns the number of a result's n-th input in its image, and its weight."""
    t, h, w = n // (taps.count_h * taps.count_w), n // taps.count_w % taps.count_h, n % taps.count_w
    weight = tl.load(tables.weights + tl.load(taps.t + 2) + t)
    weight *= tl.load(tables.weights + tl.load(taps.h + 2) + h)
    weight *= tl.load(tables.weights + tl.load(taps.w + 2) + w)
    place = (tl.load(taps.t) + t) * tl.load(taps.entry + 3) + tl.load(taps.h) + h
    return place * tl.load(taps.entry + 4) + tl.load(taps.w) + w, weight


@triton.jit
def local_number(tables, taps, n):
    """Returns which of the inputs of its n-th output, along the forward pass' axes, this input is."""
    out_h, out_w = n // taps.count_w % taps.count_h, n % taps.count_w
    high, wide = tl.load(taps.entry + 6), tl.load(taps.entry + 7)
    t = tl.load(taps.entry + 11) + tl.load(taps.t) + n // (taps.count_h * taps.count_w)
    h = tables.axes + (tl.load(taps.entry + 12) + tl.load(taps.h) + out_h) * _ENTRY
    w = tables.axes + (tl.load(taps.entry + 13) + tl.load(taps.w) + out_w) * _ENTRY
    from_t = taps.result // (high * wide) - tl.load(tables.axes + t * _ENTRY)
    from_h, from_w = taps.result // wide % high - tl.load(h), taps.result % wide - tl.load(w)
    return (from_t * tl.load(h + 1) + from_h) * tl.load(w + 1) + from_w


@triton.jit
def pool_kernel(
    x, y, index, scores, lse, tables, strides, images, CHANNELS: tl.constexpr, MODE: tl.constexpr,
    STEPS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Store a block of channels of a result. Grid: (results, blocks). For gradients of sums x and y are these."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    live = c < CHANNELS
    taps = taps_of(tables, row, images, STEPS)
    first = tl.load(taps.entry + 1)
    top = -INFINITY
    if MODE == "attention":
        for n in range(0, taps.count):
            at, _ = tap_of(tables, taps, n)
            score = tl.load(scores + first + at)
            top = tl.where((score > top) | (score != score), score, top)
    begin = tl.load(taps.entry + 14)  # of the rows in memory: 0 where images have a stride of their own
    base = x + taps.image * strides.image + begin * strides.token + c * strides.channel
    total = tl.zeros([BLOCK_C], tl.float32)
    which = tl.zeros([BLOCK_C], tl.int32)
    weights = 0.0
    for n in range(0, taps.count):
        at, weight = tap_of(tables, taps, n)
        token = tl.load(base + at * strides.token, mask=live, other=0.0).to(tl.float32)
        if MODE == "max":
            takes = (token > total) | ((token != token) & (total == total)) | (n == 0)
            total = tl.where(takes, token, total)
            which = tl.where(takes, n, which)
        elif MODE == "attention":
            weight = tl.exp(tl.load(scores + first + at) - top)
            weights += weight
            total += weight * token
        else:
            total += weight * token
    if MODE == "attention":
        total /= weights
        if tl.program_id(1) == 0:
            tl.store(lse + row, top + tl.log(weights))
    tl.store(y + row * CHANNELS + c, total.to(y.dtype.element_ty), mask=live)
    if MODE == "max":
        tl.store(index + row * CHANNELS + c, which, mask=live)


@triton.jit
def max_backward_kernel(
    grad_x, grad_y, index, tables, strides, images, CHANNELS: tl.constexpr, STEPS: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Store the gradient of a block of channels of a token. Grid: (tokens, blocks)."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    live = c < CHANNELS
    taps = taps_of(tables, row, images, STEPS)
    first = tl.load(taps.entry + 1)
    total = tl.zeros([BLOCK_C], tl.float32)
    for n in range(0, taps.count):
        at, _ = tap_of(tables, taps, n)
        which = tl.load(index + (first + at) * CHANNELS + c, mask=live, other=-1)
        grad = tl.load(grad_y + (first + at) * strides.token + c * strides.channel, mask=live, other=0.0)
        total += tl.where(which == local_number(tables, taps, n), grad.to(tl.float32), 0.0)
    tl.store(grad_x + row * CHANNELS + c, total.to(grad_x.dtype.element_ty), mask=live)


@triton.jit
def mean_product_kernel(
    x, scores, lse, mean, grad_y, tables, x_strides, strides, images,
    CHANNELS: tl.constexpr, STEPS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Store the weighted mean of the products of a result's gradient with its tokens. Grid: (results,).

    It is not grad_y . y: y may be rounded to 16 bits, which is off by more than what is left where one token has all of
    the weight.
    """
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    live = c < CHANNELS
    taps = taps_of(tables, row, images, STEPS)
    first, begin = tl.load(taps.entry + 1), tl.load(taps.entry + 14)
    base = x + taps.image * x_strides.image + begin * x_strides.token + c * x_strides.channel
    grad = tl.load(grad_y + row * strides.token + c * strides.channel, mask=live, other=0.0).to(tl.float32)
    top, total = tl.load(lse + row), 0.0
    for n in range(0, taps.count):
        at, _ = tap_of(tables, taps, n)
        token = tl.load(base + at * x_strides.token, mask=live, other=0.0).to(tl.float32)
        total += tl.exp(tl.load(scores + first + at) - top) * tl.sum(grad * token, 0)
    tl.store(mean + row, total)


@triton.jit
def attention_backward_kernel(
    x, scores, lse, mean, grad_x, grad_scores, grad_y, tables, x_strides, strides, images,
    CHANNELS: tl.constexpr, STEPS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Store the gradient of a token and of its score. Grid: (tokens,). grad_x, grad_scores: None where not needed."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    live = c < CHANNELS
    taps = taps_of(tables, row, images, STEPS)
    first, begin = tl.load(taps.entry + 1), tl.load(taps.entry + 15)
    place = taps.image * x_strides.image + (begin + taps.result) * x_strides.token
    token = tl.load(x + place + c * x_strides.channel, mask=live, other=0.0).to(tl.float32)
    score, of_score = tl.load(scores + row), 0.0
    total = tl.zeros([BLOCK_C], tl.float32)
    for n in range(0, taps.count):
        at, _ = tap_of(tables, taps, n)
        at += first
        weight = tl.exp(score - tl.load(lse + at))
        grad = tl.load(grad_y + at * strides.token + c * strides.channel, mask=live, other=0.0).to(tl.float32)
        total += weight * grad
        if grad_scores is not None:
            of_score += weight * (tl.sum(grad * token, 0) - tl.load(mean + at))
    if grad_x is not None:
        tl.store(grad_x + row * CHANNELS + c, total.to(grad_x.dtype.element_ty), mask=live)
    if grad_scores is not None:
        tl.store(grad_scores + row, of_score)


class _Layout(NamedTuple):
    """What the tables of a call follow from."""

    device: torch.device
    grid: Sizes
    out: Sizes
    window: Sizes
    mode: str
    antialias: bool
    batched: bool


@lru_cache(maxsize=64)
def _tables(layout: _Layout, backward: bool) -> Tables:
    """Returns the tables on the device. The host knows all of it, so that nothing waits."""
    images: list[tuple[int, ...]] = []
    entries: list[tuple[int, int, int]] = []
    weights: list[float] = []
    known: dict[Axis, int] = {}

    def place(axis: Axis) -> int:
        if axis not in known:
            known[axis] = len(entries)
            for taps in axis:
                entries.append((taps.first, len(taps.weights), len(weights)))
                weights.extend(taps.weights)
        return known[axis]

    token = row = 0
    for at in range(0, len(layout.grid), 3):
        size, out = layout.grid[at : at + 3], layout.out[at : at + 3]
        forward = image_axes(layout.mode, layout.antialias, size, out, layout.window)
        used = tuple(map(transposed, forward, size)) if backward else forward
        read, results = (row, token) if backward else (token, row)
        sizes = (*out, *size) if backward else (*size, *out)
        axes = (*map(place, used), *map(place, forward))
        begin = 0 if layout.batched else token  # of the image's tokens in x
        images.append((results, read, *sizes, *axes, read if backward else begin, begin))
        token, row = token + prod(size), row + prod(out)
    tensors = (
        torch.tensor(images, dtype=torch.int64).view(-1, 16),
        torch.tensor(entries, dtype=torch.int32).view(-1, 3),
        torch.tensor(weights, dtype=torch.float32),
    )
    if layout.device.type == "cuda":
        tensors = tuple(x.pin_memory().to(layout.device, non_blocking=True) for x in tensors)  # type: ignore[assignment]
    return Tables(*tensors)


class _Call:
    """What both passes prepare."""

    def __init__(self, args: Any, *, backward: bool) -> None:
        x = args.x
        grid, out, window = tuple(args.grid), tuple(args.out), tuple(args.window)
        layout = _Layout(x.device, grid, out, window, args.mode, args.antialias, x.dim() == 3)
        self.tables = _tables(layout, backward)
        self.rows = count_tokens(grid if backward else out)
        self.images, self.channels = len(grid) // 3, x.shape[-1]
        kernel = "token" if backward and args.mode == "attention" else "pool"
        self.config = config(OP, kernel, x.device, x.dtype, self.channels)
        block = min(padded(self.channels), self.config.block_k)
        self.blocks = ceil_div(self.channels, block)
        steps = (self.images - 1).bit_length() if self.images else 0
        self.constants = {"CHANNELS": self.channels, "STEPS": steps, "BLOCK_C": block}


def _scores(args: Any) -> Tensor | None:
    return None if args.scores is None else args.scores.float().contiguous()


def forward(args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Returns [tokens', C], and what the backward pass needs."""
    call, x = _Call(args, backward=False), args.x
    y = x.new_empty(call.rows, call.channels)
    index = x.new_empty((call.rows, call.channels) if args.mode == "max" else (0,), dtype=torch.int32)
    lse = x.new_empty(call.rows if args.mode == "attention" else 0, dtype=torch.float32)
    launch(
        pool_kernel, (call.rows, call.blocks), call.config,
        x, y, index, _scores(args), lse, call.tables, token_strides(x), call.images,
        MODE=args.mode if args.mode in ("max", "attention") else "sum", **call.constants,
    )  # fmt: skip
    return y, index, lse


def backward(args: Any) -> tuple[Tensor, Tensor]:
    """Returns the gradients of x and scores."""
    call, x = _Call(args, backward=True), args.x
    flow, grad_x = token_strides(args.grad_y), x.new_empty(x.shape) if args.need_x else None
    grid = (call.rows, call.blocks)
    if args.mode == "attention":
        scores, lse, of_scores, mean = _scores(args), args.lse.contiguous(), None, None
        if args.need_scores:
            of_scores, mean = x.new_empty(args.scores.shape, dtype=torch.float32), torch.empty_like(lse)
            launch(
                mean_product_kernel, (len(lse),), call.config,
                x, scores, lse, mean, args.grad_y, _Call(args, backward=False).tables, token_strides(x), flow,
                call.images, **call.constants,
            )  # fmt: skip
        launch(
            attention_backward_kernel, grid[:1], call.config,
            x, scores, lse, mean, grad_x, of_scores, args.grad_y, call.tables, token_strides(x), flow, call.images,
            **call.constants,
        )  # fmt: skip
        return or_empty(grad_x, x), or_empty(None if of_scores is None else of_scores.to(x.dtype), x)
    if grad_x is None:
        return or_empty(None, x), or_empty(None, x)
    if args.mode == "max":
        launch(
            max_backward_kernel, grid, call.config,
            grad_x, args.grad_y, args.which.contiguous(), call.tables, flow, call.images, **call.constants,
        )  # fmt: skip
    else:
        launch(
            pool_kernel, grid, call.config,
            args.grad_y, grad_x, None, None, None, call.tables, flow, call.images, MODE="sum", **call.constants,
        )  # fmt: skip
    return grad_x, or_empty(None, x)
