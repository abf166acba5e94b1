"""Diverse selection in Triton: one launch a token, in which every program first finds the token that was chosen last.

The factors of the determinant are kept, float32 ``[steps, tokens]``: so a step needs no other step's tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.ops.common.triton.constants import INFINITY
from mmkernels.ops.common.triton.launch import ceil_div, precision
from mmkernels.ops.tokens.select_diverse.spec import NOTHING_NEW, Arguments
from mmkernels.ops.tokens.triton.cosine import row_products
from mmkernels.runtime.triton import launch
from mmkernels.runtime.tuning import config

_NOTHING_NEW = tl.constexpr(NOTHING_NEW)
_NOT_COUNTED, _CHOSEN, _NO_TOKEN = tl.constexpr(-1.0), tl.constexpr(-2.0), tl.constexpr(-3.0)
"""Gains that rank behind all others: of a token that does not count, of a chosen one, of a place without a token."""
_LAST = tl.constexpr(0x7FFFFFFF)
"""Behind every token's number."""


class Image(NamedTuple):
    """An image's place, in a kernel: its first token, its tokens, how many are kept, where in the result."""

    first: tl.tensor
    length: tl.tensor
    keep: tl.tensor
    start: tl.tensor


@triton.jit
def image_at(images, number):
    """Returns one of the images ``[images, 4]`` int32."""
    return Image(
        tl.load(images + 4 * number), tl.load(images + 4 * number + 1), tl.load(images + 4 * number + 2),
        tl.load(images + 4 * number + 3),
    )  # fmt: skip


