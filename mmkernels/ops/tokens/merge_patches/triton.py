"""Merging patches in Triton: one program holds the patches of a merged token, and a norm's sums with them."""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.ops.common.results import or_empty
from mmkernels.ops.common.triton.launch import ceil_div
from mmkernels.ops.tokens.merge_patches.plan import padded
from mmkernels.ops.tokens.merge_patches.spec import count_tokens, merged_grid
from mmkernels.ops.tokens.triton.images import COLUMNS, TokenStrides, find_image, image_table, token_strides
from mmkernels.runtime.triton import launch, multiprocessors
from mmkernels.runtime.tuning import config

OP = "merge_patches"
_PROGRAMS = 4  # of the backward pass of a norm, on one multiprocessor


class Window(NamedTuple):
    """What is known when a kernel is compiled: a constexpr.

    Args:
        T, H, W, PATCHES: of a window.
        ORDER: as the op's.
        CHANNELS: of a token.
        STEPS: of the bisection that finds a row's image.
        NORM, FIRST: as the op's.
        BLOCK_P, BLOCK_C: patches and channels of a tile.
    """

    T: int
    H: int
    W: int
    PATCHES: int
    ORDER: str
    CHANNELS: int
    STEPS: int
    NORM: str
    FIRST: bool
    BLOCK_P: int
    BLOCK_C: int


class Tokens(NamedTuple):
    """The patches of a merged token: [BLOCK_P] their images, tokens in these, and whether they exist."""

    image: Any
    token: Any
    inside: Any


@triton.jit
def patches_of(table, row, images, WINDOW: tl.constexpr):
    """Returns the `Tokens` of a row of the output."""
    k = tl.arange(0, WINDOW.BLOCK_P)
    image = find_image(table, row, images, WINDOW.STEPS).to(tl.int64)
    entry = table + image * COLUMNS
    row = row - tl.load(entry)
    first, inside = tl.load(entry + 1), k < WINDOW.PATCHES
    if WINDOW.ORDER == "grouped":
        token = row * WINDOW.PATCHES + k
    else:
        out_h, out_w = tl.load(entry + 6), tl.load(entry + 7)
        t = row // (out_h * out_w) * WINDOW.T + k // (WINDOW.H * WINDOW.W)
        h = row // out_w % out_h * WINDOW.H + k // WINDOW.W % WINDOW.H
        w = row % out_w * WINDOW.W + k % WINDOW.W
        size_h, size_w = tl.load(entry + 3), tl.load(entry + 4)
        inside = inside & (t < tl.load(entry + 2)) & (h < size_h) & (w < size_w)
        token = (t * size_h + h) * size_w + w
    tokens = Tokens(image, first + token, inside)
    return tokens


@triton.jit
def place_in_row(c, WINDOW: tl.constexpr):
    """Returns where the elements [BLOCK_P, BLOCK_C] of a tile lie in a merged token."""
    k = tl.arange(0, WINDOW.BLOCK_P)
    if WINDOW.ORDER == "channel":
        place = c[None, :] * WINDOW.PATCHES + k[:, None]
    else:
        place = k[:, None] * WINDOW.CHANNELS + c[None, :]
    return place


@triton.jit
def token_places(tokens, strides, c):
    """Returns the offsets [BLOCK_P, BLOCK_C] of the patches in x."""
    return (tokens.image * strides.image + tokens.token * strides.token)[:, None] + c[None, :] * strides.channel


@triton.jit
def mean_of(x, WINDOW: tl.constexpr):
    """Returns the mean, [BLOCK_P, 1] or [1, 1], over what is normalized together; x is 0 outside."""
    total = tl.sum(x, 1, keep_dims=True)
    if WINDOW.FIRST:
        mean = total / WINDOW.CHANNELS
    else:
        mean = tl.sum(total, 0, keep_dims=True) / (WINDOW.CHANNELS * WINDOW.PATCHES)
    return mean


@triton.jit
def unit_of(x, live, eps, WINDOW: tl.constexpr):
    """Returns x normalized, without weights, and the factor that did so."""
    if WINDOW.NORM == "layer":
        x = tl.where(live, x - mean_of(x, WINDOW), 0.0)
    scale = 1.0 / tl.sqrt(mean_of(x * x, WINDOW) + eps)
    return x * scale, scale


