"""Tokens in groups in Triton: sums into them, copies out of them, products with them; and their launchers."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.ops.common.triton.launch import ceil_div
from mmkernels.plan import Config
from mmkernels.runtime.triton import launch

__all__ = ["Groups", "dots_with_groups", "group_means", "groups_of", "spread_groups", "sum_groups"]


@triton.jit
def sum_kernel(x, weights, order, starts, y, row, channels, BLOCK_C: tl.constexpr):
    """Store some channels of a group's weighted sum. Grid: (groups, tiles of channels)."""
    group = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < channels
    total = tl.zeros([BLOCK_C], tl.float32)
    for n in range(tl.load(starts + group), tl.load(starts + group + 1)):
        token = tl.load(order + n)
        values = tl.load(x + token * row + c, mask=inside, other=0.0).to(tl.float32)
        if weights is not None:
            values *= tl.load(weights + token)
        total += values
    tl.store(y + group * channels + c, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def spread_kernel(y, weights, group, x, row, channels, BLOCK_C: tl.constexpr):
    """Store some channels of a token: its group's row times its weight. Grid: (tokens, tiles of channels)."""
    token = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    values = tl.load(y + tl.load(group + token) * row + c, mask=c < channels, other=0.0)
    if weights is not None:
        values = values.to(tl.float32) * tl.load(weights + token)
    tl.store(x + token * channels + c, values.to(x.dtype.element_ty), mask=c < channels)


@triton.jit
def dots_kernel(x, y, group, dots, x_row, y_row, channels, BLOCK_C: tl.constexpr):
    """Store the product of a token's row with its group's row. Grid: (tokens,)."""
    token = tl.program_id(0).to(tl.int64)
    x += token * x_row
    y += tl.load(group + token) * y_row
    total = tl.zeros([BLOCK_C], tl.float32)
    for first in range(0, channels, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        a = tl.load(x + c, mask=c < channels, other=0.0).to(tl.float32)
        total += a * tl.load(y + c, mask=c < channels, other=0.0).to(tl.float32)
    tl.store(dots + token, tl.sum(total, 0))


class Groups(NamedTuple):
    """Tokens in groups.

    Args:
        group: int64 [N], of each token.
        order: int64 [N], the tokens group by group.
        starts: int64 [number + 1], where in it each group begins.
        number: of the groups.
    """

    group: Tensor
    order: Tensor
    starts: Tensor
    number: int


def groups_of(group: Tensor, count: int) -> Groups:
    """Returns the groups of int64 [N], without a host sync."""
    ordered, order = group.sort(stable=True)
    starts = torch.searchsorted(ordered, torch.arange(count + 1, device=group.device))
    return Groups(group.contiguous(), order, starts, count)


def sum_groups(x: Tensor, groups: Groups, weights: Tensor | None, dtype: torch.dtype, plan: Config) -> Tensor:
    """Returns the weighted sum of each group's rows, [count, C]: of tokens in their order, so always the same.

    Args:
        x: [N, C].
        weights: float32 [N]; None: 1 each.
    """
    x, channels = _dense(x), x.shape[1]
    y = x.new_empty(groups.number, channels, dtype=dtype)
    block = _block(channels, plan)
    launch(
        sum_kernel, (groups.number, ceil_div(channels, block)), plan,
        x, weights, groups.order, groups.starts, y, x.stride(0), channels, BLOCK_C=block,
    )  # fmt: skip
    return y


def spread_groups(y: Tensor, groups: Groups, weights: Tensor | None, plan: Config) -> Tensor:
    """Returns each token's group's row times its weight, [N, C] in y's dtype."""
    y, channels, tokens = _dense(y), y.shape[1], len(groups.group)
    x = y.new_empty(tokens, channels)
    block = _block(channels, plan)
    launch(
        spread_kernel, (tokens, ceil_div(channels, block)), plan,
        y, weights, groups.group, x, y.stride(0), channels, BLOCK_C=block,
    )  # fmt: skip
    return x


def dots_with_groups(x: Tensor, y: Tensor, groups: Groups, plan: Config) -> Tensor:
    """Returns the product of each token's row of x with its group's row of y, float32 [N]."""
    x, y = _dense(x), _dense(y)
    dots = x.new_empty(x.shape[0], dtype=torch.float32)
    launch(
        dots_kernel, (x.shape[0],), plan,
        x, y, groups.group, dots, x.stride(0), y.stride(0), x.shape[1], BLOCK_C=_block(x.shape[1], plan),
    )  # fmt: skip
    return dots


def group_means(
    x: Tensor, sizes: Tensor | None, groups: Groups, dtype: torch.dtype, plan: Config
) -> tuple[Tensor, Tensor]:
    """Returns the mean of each group's rows, weighted by size, [count, C], and its sizes' sum, float32 [count]."""
    sizes = x.new_ones(x.shape[0], dtype=torch.float32) if sizes is None else sizes
    total = sum_groups(sizes[:, None], groups, None, torch.float32, plan)[:, 0]
    return sum_groups(x, groups, sizes / total[groups.group], dtype, plan), total


def _block(channels: int, plan: Config) -> int:
    """Returns how many channels a program takes: no more than there are."""
    return min(plan.block_k, max(16, triton.next_power_of_2(channels)))


def _dense(x: Tensor) -> Tensor:
    """Returns x with channels next to each other, copied only if they are not."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
