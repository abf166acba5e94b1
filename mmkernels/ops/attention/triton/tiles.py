"""What the Triton attention kernels share: the rows of a problem, the tiles that they see, the arithmetic of a tile.

A problem is one key head of one batch entry. With ``PACKED`` its rows are the queries of all ``GROUP`` query heads that
attend to it, so that grouped-query heads read each key tile once; with ``SHARED`` also those of all batch entries,
which have one key between them. A program works on a tile of rows and walks over tiles of keys, or the other way round.

Arguments come in tuples, in this order:

    sizes: batch, query heads, key heads, queries, keys
    query_strides and the like: (b, h, i, channel), the first three in UNITs: 8 elements where all divide by that, which
        Triton does not find out about a stride of 72 by itself, so that rows are fetched 16 bytes at a time
    masks: start, end, key_valid, dense, bias; None where there is none
    mask_strides: start and end (b, i), key_valid (b, j), dense (b, h, i, j), bias (b, h, i, j); 0 where broadcast
    lists: tiles, counts of `list_tiles`, or None, None; and the strides of a problem's batch and head in them
"""

from __future__ import annotations

import triton
import triton.language as tl

from mmkernels.ops.common.triton.constants import INFINITY, LOG2E

# Stands for a visible score of -inf, so that a row which sees nothing else is told from one that sees nothing.
LOWEST = tl.constexpr(-3.0e38)
# A bias below this is taken for it: in base 2 it stays finite, and above `LOWEST`. Models write "hidden" as the lowest
# finite number.
LOWEST_BIAS = tl.constexpr(-2.0e38)


# The rows of a problem.


@triton.jit
def split_problem(problem, sizes, GROUP: tl.constexpr, PACKED: tl.constexpr):
    """Batch entry, head (of key if packed, else of query) and key head of a problem."""
    heads = sizes[2] if PACKED else sizes[1]
    head = problem % heads
    return problem // heads, head, head if PACKED else head // GROUP


@triton.jit
def split_rows(rows, problem, sizes, GROUP: tl.constexpr, PACKED: tl.constexpr, SHARED: tl.constexpr):
    """Batch entry, query head and query of `rows`, and whether there is such a row."""
    b, head, _ = split_problem(problem, sizes, GROUP, PACKED)
    b, head = b + rows * 0, head + rows * 0
    i, count = rows, sizes[3]
    if PACKED:
        head = head * GROUP + rows % GROUP
        i = rows // GROUP
        count = count * GROUP
    if SHARED:
        b = i // sizes[3]
        i = i % sizes[3]
        count = count * sizes[0]
    return b, head, i, rows < count


@triton.jit
def row_offsets(b, h, i, strides, UNIT: tl.constexpr = 1):
    """Where rows begin in a tensor of strides (b, h, i, ...), in elements; int64."""
    return (b.to(tl.int64) * strides[0] + h.to(tl.int64) * strides[1] + i.to(tl.int64) * strides[2]) * UNIT


@triton.jit
def load_rows(source, offsets, live, stride, FROM: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr):
    """``[rows, WIDTH]``, channels FROM on, of rows at `offsets`; 0 where there is no row or channel."""
    d = FROM + tl.arange(0, WIDTH)
    places = source + offsets[:, None] + d.to(tl.int64)[None, :] * stride
    if FROM + WIDTH <= DIM:
        x = tl.load(places, mask=live[:, None], other=0.0)
    else:
        x = tl.load(places, mask=live[:, None] & (d < DIM)[None, :], other=0.0)
    return x


@triton.jit
def store_rows(target, offsets, live, x, stride, FROM: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr):
    """The counterpart of `load_rows`."""
    d = FROM + tl.arange(0, WIDTH)
    places = target + offsets[:, None] + d.to(tl.int64)[None, :] * stride
    tl.store(places, x.to(target.dtype.element_ty), mask=live[:, None] & (d < DIM)[None, :])


@triton.jit
def add_rows(target, offsets, live, x, stride, FROM: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr):
    """Add to rows that this program has stored."""
    tl.debug_barrier()
    stored = load_rows(target, offsets, live, stride, FROM, WIDTH, DIM).to(tl.float32)
    store_rows(target, offsets, live, stored + x, stride, FROM, WIDTH, DIM)


