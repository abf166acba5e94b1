"""What the Triton attention kernels share: the rows of a problem, and tiles of queries, keys and values.

A problem is one key head of one batch entry. If packed, its rows are the queries of all ``group`` query heads that
attend to it, so that grouped-query heads read each key tile once; if shared, also those of all batch entries, which
have one key between them. A program works on a tile of rows and walks over tiles of keys, or the other way round.

A tile of channels is as wide as a power of two: a head dim that is none takes two of them, its `Halves`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mmkernels.ops.attention.triton.arguments import Halves, Problem, Rows

# The rows of a problem.


@triton.jit
def problem_at(number, sizes, LAYOUT: tl.constexpr):
    """Returns the `Problem` of a number."""
    heads = sizes.key_heads if LAYOUT.packed else sizes.heads
    head = number % heads
    problem = Problem(number, number // heads, head, head if LAYOUT.packed else head // LAYOUT.group)
    return problem


@triton.jit
def row_tile_count(sizes, LAYOUT: tl.constexpr):
    """Returns the number of tiles of rows of a problem, in a grid (row tiles x problems, ...)."""
    row_tiles = tl.num_programs(0) // (sizes.key_heads if LAYOUT.packed else sizes.heads)
    if not LAYOUT.shared:
        row_tiles = row_tiles // sizes.batch
    return row_tiles


@triton.jit
def problem_count(sizes, LAYOUT: tl.constexpr):
    """Returns the number of problems in the same grid: counting them by sizes takes two more registers."""
    return tl.num_programs(0) // row_tile_count(sizes, LAYOUT)


@triton.jit
def program_of_rows(sizes, LAYOUT: tl.constexpr):
    """Returns the problem and the tile of rows of this program in the same grid."""
    row_tiles = row_tile_count(sizes, LAYOUT)
    return tl.program_id(0) // row_tiles, tl.program_id(0) % row_tiles


@triton.jit
def row_count(sizes, LAYOUT: tl.constexpr):
    """Returns the number of rows of a problem."""
    return sizes.q_len * (LAYOUT.group if LAYOUT.packed else 1) * (sizes.batch if LAYOUT.shared else 1)


@triton.jit
def rows_at(n, problem, sizes, LAYOUT: tl.constexpr):
    """Returns the `Rows` of numbers n in a problem."""
    batch, head = problem.batch + n * 0, problem.head + n * 0
    query, count = n, sizes.q_len
    if LAYOUT.packed:
        head = head * LAYOUT.group + n % LAYOUT.group
        query = n // LAYOUT.group
        count = count * LAYOUT.group
    if LAYOUT.shared:
        batch = query // sizes.q_len
        query = query % sizes.q_len
        count = count * sizes.batch
    rows = Rows(batch, head, query, n < count)
    return rows


@triton.jit
def row_offsets(rows, strides, UNIT: tl.constexpr = 1):
    """Returns where rows begin in a tensor with strides of batch, head and row; in elements, int64."""
    offsets = rows.batch.to(tl.int64) * strides.batch + rows.head.to(tl.int64) * strides.head
    return (offsets + rows.query.to(tl.int64) * strides.row) * UNIT


@triton.jit
def row_places(rows, sizes):
    """Returns the places of rows in a contiguous tensor [B, Hq, Lq]."""
    return (rows.batch.to(tl.int64) * sizes.heads + rows.head) * sizes.q_len + rows.query


@triton.jit
def output_places(rows, sizes):
    """Returns the places of rows in the output, which lies in memory as [B, Lq, Hq, Dv]."""
    return (rows.batch.to(tl.int64) * sizes.q_len + rows.query) * sizes.heads + rows.head


# One tile of channels.


@triton.jit
def zero_tile(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.zeros([ROWS, COLUMNS], tl.float32)


@triton.jit
def load_rows(source, offsets, live, stride, FROM: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr):
    """Returns ``[rows, WIDTH]``, channels FROM on, of rows at `offsets`; 0 where there is no row or channel."""
    d = FROM + tl.arange(0, WIDTH)
    places = source + offsets[:, None] + d.to(tl.int64)[None, :] * stride
    if FROM + WIDTH <= SIZE:
        x = tl.load(places, mask=live[:, None], other=0.0)
    else:
        x = tl.load(places, mask=live[:, None] & (d < SIZE)[None, :], other=0.0)
    return x


@triton.jit
def store_rows(target, offsets, live, x, stride, FROM: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr):
    """Stores what `load_rows` loads."""
    d = FROM + tl.arange(0, WIDTH)
    places = target + offsets[:, None] + d.to(tl.int64)[None, :] * stride
    tl.store(places, x.to(target.dtype.element_ty), mask=live[:, None] & (d < SIZE)[None, :])


@triton.jit
def load_keys(
    source, problem, first, strides, k_len, FROM: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr,
    UNIT: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Returns ``[BLOCK, WIDTH]``, channels FROM on, of key or value from key `first` on; 0 past the last key.

    WHOLE: the tile ends before the last key. TMA: `source` is a tensor descriptor.
    """
    if TMA:
        x = source.load([problem.batch, problem.key_head, first, FROM]).reshape(BLOCK, WIDTH)
    else:
        j = first + tl.arange(0, BLOCK)
        d = FROM + tl.arange(0, WIDTH)
        start = problem.batch.to(tl.int64) * strides.batch + problem.key_head.to(tl.int64) * strides.head
        places = source + start * UNIT + (j.to(tl.int64) * strides.row * UNIT)[:, None]
        places += d.to(tl.int64)[None, :] * strides.column
        if WHOLE and FROM + WIDTH <= SIZE:
            x = tl.load(places)
        elif FROM + WIDTH <= SIZE:
            x = tl.load(places, mask=(j < k_len)[:, None], other=0.0)
        elif WHOLE:
            x = tl.load(places, mask=(d < SIZE)[None, :], other=0.0)
        else:
            x = tl.load(places, mask=(j < k_len)[:, None] & (d < SIZE)[None, :], other=0.0)
    return x


