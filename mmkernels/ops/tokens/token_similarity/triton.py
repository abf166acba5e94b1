"""Similarity to other tokens in Triton: a mean by one product with their mean direction, else by tiles of products."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.ops.common.triton.constants import INFINITY
from mmkernels.ops.common.triton.launch import ceil_div, precision
from mmkernels.ops.tokens.ranking import on_device, starts_of
from mmkernels.ops.tokens.token_similarity.spec import Arguments
from mmkernels.ops.tokens.triton.cosine import inverse_norms, near_one, norms_of, row_products, steps_of
from mmkernels.ops.tokens.triton.images import token_tiles
from mmkernels.ops.tokens.triton.rows import row_offsets, strides_of
from mmkernels.runtime.triton import launch
from mmkernels.runtime.tuning import config

OP = "token_similarity"


@triton.jit
def direction_kernel(others, norms, starts, out, strides, channels, BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr):
    """Store some channels of the mean of an image's others, each at length 1. Grid: (images, tiles of channels)."""
    image = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    first, last = tl.load(starts + image), tl.load(starts + image + 1)
    total = tl.zeros([BLOCK_Q, BLOCK_C], tl.float32)
    for begin in range(first, last, BLOCK_Q):
        number = begin + tl.arange(0, BLOCK_Q)
        at = row_offsets(number, strides)[:, None] + c.to(tl.int64)[None, :] * strides.column
        mask = (number < last)[:, None] & (c < channels)[None, :]
        rows = tl.load(others + at, mask=mask, other=0.0).to(tl.float32)
        total += rows * tl.load(norms + number, mask=number < last, other=0.0)[:, None]
    mean = tl.sum(total, 0) / (last - first).to(tl.float32)
    tl.store(out + image.to(tl.int64) * channels + c, mean, mask=c < channels)


@triton.jit
def project_kernel(
    x, directions, tile_images, tile_firsts, starts, out, strides, channels, BLOCK_Q: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Store the products of some tokens of an image, at length 1, with its direction. Grid: (tiles of tokens,)."""
    image = tl.load(tile_images + tl.program_id(0))
    token = tl.load(tile_firsts + tl.program_id(0)) + tl.arange(0, BLOCK_Q)
    live = token < tl.load(starts + image + 1)
    rows = x + row_offsets(token, strides)
    directions += image * channels
    exponent = tl.full([BLOCK_Q], 1, tl.int32)
    dot = tl.zeros([BLOCK_Q], tl.float32)
    squares = dot
    for first in range(0, channels, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        along = tl.load(directions + c, mask=c < channels, other=0.0)
        mask = live[:, None] & (c < channels)[None, :]
        tile = tl.load(rows[:, None] + c.to(tl.int64)[None, :] * strides.column, mask=mask, other=0.0).to(tl.float32)
        tile, exponent, shift = near_one(tile, exponent)
        dot = dot * shift + tl.sum(tile * along[None, :], 1)
        squares = squares * shift * shift + tl.sum(tile * tile, 1)
    similarity = dot / tl.where(squares == 0.0, 1.0, tl.sqrt(squares))
    tl.store(out + token, similarity, mask=live)


@triton.jit
def extreme_kernel(
    x, others, norms, tile_images, tile_firsts, starts, other_starts, out, strides, other_strides, channels,
    SMALLEST: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store the largest or smallest cosine of some tokens of an image with its others. Grid: (tiles of tokens,)."""
    image = tl.load(tile_images + tl.program_id(0))
    token = tl.load(tile_firsts + tl.program_id(0)) + tl.arange(0, BLOCK_Q)
    live = token < tl.load(starts + image + 1)
    rows = x + row_offsets(token, strides)
    top = tl.full([BLOCK_Q], -INFINITY, tl.float32)
    not_finite = 0
    first, last = tl.load(other_starts + image), tl.load(other_starts + image + 1)
    for begin in range(first, last, BLOCK_K):
        number = begin + tl.arange(0, BLOCK_K)
        exists = number < last
        dots = row_products(
            rows, others + row_offsets(number, other_strides), live, exists, strides.column, other_strides.column,
            channels, BLOCK_Q, BLOCK_K, STEP, PRECISION,
        )  # fmt: skip
        inverse = tl.load(norms + number, mask=exists, other=0.0)
        not_finite += tl.sum((inverse != inverse).to(tl.int32), 0)
        similarity = dots * inverse[None, :]
        if SMALLEST:
            similarity = -similarity
        usable = exists[None, :] & (similarity == similarity)
        top = tl.maximum(top, tl.max(tl.where(usable, similarity, -INFINITY), 1))
    top *= inverse_norms(rows, live, strides.column, channels, BLOCK_Q, STEP)
    if SMALLEST:
        top = -top
    tl.store(out + token, tl.where(not_finite > 0, float("nan"), top), mask=live)


def forward(args: Arguments) -> Tensor:
    """Returns float32 [tokens]."""
    x, others = args.x, args.others
    out = x.new_empty(x.shape[:-1].numel(), dtype=torch.float32)
    if not len(out):
        return out
    device, channels = x.device, x.shape[-1]
    plan = config(OP, "row", device, x.dtype, channels)
    norms = norms_of(others, None, plan)
    starts, other_starts = (on_device(starts_of(sizes), device) for sizes in (args.lengths, args.other_lengths))
    if args.reduce == "mean":
        directions = x.new_empty(len(args.lengths), channels, dtype=torch.float32)
        blocks = {"BLOCK_Q": plan.block_q, "BLOCK_C": plan.block_k}
        launch(
            direction_kernel, (len(args.lengths), ceil_div(channels, plan.block_k)), plan,
            others, norms, other_starts, directions, strides_of(others), channels, **blocks,
        )  # fmt: skip
        tiles = token_tiles(args.lengths, plan.block_q, device)
        launch(
            project_kernel, (len(tiles.images),), plan,
            x, directions, *tiles, starts, out, strides_of(x), channels, **blocks,
        )  # fmt: skip
        return out
    plan = config(OP, "product", device, x.dtype, channels)
    tiles = token_tiles(args.lengths, plan.block_q, device)
    launch(
        extreme_kernel, (len(tiles.images),), plan,
        x, others, norms, *tiles, starts, other_starts, out, strides_of(x), strides_of(others), channels,
        SMALLEST=args.reduce == "min", BLOCK_Q=plan.block_q, BLOCK_K=plan.block_k, STEP=steps_of(x),
        PRECISION=precision(x.dtype),
    )  # fmt: skip
    return out