@triton.jit
def parameter(p, place, c, live, WINDOW: tl.constexpr):
    """Returns the elements of a weight or bias that belong to a tile, in float32."""
    if WINDOW.FIRST:
        values = tl.load(p + c, mask=c < WINDOW.CHANNELS, other=0.0).to(tl.float32)[None, :]
    else:
        values = tl.load(p + place, mask=live, other=0.0).to(tl.float32)
    return values


@triton.jit
def merge_kernel(x, y, weight, bias, table, strides, images, eps, WINDOW: tl.constexpr):
    """Store a merged token, or with no norm a block of its channels. Grid: (rows, blocks of channels)."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * WINDOW.BLOCK_C + tl.arange(0, WINDOW.BLOCK_C)
    tokens = patches_of(table, row, images, WINDOW)
    exists = (c < WINDOW.CHANNELS)[None, :]
    inside = tokens.inside[:, None] & exists
    tile = tl.load(x + token_places(tokens, strides, c), mask=inside, other=0.0)
    place = place_in_row(c, WINDOW)
    live = (tl.arange(0, WINDOW.BLOCK_P) < WINDOW.PATCHES)[:, None] & exists
    if WINDOW.NORM != "":
        tile, _ = unit_of(tile.to(tl.float32), inside if WINDOW.FIRST else live, eps, WINDOW)
        if weight is not None:
            tile *= parameter(weight, place, c, live, WINDOW)
        if bias is not None:
            tile += parameter(bias, place, c, live, WINDOW)
        if WINDOW.FIRST:
            tile = tl.where(inside, tile, 0.0)
    tl.store(y + row * WINDOW.PATCHES * WINDOW.CHANNELS + place, tile.to(y.dtype.element_ty), mask=live)


@triton.jit
def copy_backward_kernel(grad_x, grad_y, table, strides, flow, images, WINDOW: tl.constexpr):
    """Store the gradient of the patches of a row, with no norm. Grid: (rows, blocks of channels)."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * WINDOW.BLOCK_C + tl.arange(0, WINDOW.BLOCK_C)
    tokens = patches_of(table, row, images, WINDOW)
    inside = tokens.inside[:, None] & (c < WINDOW.CHANNELS)[None, :]
    tile = tl.load(grad_y + row * flow.token + place_in_row(c, WINDOW) * flow.channel, mask=inside, other=0.0)
    tl.store(grad_x + token_places(tokens, strides, c), tile, mask=inside)


@triton.jit
def norm_backward_kernel(
    x, grad_x, grad_y, weight, of_weight, of_bias, table, x_strides, strides, flow, images, rows, eps,
    WINDOW: tl.constexpr,
):  # fmt: skip
    """Store the gradient of x, and the program's sums for weight and bias. Grid: (programs,).

    grad_x, of_weight, of_bias: None where not needed. of_weight, of_bias: float32 [programs, channels of a norm].
    """
    c = tl.arange(0, WINDOW.BLOCK_C)
    exists = (c < WINDOW.CHANNELS)[None, :]
    place = place_in_row(c, WINDOW)
    live = (tl.arange(0, WINDOW.BLOCK_P) < WINDOW.PATCHES)[:, None] & exists
    BLOCK_P: tl.constexpr = WINDOW.BLOCK_P  # Triton 3.6 takes no shape from a tuple's fields
    BLOCK_C: tl.constexpr = WINDOW.BLOCK_C
    weights = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    biases = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for number in range(tl.program_id(0), rows, tl.num_programs(0)):
        row = tl.full((), 0, tl.int64) + number
        tokens = patches_of(table, row, images, WINDOW)
        inside = tokens.inside[:, None] & exists
        normal = inside if WINDOW.FIRST else live
        tile = tl.load(x + token_places(tokens, x_strides, c), mask=inside, other=0.0).to(tl.float32)
        unit, scale = unit_of(tile, normal, eps, WINDOW)
        grad = tl.load(grad_y + row * flow.token + place * flow.channel, mask=normal, other=0.0).to(tl.float32)
        weights += grad * unit
        biases += grad
        if grad_x is not None:
            if weight is not None:
                grad *= parameter(weight, place, c, live, WINDOW)
            grad -= unit * mean_of(grad * unit, WINDOW) + (mean_of(grad, WINDOW) if WINDOW.NORM == "layer" else 0.0)
            tl.store(grad_x + token_places(tokens, strides, c), (grad * scale).to(grad_x.dtype.element_ty), mask=inside)
    if of_weight is not None:
        store_sums(of_weight, weights, place, c, live, WINDOW)
    if of_bias is not None:
        store_sums(of_bias, biases, place, c, live, WINDOW)


