"""What co-attention's Triton kernels share: a side's rows, the tiles that it walks over, and its scores.

A program works on a tile of rows of one side, its own, and walks over tiles of the other side. SIDE is the own one: 0
is a, whose rows are the queries of the mask, and 1 is b, whose rows are the keys. Tiles of scores are [own, other].
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from mmkernels.ops.attention.triton.arguments import Problem, Rows, Strides, Walk
from mmkernels.ops.attention.triton.scores import keep_pairs, load_spans, masked_scores
from mmkernels.ops.attention.triton.walks import full_tile, partial_tile, walk_along_list, walk_over_keys
from mmkernels.ops.common.triton.constants import INFINITY, LOG2E


class ValidStrides(NamedTuple):
    """The strides of a tensor [batch, position]."""

    batch: int
    position: int


class SideStrides(NamedTuple):
    """The strides of one side's inputs."""

    x: Strides
    value: Strides
    valid: ValidStrides


class Part(NamedTuple):
    """What a program works on: a tile of rows of a problem, against one of the parts of the other side."""

    problem: Any
    tile: Any
    split: Any


@triton.jit
def part_at(program, sizes, splits, BLOCK: tl.constexpr):
    """Returns the `Part` of a program, of a side's programs (row tiles x problems x splits)."""
    tiles = tl.cdiv(sizes.q_len, BLOCK)
    split, number = program % splits, program // splits // tiles
    problem = Problem(number, number // sizes.heads, number % sizes.heads, number % sizes.heads)
    part = Part(problem, program // splits % tiles, split)
    return part


@triton.jit
def rows_of(n, problem, length):
    """Returns the `Rows` n of one side of a problem."""
    rows = Rows(problem.batch + n * 0, problem.head + n * 0, n, n < length)
    return rows


@triton.jit
def walk_over_other(
    lists, masks, rows, part, sizes, SIDE: tl.constexpr, BLOCK: tl.constexpr, ALL_PARTIAL: tl.constexpr
):  # fmt: skip
    """Returns the `Walk` over the other side's tiles. Full tiles are whole, too."""
    if SIDE == 0:
        spans = load_spans(masks, rows, sizes.k_len)
        walk = walk_over_keys(lists, spans, rows.live, part.problem, part.tile, sizes.k_len, 0, 1, BLOCK, ALL_PARTIAL)
    elif lists is not None:  # a list takes the last tile for full, which may end behind the last row
        listed = walk_along_list(lists, part.problem, part.tile, tl.cdiv(sizes.k_len, BLOCK))
        walk = Walk(listed.partial + listed.full, 0, listed.partial, 0, 0, listed.listed, listed.length)
    else:
        full = sizes.k_len // BLOCK
        if ALL_PARTIAL or masks.start is not None:
            full = full * 0
        walk = Walk(tl.cdiv(sizes.k_len, BLOCK) - full, full, 0, 0, full, 0, 0)
    return walk


@triton.jit
def tile_of(walk, lists, n, MASKED: tl.constexpr, SIDE: tl.constexpr):
    """Returns the number of the n-th partial or full tile."""
    if not MASKED:
        tile = full_tile(walk, lists, n)
    elif SIDE == 1 and lists is not None:
        tile = tl.load(walk.listed + (n if n < walk.first else walk.length - 1 - (n - walk.first)))
    else:
        tile = partial_tile(walk, lists, n)
    return tile


@triton.jit
def share_of(walk, split, splits, MASKED: tl.constexpr):
    """Returns the first and the end of the tiles of one part."""
    count = walk.partial if MASKED else walk.full
    share = tl.cdiv(count, splits)
    return split * share, tl.minimum((split + 1) * share, count)


@triton.jit
def side_scores(dots, masks, rows, first, problem, sizes, scale, SIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Returns the scores of inner products, -inf where there is no pair; and where there is one."""
    if SIDE == 0:
        spans = load_spans(masks, rows, sizes.k_len)
        scores, visible = masked_scores(dots, masks, rows, spans, first + tl.arange(0, BLOCK), scale, 0)
    else:
        others = rows_of(first + tl.arange(0, BLOCK), problem, sizes.k_len)
        spans = load_spans(masks, others, sizes.q_len)
        scores, visible = masked_scores(dots, masks, others, spans, rows.query, scale, 1)
    return scores, visible


@triton.jit
def valid_at(valid, strides, problem, n, length):
    """Returns whether positions of a side are seen by the other one."""
    inside = n < length
    if valid is not None:
        places = valid + problem.batch.to(tl.int64) * strides.batch + n.to(tl.int64) * strides.position
        inside = inside & (tl.load(places, mask=inside, other=0) != 0)
    return inside


@triton.jit
def below_floor(scores, floor):
    """Returns where scores are raised to the floor."""
    return scores < tl.load(floor) * LOG2E


@triton.jit
def raised(scores, floor):
    """Returns visible scores raised to the floor; without one as they are."""
    if floor is not None:
        low = below_floor(scores, floor) & (scores > -INFINITY)
        scores = tl.where(low, tl.load(floor) * LOG2E, scores)
    return scores


@triton.jit
def kept(dropout, rows, own_first, first, problem, sizes, SIDE: tl.constexpr, BLOCK_Q: tl.constexpr,
         BLOCK_K: tl.constexpr):  # fmt: skip
    """Returns whether dropout keeps the pairs [own, other] of a tile."""
    if SIDE == 0:
        keep = keep_pairs(dropout, rows, first, BLOCK_K)
    else:
        others = rows_of(first + tl.arange(0, BLOCK_K), problem, sizes.k_len)
        keep = tl.trans(keep_pairs(dropout, others, own_first, BLOCK_Q))
    return keep
