"""Selecting in Triton: the rows that are kept; of the rest the nearest kept token, by tiles, then sums of tokens."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.ops.common.triton.constants import INFINITY
from mmkernels.ops.common.triton.launch import ceil_div, precision
from mmkernels.ops.tokens.ranking import best, image_of, on_device, starts_of
from mmkernels.ops.tokens.select_tokens.spec import Arguments, weights_of
from mmkernels.ops.tokens.triton.cosine import norms_of, row_products, steps_of
from mmkernels.ops.tokens.triton.images import token_tiles
from mmkernels.ops.tokens.triton.rows import compose, row_offsets, strides_of
from mmkernels.runtime.triton import launch
from mmkernels.runtime.tuning import config

OP = "select_tokens"


@triton.jit
def nearest_kernel(
    metric, norms, index, place, tile_images, tile_firsts, starts, kept_starts, strides, channels,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes for one tile of an image's tokens which kept token is the most similar. Grid: (tiles,)."""
    image = tl.load(tile_images + tl.program_id(0))
    token = tl.load(tile_firsts + tl.program_id(0)) + tl.arange(0, BLOCK_Q)
    live = token < tl.load(starts + image + 1)
    first, last = tl.load(kept_starts + image), tl.load(kept_starts + image + 1)
    top = tl.full([BLOCK_Q], -INFINITY, tl.float32)
    winner = tl.full([BLOCK_Q], 0, tl.int32) + tl.where(first < last, first, -1).to(tl.int32)
    for begin in range(first, last, BLOCK_K):
        number = begin + tl.arange(0, BLOCK_K)
        row = tl.load(index + number, mask=number < last, other=0)
        dots = row_products(
            metric + row_offsets(token, strides), metric + row_offsets(row, strides), live, number < last,
            strides.column, strides.column, channels, BLOCK_Q, BLOCK_K, STEP, PRECISION,
        )  # fmt: skip
        inverse = tl.load(norms + number, mask=number < last, other=0.0)
        similarity = dots * inverse[None, :]
        usable = (number < last)[None, :] & (similarity == similarity)
        similarity = tl.where(usable, similarity, -INFINITY)
        here = tl.max(similarity, 1)
        better = here > top
        winner = tl.where(better, (begin + tl.argmax(similarity, 1)).to(tl.int32), winner)
        top = tl.where(better, here, top)
    tl.store(place + token, winner, mask=live)


@triton.jit
def sum_kernel(
    x, order, starts, weight, out, row_stride, column_stride, channels, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Writes some columns of one row of the result. Grid: (kept tokens, tiles of columns)."""
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    last = tl.load(starts + row + 1)
    total = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    for n in range(tl.load(starts + row), last, BLOCK_Q):
        member = n + tl.arange(0, BLOCK_Q)
        token = tl.load(order + member, mask=member < last, other=0)
        share = tl.load(weight + token, mask=member < last, other=0.0)
        at = token.to(tl.int64)[:, None] * row_stride + column[None, :] * column_stride
        rows = tl.load(x + at, mask=(member < last)[:, None] & (column < channels)[None, :], other=0.0)
        total += share[:, None] * rows.to(tl.float32)
    out += row.to(tl.int64) * channels
    tl.store(out + column, tl.sum(total, 0).to(out.dtype.element_ty), mask=column < channels)


def forward(args: Arguments) -> tuple[Tensor, ...]:
    """Returns all results."""
    x = args.x
    index = best(args.scores, args.lengths, args.keep, args.over)
    counts, none = index.new_empty(0), index.new_empty(0)
    if args.over == "batch":
        owner = image_of(args.lengths, index.device)[index]
        counts = index.new_zeros(len(args.lengths)).scatter_add(0, owner, torch.ones_like(index))
    y = x.new_empty(len(index), x.shape[1])
    if not args.merge:
        compose(OP, y, None, x, index)
        return y, index, counts, none.int(), none.float()
    place = _places(args, index, counts)
    place = place.scatter(0, index, torch.arange(len(index), dtype=torch.int32, device=index.device))
    weight = weights_of(args, index, place.long(), torch.float32)
    members = index.new_zeros(len(index) + 1).scatter_add(0, place + 1, torch.ones_like(place, dtype=torch.int64))
    plan = config(OP, "sum", x.device, x.dtype, x.shape[1])
    launch(
        sum_kernel, (len(index), ceil_div(x.shape[1], plan.block_k)), plan,
        x, place.argsort(stable=True), members.cumsum(0), weight, y, *x.stride(), x.shape[1],
        BLOCK_Q=plan.block_q, BLOCK_K=plan.block_k,
    )  # fmt: skip
    return y, index, counts, place, weight


def _places(args: Arguments, index: Tensor, counts: Tensor) -> Tensor:
    """Returns which row of the result each token is part of, int32 [tokens]; of those that are kept, anything."""
    metric = args.x if args.metric is None else args.metric
    plan = config(OP, "nearest", metric.device, metric.dtype, metric.shape[1])
    tiles = token_tiles(args.lengths, plan.block_q, index.device)
    starts = on_device(starts_of(args.lengths), index.device)
    kept_starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    if args.over == "image":
        kept_starts = on_device(starts_of(args.keep), index.device)
    place = torch.full((len(metric),), -1, dtype=torch.int32, device=index.device)
    norms = norms_of(metric, index, config(OP, "sum", metric.device, metric.dtype, metric.shape[1]))
    launch(
        nearest_kernel, (len(tiles.images),), plan,
        metric, norms, index, place, *tiles, starts, kept_starts, strides_of(metric), metric.shape[1],
        BLOCK_Q=plan.block_q, BLOCK_K=plan.block_k, STEP=steps_of(metric), PRECISION=precision(metric.dtype),
    )  # fmt: skip
    return place


def backward(args: Any) -> Tensor:
    """Returns the gradient of x."""
    grad = args.grad_y
    out = grad.new_empty(args.x.shape)
    if args.merge:
        compose(OP, out, None, grad, args.place, args.weight)
        return out
    source = torch.full((len(out),), -1, dtype=torch.int64, device=grad.device)
    source[args.positions] = torch.arange(len(args.positions), device=grad.device)
    compose(OP, out, None, grad, source)
    return out