@triton.jit
def store_sums(to, sums, place, c, live, WINDOW: tl.constexpr):
    """Store a program's sums for a weight or bias."""
    if WINDOW.FIRST:
        to += tl.program_id(0).to(tl.int64) * WINDOW.CHANNELS
        tl.store(to + c, tl.sum(sums, 0), mask=c < WINDOW.CHANNELS)
    else:
        tl.store(to + tl.program_id(0).to(tl.int64) * WINDOW.CHANNELS * WINDOW.PATCHES + place, sums, mask=live)


class _Call:
    """What both passes prepare."""

    def __init__(self, args: Any) -> None:
        x, patches = args.x, prod(args.window)
        channels = x.shape[-1]
        out = merged_grid(args.grid, args.window)
        self.rows, self.width = count_tokens(out), channels * patches
        self.images = len(args.grid) // 3
        self.config = config(OP, "norm" if args.norm else "copy", x.device, x.dtype, channels)
        block_p, block_c = padded(patches), padded(channels)
        if not args.norm:
            block_c = min(block_c, max(1, self.config.block_k // block_p))
        self.weight, self.bias = (None if p is None else p.contiguous() for p in (args.weight, args.bias))
        self.blocks = ceil_div(channels, block_c)
        self.table = image_table(x.device, tuple(args.grid), out, x.dim() == 3) if self.rows else None
        steps = (self.images - 1).bit_length() if self.images else 0
        t, h, w = args.window
        self.window = Window(
            t, h, w, patches, args.order, channels, steps, args.norm, args.norm_first, block_p, block_c
        )


def forward(args: Any) -> Tensor:
    """Returns [tokens', C']."""
    call = _Call(args)
    y: Tensor = args.x.new_empty(call.rows, call.width)
    launch(
        merge_kernel, (call.rows, call.blocks), call.config,
        args.x, y, call.weight, call.bias, call.table, token_strides(args.x), call.images, args.eps, WINDOW=call.window,
    )  # fmt: skip
    return y


def backward(args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of x, weight and bias."""
    call, x = _Call(args), args.x
    grad_x = x.new_empty(x.shape) if args.need_x else None
    strides = token_strides(x if grad_x is None else grad_x)
    flow = TokenStrides(0, *args.grad_y.stride())
    if not args.norm:
        launch(
            copy_backward_kernel, (call.rows, call.blocks), call.config,
            grad_x, args.grad_y, call.table, strides, flow, call.images, WINDOW=call.window,
        )  # fmt: skip
        return or_empty(grad_x, x), or_empty(None, x), or_empty(None, x)
    programs = min(call.rows, _PROGRAMS * multiprocessors(x.device))
    sums = [
        torch.empty(programs, parameter.shape[0], dtype=torch.float32, device=x.device)
        if parameter is not None and needed
        else None
        for parameter, needed in ((args.weight, args.need_weight), (args.bias, args.need_bias))
    ]
    launch(
        norm_backward_kernel, (programs,), call.config,
        x, grad_x, args.grad_y, call.weight, *sums, call.table, token_strides(x), strides, flow, call.images, call.rows,
        args.eps, WINDOW=call.window,
    )  # fmt: skip
    of_weight, of_bias = (or_empty(None if part is None else part.sum(0).to(x.dtype), x) for part in sums)
    return or_empty(grad_x, x), of_weight, of_bias