@triton.jit
def dots_with_token(x, places, live, token, row, column, dim, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr):
    """Returns inner products of tokens ``[BLOCK]`` with one token."""
    dots = tl.zeros([BLOCK, BLOCK_C], tl.float32)
    for first in range(0, dim, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        at = c.to(tl.int64) * column
        other = tl.load(x + token.to(tl.int64) * row + at, mask=c < dim, other=0.0).to(tl.float32)
        rows = tl.load(
            x + places.to(tl.int64)[:, None] * row + at[None, :], mask=live[:, None] & (c < dim)[None, :], other=0.0
        )
        dots += rows.to(tl.float32) * other[None, :]
    return tl.sum(dots, 1)


@triton.jit
def measure_kernel(
    x, quality, inverse, gains, row, column, tokens, dim, DETERMINANT: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Store 1 / length of each token, NaN where it does not count, and what it adds to none. Grid: (token tiles,)."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = i < tokens
    most = tl.zeros([BLOCK, BLOCK_C], tl.float32)
    for first in range(0, dim, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        at = x + i.to(tl.int64)[:, None] * row + c.to(tl.int64)[None, :] * column
        rows = tl.load(at, mask=live[:, None] & (c < dim)[None, :], other=0.0).to(tl.float32)
        most = tl.maximum(most, tl.where(tl.abs(rows) < INFINITY, tl.abs(rows), INFINITY))
    largest = tl.max(most, 1)
    finite = largest < INFINITY
    scale = 1.0 / tl.where(finite & (largest > 0.0), largest, 1.0)  # so that no square overflows
    squares = tl.zeros([BLOCK, BLOCK_C], tl.float32)
    for first in range(0, dim, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        at = x + i.to(tl.int64)[:, None] * row + c.to(tl.int64)[None, :] * column
        rows = tl.load(at, mask=live[:, None] & (c < dim)[None, :], other=0.0).to(tl.float32) * scale[:, None]
        squares += rows * rows
    length = largest * tl.sqrt(tl.sum(squares, 1))
    one = tl.where(finite & (largest > 0.0), 1.0 / tl.where(length > 0.0, length, 1.0), 0.0)
    gain = tl.full([BLOCK], 1.0, tl.float32)
    if DETERMINANT:
        if quality is not None:
            q = tl.load(quality + i, mask=live, other=0.0)
            gain = q * q
            finite = finite & (tl.abs(q) < INFINITY)
        gain = tl.where(one == 0.0, 0.0, gain)
    tl.store(inverse + i, tl.where(finite, one, float("nan")), mask=live)
    tl.store(gains + i, gain, mask=live)


@triton.jit
def nearest_kernel(
    x, inverse, gains, images, row, column, dim, PRECISION: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """Store the distance of each token from the nearest other one. Grid: (token tiles, images)."""
    image = image_at(images, tl.program_id(1))
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if tl.program_id(0) * BLOCK >= image.length:
        return
    live = i < image.length
    mine = tl.load(inverse + image.first + i, mask=live, other=0.0)
    rows = x + (image.first + i).to(tl.int64) * row
    nearest = tl.full([BLOCK], INFINITY, tl.float32)
    for start in range(0, image.length, BLOCK):
        j = start + tl.arange(0, BLOCK)
        others = x + (image.first + j).to(tl.int64) * row
        dots = row_products(rows, others, live, j < image.length, column, column, dim, BLOCK, BLOCK, BLOCK_C, PRECISION)
        theirs = tl.load(inverse + image.first + j, mask=j < image.length, other=float("nan"))
        apart = 1.0 - dots * (mine[:, None] * theirs[None, :])
        apart = tl.where((theirs == theirs)[None, :] & (i[:, None] != j[None, :]), apart, INFINITY)
        nearest = tl.minimum(nearest, tl.min(apart, 1))
    alone = tl.where(nearest == INFINITY, tl.where(image.length == 1, 1.0, 2.0), nearest)
    tl.store(gains + image.first + i, alone, mask=live)


@triton.jit(do_not_specialize=["step"])
def step_kernel(
    x, quality, inverse, whole, gains, factors, best, best_token, index, images, step, row, column, dim, tokens, tiles,
    DETERMINANT: tl.constexpr, FIRST: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Store the token that the last step found best, take it into account, find the best one of each tile.

    Grid: (token tiles, images). best, best_token: of each tile, [2, images, tiles], by turns read and written.
    """
    number, tile = tl.program_id(1), tl.program_id(0)
    image = image_at(images, number)
    if tile * BLOCK >= image.length or step > image.keep or image.keep == 0:
        return
    i = tile * BLOCK + tl.arange(0, BLOCK)
    live, place = i < image.length, image.first + i
    gain = tl.load(gains + place, mask=live, other=_CHOSEN)
    mine = tl.load(inverse + place, mask=live, other=0.0)
    counts = mine == mine
    if not FIRST:
        n = tl.arange(0, TILES)
        read = ((step + 1) % 2 * tl.num_programs(1) + number) * tiles
        some = n < tl.cdiv(image.length, BLOCK)
        values = tl.load(best + read + n, mask=some, other=_NO_TOKEN)
        value = tl.max(values, 0)
        token = tl.min(tl.where(values == value, tl.load(best_token + read + n, mask=some, other=0), _LAST), 0)
        if tile == 0:
            tl.store(index + image.start + step - 1, (image.first + token).to(tl.int64))
        if value > 0.0 or (not DETERMINANT and step == 1 and value == 0.0):
            one = tl.load(inverse + image.first + token)
            cosine = dots_with_token(x, place, live, image.first + token, row, column, dim, BLOCK, BLOCK_C) * mine * one
            if DETERMINANT:
                factor = cosine
                if quality is not None:
                    q = tl.load(quality + place, mask=live, other=0.0)
                    factor = cosine * q * tl.load(quality + image.first + token)
                line = factors
                for _ in range(0, step - 1):
                    factor -= tl.load(line + place, mask=live, other=0.0) * tl.load(line + image.first + token)
                    line += tokens
                factor = tl.where(counts, factor / tl.sqrt(value), 0.0)
                tl.store(line + place, factor, mask=live)
                gain -= tl.where(gain == _CHOSEN, 0.0, factor * factor)
            else:
                apart = tl.where(counts, 1.0 - cosine, gain)
                gain = tl.where(gain == _CHOSEN, _CHOSEN, apart if step == 1 else tl.minimum(gain, apart))
        gain = tl.where(i == token, _CHOSEN, gain)
        tl.store(gains + place, gain, mask=live)
    least = _NOTHING_NEW * tl.load(whole + place, mask=live, other=1.0)
    ranked = tl.where(gain > least, gain, 0.0)
    ranked = tl.where(counts, ranked, _NOT_COUNTED)
    ranked = tl.where(gain == _CHOSEN, _CHOSEN, ranked)
    ranked = tl.where(live, ranked, _NO_TOKEN)
    top = tl.max(ranked, 0)
    write = (step % 2 * tl.num_programs(1) + number) * tiles + tile
    tl.store(best + write, top)
    tl.store(best_token + write, tl.min(tl.where(ranked == top, i, _LAST), 0))


def forward(args: Arguments) -> Tensor:
    """Returns the kept tokens, int64 [sum of keep]."""
    x, determinant = args.x, args.method == "determinant"
    tokens, dim = x.shape
    index = x.new_empty(sum(args.keep), dtype=torch.int64)
    if not len(index):
        return index
    table, first, start = [], 0, 0
    for length, keep in zip(args.lengths, args.keep, strict=True):
        table += [first, length, keep, start]
        first, start = first + length, start + keep
    images = torch.tensor(table, dtype=torch.int32).to(x.device, non_blocking=True)
    plan = config("select_diverse", "step", x.device, x.dtype, dim)
    sizes = {"BLOCK": plan.block_q, "BLOCK_C": plan.block_k}
    tiles, steps = ceil_div(max(args.lengths), plan.block_q), max(args.keep)
    gains, inverse = x.new_empty(2, tokens, dtype=torch.float32)
    strides = x.stride(0), x.stride(1)
    quality = None if args.quality is None else args.quality.contiguous()
    launch(
        measure_kernel, (ceil_div(tokens, plan.block_q),), plan,
        x, quality, inverse, gains, *strides, tokens, dim, DETERMINANT=determinant, **sizes,
    )  # fmt: skip
    whole = gains.clone()
    if not determinant:
        nearest = config("select_diverse", "nearest", x.device, x.dtype, dim)
        launch(
            nearest_kernel, (ceil_div(max(args.lengths), nearest.block_q), len(args.lengths)), nearest,
            x, inverse, gains, images, *strides, dim, PRECISION=precision(x.dtype), BLOCK=nearest.block_q,
            BLOCK_C=nearest.block_k,
        )  # fmt: skip
    factors = gains.new_empty(steps if determinant else 0, tokens)
    best = gains.new_empty(2, len(args.lengths), tiles)
    best_token = best.to(torch.int32)
    for step in range(steps + 1):
        launch(
            step_kernel, (tiles, len(args.lengths)), plan,
            x, quality, inverse, whole, gains, factors, best, best_token, index, images, step, *strides, dim, tokens,
            tiles, DETERMINANT=determinant, FIRST=step == 0, TILES=triton.next_power_of_2(tiles), **sizes,
        )  # fmt: skip
    return index