@triton.jit
def load_keys(
    source, b, h, first, strides, k_len,
    FROM: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
    WHOLE: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """``[BLOCK, WIDTH]`` of key or value from key `first` on; 0 past the end. WHOLE: the tile ends before the end."""
    if TMA:
        x = source.load([b, h, first, FROM]).reshape(BLOCK, WIDTH)
    else:
        j = first + tl.arange(0, BLOCK)
        d = FROM + tl.arange(0, WIDTH)
        start = source + (b.to(tl.int64) * strides[0] + h.to(tl.int64) * strides[1]) * UNIT
        places = start + (j.to(tl.int64) * strides[2] * UNIT)[:, None] + d.to(tl.int64)[None, :] * strides[3]
        if WHOLE and FROM + WIDTH <= DIM:
            x = tl.load(places)
        elif FROM + WIDTH <= DIM:
            x = tl.load(places, mask=(j < k_len)[:, None], other=0.0)
        elif WHOLE:
            x = tl.load(places, mask=(d < DIM)[None, :], other=0.0)
        else:
            x = tl.load(places, mask=(j < k_len)[:, None] & (d < DIM)[None, :], other=0.0)
    return x


# Which tiles a program walks over.


@triton.jit
def load_spans(masks, strides, b, i, live, k_len):
    """First and past-the-last visible key of each row; k_len and 0 where it sees none."""
    lo = tl.zeros_like(i)
    hi = lo + k_len
    if masks[0] is not None:
        lo = tl.load(masks[0] + b.to(tl.int64) * strides[0] + i.to(tl.int64) * strides[1], mask=live, other=0)
        hi = tl.load(masks[1] + b.to(tl.int64) * strides[2] + i.to(tl.int64) * strides[3], mask=live, other=0)
        lo, hi = tl.maximum(lo, 0), tl.minimum(hi, k_len)
    sees = live & (lo < hi)
    return tl.where(sees, lo, k_len), tl.where(sees, hi, 0)


@triton.jit
def key_tiles(lo, hi, live, k_len, split, splits, BLOCK: tl.constexpr, ALL_PARTIAL: tl.constexpr):
    """Tiles ``first`` to ``end`` are those that some row sees; ``full`` to ``full_end`` of them every row sees whole.

    Of these the part that belongs to `split` of `splits`.
    """
    first = tl.min(lo, 0) // BLOCK
    end = tl.maximum(tl.cdiv(tl.max(hi, 0), BLOCK), first)
    share = tl.cdiv(end - first, splits)
    full, full_end = first, first
    if not ALL_PARTIAL:
        full = tl.cdiv(tl.max(tl.where(live, lo, 0), 0), BLOCK)
        full_end = tl.min(tl.where(live, hi, k_len), 0) // BLOCK
    first = tl.minimum(first + split * share, end)
    end = tl.minimum(first + share, end)
    full = tl.minimum(tl.maximum(full, first), end)
    full_end = tl.maximum(tl.minimum(full_end, end), full)
    return first, end, full, full_end


@triton.jit
def list_start(lists, list_strides, problem, line, count, sizes, GROUP: tl.constexpr, PACKED: tl.constexpr):
    """Where a line's list of `list_tiles` begins, and how many of its tiles are partial and full."""
    b, head, _ = split_problem(problem, sizes, GROUP, PACKED)
    at = (b * list_strides[0] + head * list_strides[1]).to(tl.int64) + line
    return lists[0] + at * count, tl.load(lists[1] + 2 * at), tl.load(lists[1] + 2 * at + 1)


@triton.jit
def partial_tile(n, listed, first, full, full_end):
    """The n-th tile that some row sees in part: of the list, or before and after those from `full` to `full_end`."""
    if listed is None:
        at = first + n if n < full - first else full_end + n - (full - first)
    else:
        at = tl.load(listed + n)
    return at


@triton.jit
def tile_status(
    masks, mask_strides, status, sizes, heads_of_map, row_tiles, key_tiles_,
    GROUP: tl.constexpr, PACKED: tl.constexpr, SHARED: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """For each tile of the map: 0 nobody sees any of it, 2 everybody sees all of it, 1 otherwise.

    Grid: (tiles x entries of the map,).
    """
    tile = tl.program_id(0) % (row_tiles * key_tiles_)
    entry = tl.program_id(0) // (row_tiles * key_tiles_)
    heads = sizes[2] if PACKED else sizes[1]
    problem = (entry // heads_of_map) * heads + entry % heads_of_map
    rows = (tile // key_tiles_) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    first = (tile % key_tiles_) * BLOCK_K
    b, h, i, live = split_rows(rows, problem, sizes, GROUP, PACKED, SHARED)
    lo, hi = load_spans(masks, mask_strides, b, i, live, sizes[4])
    touched = (lo < first + BLOCK_K) & (hi > first)
    covered = ((lo <= first) & (hi >= first + BLOCK_K)) | (live == 0)
    if masks[2] is not None or masks[3] is not None:
        j = first + tl.arange(0, BLOCK_K)
        seen = visible_pairs(
            masks, mask_strides, b[:, None], h[:, None], i[:, None], lo[:, None], hi[:, None], j[None, :]
        ).to(tl.int32)
        touched = tl.max(seen, 1) > 0
        covered = (tl.min(seen, 1) > 0) | (live == 0)
    any_ = tl.max(touched.to(tl.int32), 0)
    all_ = tl.min(covered.to(tl.int32), 0)
    if masks[4] is not None:  # a bias is added in the careful tiles only
        all_ = 0
    tl.store(status + entry.to(tl.int64) * row_tiles * key_tiles_ + tile, (any_ + any_ * all_).to(tl.int8))


@triton.jit
def list_tiles(status, tiles, counts, lines, length, line_stride, tile_stride, BLOCK: tl.constexpr):
    """Of each line of a map the tiles of status 1, from the front, and of status 2, from the back; how many of both."""
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


# The arithmetic of a tile. Rows may run down, with b, h, i, lo, hi of shape [rows, 1] and j [1, keys], or across.


@triton.jit
def visible_pairs(masks, strides, b, h, i, lo, hi, j):
    """Whether each row sees each key, by spans, key_valid and dense."""
    visible = (j >= lo) & (j < hi)
    if masks[2] is not None:
        places = masks[2] + b.to(tl.int64) * strides[4] + j.to(tl.int64) * strides[5]
        visible = visible & (tl.load(places, mask=visible, other=0) != 0)
    if masks[3] is not None:
        places = masks[3] + row_offsets(b, h, i, (strides[6], strides[7], strides[8])) + j.to(tl.int64) * strides[9]
        visible = visible & (tl.load(places, mask=visible, other=0) != 0)
    return visible


@triton.jit
def masked_scores(dots, masks, strides, b, h, i, lo, hi, j, scale):
    """Scores times log2 e, -inf where hidden; and what is visible."""
    visible = visible_pairs(masks, strides, b, h, i, lo, hi, j)
    scores = dots * scale
    if masks[4] is not None:
        offsets = row_offsets(b, h, i, (strides[10], strides[11], strides[12])) + j.to(tl.int64) * strides[13]
        bias = tl.load(masks[4] + offsets, mask=visible, other=-INFINITY).to(tl.float32)
        visible = visible & (bias != -INFINITY)
        scores += tl.where(bias < LOWEST_BIAS, LOWEST_BIAS, bias) * LOG2E
    return tl.where(visible, tl.where(scores == -INFINITY, LOWEST, scores), -INFINITY), visible


@triton.jit
def finite(x):
    """Where x is neither NaN nor inf."""
    return tl.abs(x.to(tl.float32)) < INFINITY


@triton.jit
def zero_non_finite(x):
    """x with 0 for NaN and inf, so that rows which do not see them don't meet ``0 * inf``."""
    return tl.where(tl.abs(x.to(tl.float32)) < INFINITY, x, 0.0).to(x.dtype)


@triton.jit
def has_non_finite(x):
    """1 for each row of x with NaN or inf in it, else 0."""
    return tl.max(tl.where(tl.abs(x.to(tl.float32)) < INFINITY, 0, 1), 1)


@triton.jit
def unknown_zero(pointer):
    """0, which the compiler can't know: what is computed from it again is not kept in registers in the meantime."""
    byte = pointer.to(tl.pointer_type(tl.int8), bitcast=True)
    return tl.where(tl.load(byte, volatile=True) == tl.load(byte, volatile=True), 0, 1)


@triton.jit
def taint(total, x, visible):
    """`total` with the NaN and inf that each row sees in x, which `zero_non_finite` took away."""
    wide = x.to(tl.float32)
    # One product counts what each row sees in each channel: +inf by 1, -inf by 2^-12, NaN by 2^12.
    kind = tl.where(wide == INFINITY, 1.0, tl.where(wide == -INFINITY, 1 / 4096, 0.0))
    seen = tl.dot(visible.to(x.dtype), tl.where(wide == wide, kind, 4096.0).to(x.dtype))
    above = tl.floor(seen)
    up = tl.where(above > 0, INFINITY, 0.0)
    return total + up + tl.where((seen > above) | (seen >= 4096.0), -INFINITY, 0.0)


@triton.jit
def keep_pairs(seed, threshold, b, h, i, first, BLOCK: tl.constexpr):
    """``[rows, BLOCK]``: dropout's choice for keys from `first` on, as in philox.py; first and BLOCK divide by 4."""
    quad = first // 4 + tl.arange(0, BLOCK // 4)
    zero = tl.zeros([b.shape[0], BLOCK // 4], tl.uint32)
    key = tl.load(seed)
    w0, w1, w2, w3 = tl.philox(
        key, zero + quad[None, :].to(tl.uint32), zero + i[:, None].to(tl.uint32),
        zero + h[:, None].to(tl.uint32), zero + b[:, None].to(tl.uint32),
    )  # fmt: skip
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    return words.to(tl.uint32, bitcast=True).to(tl.int64) >= threshold


@triton.jit
def tanh(x):
    """By its series near 0, where ``1 - 2 / (1 + exp(2 x))`` would cancel."""
    y = x * x
    near = x * (1 + y * (-1 / 3 + y * (2 / 15 + y * (-17 / 315 + y * (62 / 2835)))))
    return tl.where(tl.abs(x) < 0.35, near, 1 - 2 / (1 + tl.exp2(x * (2 * LOG2E))))


@triton.jit
def load_lse(lse, place, live):
    """Base 2; 0 for a row that sees nothing, whose scores are -inf."""
    x = tl.load(lse + place, mask=live, other=0.0) * LOG2E
    return tl.where(x == -INFINITY, 0.0, x)
