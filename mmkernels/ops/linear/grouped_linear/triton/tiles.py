"""Which rows each tile of a grouped product has. The groups' sizes lie on the device, and nothing waits for them.

A tile never has rows of two groups. So the groups have at most ``rows / height + groups`` tiles together; that many
programs are launched for each tile across, and those that find no rows end at once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor, int32, int64

from mmkernels.ops.common.triton.launch import ceil_div
from mmkernels.plan import Config
from mmkernels.runtime.triton import launch

_ONE_PROGRAM = Config(1, 16, 4, 1)
_LARGEST = tl.constexpr(2**31 - 1)


class Groups(NamedTuple):
    """Groups of rows; one more group has the rows behind the last, which belong to none.

    Args:
        bounds: int64 [number + 2], where each group begins, and the number of rows.
        tile_ends: int32 [number + 1], how many tiles the groups up to each one have.
        number: how many groups there are.
    """

    bounds: Any
    tile_ends: Any
    number: Any


class Place(NamedTuple):
    """Rows `row <= i < end` of a group."""

    group: Any
    row: Any
    end: Any


@triton.jit
def bounds_kernel(lengths, stride, bounds, tile_ends, number, rows, HEIGHT: tl.constexpr, GROUPS: tl.constexpr):
    """Store `Groups` of tiles of HEIGHT rows; a negative length counts as 0, and what exceeds rows is cut. Grid: (1,).

    GROUPS: a power of two above `number`.
    """
    g = tl.arange(0, GROUPS)
    length = tl.maximum(tl.load(lengths + g.to(tl.int64) * stride, mask=g < number, other=0).to(tl.int64), 0)
    length = tl.minimum(length, rows)  # so that no sum is too large for an integer
    length = tl.where(g == number, rows, length)
    behind = tl.cumsum(length, 0)
    begin, end = tl.minimum(behind - length, rows), tl.minimum(behind, rows)
    tl.store(bounds + g, begin, mask=g <= number)
    tl.store(bounds + g + 1, end, mask=g == number)
    tiles = (end - begin + HEIGHT - 1) // HEIGHT
    tl.store(tile_ends + g, tl.cumsum(tiles, 0).to(tl.int32), mask=g <= number)


@triton.jit
def place_of_tile(t, groups, HEIGHT: tl.constexpr, STEPS: tl.constexpr):
    """Returns the `Place` of the t-th tile: past the last one its group is ``number + 1``, and it has no rows.

    STEPS: of the search, so many that 2^STEPS is above the number of groups.
    """
    group = tl.zeros([], tl.int32)  # how many groups end up to tile t
    for step in tl.static_range(STEPS):
        probe = group + (1 << (STEPS - 1 - step))
        last = tl.load(groups.tile_ends + probe - 1, mask=probe <= groups.number + 1, other=_LARGEST)
        group = tl.where(last <= t, probe, group)
    exists = group <= groups.number
    before = tl.load(groups.tile_ends + group - 1, mask=exists & (group > 0), other=0)
    begin = tl.load(groups.bounds + group, mask=exists, other=0)
    end = tl.load(groups.bounds + group + 1, mask=exists, other=0)
    place = Place(group, begin + (t - before).to(tl.int64) * HEIGHT, end)
    return place


def groups_of(lengths: Tensor, rows: int, height: int) -> Groups:
    """Returns the groups in tiles of so many rows."""
    number = lengths.shape[0]
    bounds, tile_ends = lengths.new_empty(number + 2, dtype=int64), lengths.new_empty(number + 1, dtype=int32)
    launch(
        bounds_kernel, (1,), _ONE_PROGRAM,
        lengths, lengths.stride(0), bounds, tile_ends, number, rows,
        HEIGHT=height, GROUPS=triton.next_power_of_2(number + 1),
    )  # fmt: skip
    return Groups(bounds, tile_ends, number)


def tiles_of(rows: int, number: int, height: int) -> int:
    """Returns how many tiles the groups have at most, the rows behind them too."""
    return min(rows, ceil_div(rows, height) + number)


def search_steps(number: int) -> int:
    """Returns STEPS of `place_of_tile`."""
    return (number + 1).bit_length()
