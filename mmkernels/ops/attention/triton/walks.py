"""Which tiles a program of the Triton attention kernels walks over: a range that spans make, or a list of tiles.

A tile is full where every row sees every key, so that it needs no mask; partial where some row sees some key.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mmkernels.ops.attention.triton.arguments import Walk
from mmkernels.ops.attention.triton.scores import load_spans, visible_pairs
from mmkernels.ops.attention.triton.tiles import problem_at, row_count, rows_at


@triton.jit
def walk_over_keys(
    lists, spans, live, problem, line, k_len, split, splits, BLOCK: tl.constexpr, ALL_PARTIAL: tl.constexpr,
):  # fmt: skip
    """Returns the `Walk` over the tiles of keys that a tile of rows sees; without lists, over one of `splits` parts."""
    if lists is None:
        first = tl.min(spans.start, 0) // BLOCK
        end = tl.maximum(tl.cdiv(tl.max(spans.end, 0), BLOCK), first)
        share = tl.cdiv(end - first, splits)
        full, full_end = first, first
        if not ALL_PARTIAL:
            full = tl.cdiv(tl.max(tl.where(live, spans.start, 0), 0), BLOCK)
            full_end = tl.min(tl.where(live, spans.end, k_len), 0) // BLOCK
        first = tl.minimum(first + split * share, end)
        end = tl.minimum(first + share, end)
        full = tl.minimum(tl.maximum(full, first), end)
        full_end = tl.maximum(tl.minimum(full_end, end), full)
        walk = Walk((full - first) + (end - full_end), full_end - full, first, full, full_end, 0, 0)
    else:
        walk = walk_along_list(lists, problem, line, tl.cdiv(k_len, BLOCK))
    return walk


@triton.jit
def walk_over_rows(
    lists, masks, problem, line, sizes, LAYOUT: tl.constexpr, BLOCK: tl.constexpr, ALL_PARTIAL: tl.constexpr,
):  # fmt: skip
    """Returns the `Walk` over the tiles of rows that see a tile of keys; without lists, over all."""
    count = tl.cdiv(row_count(sizes, LAYOUT), BLOCK)
    if lists is not None:
        walk = walk_along_list(lists, problem, line, count)
    elif ALL_PARTIAL or masks.start is not None:
        walk = Walk(count, 0, 0, 0, 0, 0, 0)
    else:
        walk = Walk(0, count, 0, 0, 0, 0, 0)
    return walk


@triton.jit
def walk_along_list(lists, problem, line, length):
    place = (problem.batch * lists.batch + problem.head * lists.head).to(tl.int64) + line
    listed = lists.tiles + place * length
    partial, full = tl.load(lists.counts + 2 * place), tl.load(lists.counts + 2 * place + 1)
    walk = Walk(partial, full, 0, 0, 0, listed, length)
    return walk


@triton.jit
def full_tile(walk, lists, n):
    """Returns the number of the n-th full tile; in a list these stand last, in reverse order."""
    return walk.full_first + n if lists is None else tl.load(walk.listed + walk.length - 1 - n)


@triton.jit
def partial_tile(walk, lists, n):
    """Returns the number of the n-th partial tile: of the list, or before and after the full ones."""
    if lists is None:
        before = walk.full_first - walk.first
        tile = walk.first + n if n < before else walk.full_end + n - before
    else:
        tile = tl.load(walk.listed + n)
    return tile


# Making the lists.


@triton.jit
def tile_status(
    masks, status, sizes, map_heads, row_tiles, key_tiles, LAYOUT: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Writes the status of each tile of a map: 0 hidden, 1 partial, 2 full.

    A map has one entry for each problem, or for each batch entry or head where the others have the same masks. Grid:
    (tiles x entries,).
    """
    tile = tl.program_id(0) % (row_tiles * key_tiles)
    entry = tl.program_id(0) // (row_tiles * key_tiles)
    heads = sizes.key_heads if LAYOUT.packed else sizes.heads
    number = (entry // map_heads) * heads + entry % map_heads
    n = (tile // key_tiles) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    first = (tile % key_tiles) * BLOCK_K
    rows = rows_at(n, problem_at(number, sizes, LAYOUT), sizes, LAYOUT)
    spans = load_spans(masks, rows, sizes.k_len)
    touched = (spans.start < first + BLOCK_K) & (spans.end > first)
    covered = ((spans.start <= first) & (spans.end >= first + BLOCK_K)) | (rows.live == 0)
    if masks.key_valid is not None or masks.dense is not None:
        visible = visible_pairs(masks, rows, spans, first + tl.arange(0, BLOCK_K), 0).to(tl.int32)
        touched = tl.max(visible, 1) > 0
        covered = (tl.min(visible, 1) > 0) | (rows.live == 0)
    some = tl.max(touched.to(tl.int32), 0)
    whole = tl.min(covered.to(tl.int32), 0)
    if masks.bias is not None:  # only partial tiles add a bias
        whole = 0
    tl.store(status + entry.to(tl.int64) * row_tiles * key_tiles + tile, (some + some * whole).to(tl.int8))


@triton.jit
def list_tiles(status, tiles, counts, lines, length, line_stride, tile_stride, BLOCK: tl.constexpr):
    """Lists each line of a map: its partial tiles from the front, its full tiles from the back, and how many of both.

    Grid: (lines x entries,).
    """
    line = tl.program_id(0) % lines
    entry = (tl.program_id(0) // lines).to(tl.int64)
    source = status + entry * lines * length + line * line_stride
    target = tiles + (entry * lines + line) * length
    partial, full = 0, 0
    for start in range(0, length, BLOCK):
        n = start + tl.arange(0, BLOCK)
        state = tl.load(source + n * tile_stride, mask=n < length, other=0).to(tl.int32)
        is_partial, is_full = (state == 1).to(tl.int32), (state == 2).to(tl.int32)
        tl.store(target + partial + tl.cumsum(is_partial, 0) - 1, n, mask=is_partial > 0)
        tl.store(target + length - full - tl.cumsum(is_full, 0), n, mask=is_full > 0)
        partial += tl.sum(is_partial, 0)
        full += tl.sum(is_full, 0)
    tl.store(counts + 2 * (entry * lines + line), partial)
    tl.store(counts + 2 * (entry * lines + line) + 1, full)