# Both halves of a head dim.


@triton.jit
def zero_halves(ROWS: tl.constexpr, DIM: tl.constexpr):
    halves = Halves(zero_tile(ROWS, DIM.first), zero_tile(ROWS, DIM.second if DIM.second > 0 else 16))
    return halves


@triton.jit
def load_halves(source, offsets, live, stride, DIM: tl.constexpr):
    """Returns the rows at `offsets`, see `load_rows`."""
    first = load_rows(source, offsets, live, stride, 0, DIM.first, DIM.size)
    second = first
    if DIM.second > 0:
        second = load_rows(source, offsets, live, stride, DIM.first, DIM.second, DIM.size)
    halves = Halves(first, second)
    return halves


@triton.jit
def store_halves(target, offsets, live, x, stride, DIM: tl.constexpr):
    """Stores what `load_halves` loads."""
    store_rows(target, offsets, live, x.first, stride, 0, DIM.first, DIM.size)
    if DIM.second > 0:
        store_rows(target, offsets, live, x.second, stride, DIM.first, DIM.second, DIM.size)


@triton.jit
def add_halves(target, offsets, live, x, stride, DIM: tl.constexpr):
    """Adds to rows that this program has stored."""
    tl.debug_barrier()
    stored = load_halves(target, offsets, live, stride, DIM)
    first = stored.first.to(tl.float32) + x.first
    second = stored.second.to(tl.float32) + x.second if DIM.second > 0 else first
    store_halves(target, offsets, live, Halves(first, second), stride, DIM)


@triton.jit
def load_key_halves(
    source, problem, first, strides, k_len, DIM: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
    WHOLE: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Returns keys or values from `first` on, see `load_keys`. TMA takes head dims of one tile only."""
    x = load_keys(source, problem, first, strides, k_len, 0, DIM.first, DIM.size, UNIT, BLOCK, WHOLE, TMA)
    second = x
    if DIM.second > 0:
        second = load_keys(
            source, problem, first, strides, k_len, DIM.first, DIM.second, DIM.size, UNIT, BLOCK, WHOLE, False
        )
    halves = Halves(x, second)
    return halves


@triton.jit
def dot_halves(x, y, DIM: tl.constexpr, PRECISION: tl.constexpr):
    """Returns the product of x and y transposed, over the channels."""
    dots = tl.dot(x.first, tl.trans(y.first), input_precision=PRECISION)
    if DIM.second > 0:
        dots = tl.dot(x.second, tl.trans(y.second), dots, input_precision=PRECISION)
    return dots


@triton.jit
def dot_keys(
    x, source, problem, first, strides, k_len, DIM: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
    WHOLE: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Returns `dot_halves` of x and the keys or values of `load_key_halves`, and these.

    The second half is loaded after the first product: both halves at once take more registers and shared memory.
    """
    y = load_keys(source, problem, first, strides, k_len, 0, DIM.first, DIM.size, UNIT, BLOCK, WHOLE, TMA)
    dots = tl.dot(x.first, tl.trans(y), input_precision=PRECISION)
    second = y
    if DIM.second > 0:
        second = load_keys(
            source, problem, first, strides, k_len, DIM.first, DIM.second, DIM.size, UNIT, BLOCK, WHOLE, False
        )
        dots = tl.dot(x.second, tl.trans(second), dots, input_precision=PRECISION)
    return dots, Halves(y, second)


@triton.jit
def add_product(total, weights, x, DIM: tl.constexpr, PRECISION: tl.constexpr):
    """Returns the halves `total` plus the product of `weights` and the halves x."""
    first = tl.dot(weights, x.first, total.first, input_precision=PRECISION)
    second = total.second
    if DIM.second > 0:
        second = tl.dot(weights, x.second, second, input_precision=PRECISION)
    halves = Halves(first, second)
    return halves


@triton.jit
def scale_halves(x, factor, DIM: tl.constexpr):
    """Returns x times a factor, which is one number or one for each row."""
    first = x.first * factor
    second = x.second
    if DIM.second > 0:
        second = second * factor
    halves = Halves(first, second)
    return halves


@triton.jit
def sum_of_products(x, y, DIM: tl.constexpr):
    """Returns the inner product of each row of the halves x and y, in float32."""
    sums = tl.sum(x.first.to(tl.float32) * y.first.to(tl.float32), 1)
    if DIM.second > 0:
        sums += tl.sum(x.second.to(tl.float32) * y.second.to(tl.float32), 1)
    return sums
