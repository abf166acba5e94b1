"""Rows of tokens composed from two tensors: the kernel of scatter_tokens and select_tokens, forward and backward."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from mmkernels.ops.common.triton.launch import ceil_div
from mmkernels.runtime.triton import launch
from mmkernels.runtime.tuning import config


class RowStrides(NamedTuple):
    """Where rows lie that are numbered through ``[outer, inner]``: strides in elements."""

    inner: int
    outer: int
    row: int
    column: int


@triton.jit
def row_offsets(row, strides):
    """Returns the offsets of rows, int64."""
    row = row.to(tl.int64)
    return row // strides.inner * strides.outer + row % strides.inner * strides.row


@triton.jit
def compose_kernel(
    base, picked, source, weights, out, base_strides, picked_strides, rows, columns,
    ADD: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Writes one tile: see `mmkernels.ops.tokens.rows.compose`. Grid: (tiles of rows, tiles of columns)."""
    row = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    column = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    live = (row < rows)[:, None] & (column < columns)[None, :]
    number = tl.load(source + row, mask=row < rows, other=-1)
    there = (number >= 0)[:, None]
    tile = tl.zeros([BLOCK_Q, BLOCK_K], out.dtype.element_ty)
    if base is not None:
        at = row_offsets(row, base_strides)[:, None] + column[None, :] * base_strides.column
        tile = tl.load(base + at, mask=live if ADD else live & (number < 0)[:, None], other=0.0)
    if picked is not None:
        at = row_offsets(number, picked_strides)[:, None] + column[None, :] * picked_strides.column
        other = tl.load(picked + at, mask=live & there, other=0.0)
        if weights is not None:
            weight = tl.load(weights + row, mask=row < rows, other=0.0)
            other = (weight[:, None] * other.to(tl.float32)).to(other.dtype)
        if ADD:
            other = (tile.to(tl.float32) + other.to(tl.float32)).to(tile.dtype)
        tile = tl.where(there, other, tile)
    tl.store(out + row.to(tl.int64)[:, None] * columns + column[None, :], tile, mask=live)


def compose(
    op: str,
    out: Tensor,
    base: Tensor | None,
    picked: Tensor | None,
    source: Tensor,
    weights: Tensor | None = None,
    *,
    add: bool = False,
) -> None:
    """Write to `out`, which is contiguous, what `mmkernels.ops.tokens.rows.compose` returns.

    Args:
        op: whose plan has the tile sizes.
        base, picked: ``[rows, C]`` or ``[outer, inner, C]``, of any strides.
        source: integers ``[rows]``.
        weights: float32 ``[rows]``: what the rows of `picked` are multiplied by.
    """
    if not out.numel():
        return
    columns = out.shape[-1]
    plan = config(op, "compose", out.device, out.dtype, columns)
    launch(
        compose_kernel, (ceil_div(len(source), plan.block_q), ceil_div(columns, plan.block_k)), plan,
        base, picked, source, weights, out, None if base is None else strides_of(base),
        None if picked is None else strides_of(picked), len(source), columns,
        ADD=add, BLOCK_Q=plan.block_q, BLOCK_K=plan.block_k,
    )  # fmt: skip


def strides_of(x: Tensor) -> RowStrides:
    """Returns where the rows of ``[rows, C]`` or ``[outer, inner, C]`` lie."""
    return RowStrides(max(x.shape[-2], 1), x.stride(0) if x.dim() == 3 else 0, x.stride(-2), x.stride(-1))
