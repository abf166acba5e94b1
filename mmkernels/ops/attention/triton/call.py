"""What every launcher of the Triton attention kernels prepares: strides, flags, pieces of head dims, lists of tiles."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from mmkernels.ops.attention.inputs import Scores
from mmkernels.ops.attention.triton import tiles
from mmkernels.ops.common.triton.constants import LOG2E
from mmkernels.ops.common.triton.launch import ceil_div, precision
from mmkernels.runtime.triton import launch
from mmkernels.runtime.tuning import Config, architecture

_LIST_BLOCK = 256
_SMALL = Config(0, 0, 4, 1)


@cache
def pieces(dim: int) -> tuple[int, int]:
    """Two powers of two, of at least 16 channels or 0, that cover a head dim with the least to spare.

    Tile widths must be powers of two: 72 channels would take 128, twice the work, and take 64 + 16.
    """
    whole = max(16, triton.next_power_of_2(dim))
    first = whole // 2
    if first < 16 or dim <= first:
        return whole, 0
    second = max(16, triton.next_power_of_2(dim - first))
    return (first, second) if first + second < whole else (whole, 0)


def strides_of(x: Tensor, *dims: int) -> tuple[int, ...]:
    """Strides, 0 where a dim of size 1 is broadcast."""
    return tuple(0 if x.shape[dim] == 1 else x.stride(dim) for dim in dims)


class Call:
    """One attention call as the kernels take it.

    Args:
        packed: a problem is a key head with all its query heads; else each query head is its own.
        shared: where all batch entries have one key, they are rows of one problem.
    """

    def __init__(
        self,
        args: Scores,
        *,
        packed: bool = True,
        shared: bool = True,
    ) -> None:
        query, key = args.query, args.key
        self.query, self.key, self.scale = query, key, args.scale
        self.batch, self.heads, self.q_len, self.dim = query.shape
        self.key_heads, self.k_len = key.shape[1], key.shape[2]
        self.group = self.heads // self.key_heads
        self.packed = packed
        self.shared = shared and key.shape[0] == 1 and self.batch > 1
        self.sizes = (self.batch, self.heads, self.key_heads, self.q_len, self.k_len)
        self.problem_heads = self.key_heads if packed else self.heads
        self.problem_batch = 1 if self.shared else self.batch
        self.problems = self.problem_batch * self.problem_heads
        self.rows = self.q_len * (self.group if packed else 1) * (self.batch if self.shared else 1)
        start, end, key_valid, dense, bias = args.start, args.end, args.key_valid, args.dense, args.bias
        self.masks = (start, end, _bytes(key_valid), _bytes(dense), bias)
        self.mask_strides = _mask_strides(start, end, key_valid, dense, bias)
        self.key_strides = key_strides(key)
        self.hides = any(x is not None for x in (start, key_valid, dense, bias))
        # Within its spans every key may be hidden all the same.
        self.all_partial = any(x is not None for x in (key_valid, dense, bias))
        self.constants: dict[str, Any] = {
            "GROUP": self.group,
            "PACKED": packed,
            "SHARED": self.shared,
            "ALL_PARTIAL": self.all_partial,
            "NEGATE": args.scale < 0,
            "PRECISION": precision(query.dtype),
            "DIM": self.dim,
            "D0": pieces(self.dim)[0],
            "D1": pieces(self.dim)[1],
        }

    @property
    def scale_log2(self) -> float:
        """What scores are multiplied by for a base-2 softmax; a negative scale negates the query instead."""
        return abs(self.scale) * LOG2E.value

    def row_tiles(self, config: Config) -> int:
        return ceil_div(self.rows, config.block_q)

    def key_tiles(self, config: Config) -> int:
        return ceil_div(self.k_len, config.block_k)

    def lists(self, config: Config, *, of_rows: bool) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        """For each tile of keys (`of_rows`: of rows) the tiles of the other kind that meet it, see `list_tiles`."""
        start, end, key_valid, dense, _ = self.masks
        rows, keys = self.row_tiles(config), self.key_tiles(config)
        masked = [x for x in (start, end, key_valid, dense) if x is not None]
        map_batch = self.batch if not self.shared and any(x.shape[0] > 1 for x in masked) else 1
        map_heads = self.problem_heads if dense is not None and dense.shape[1] > 1 else 1
        entries = map_batch * map_heads
        device = self.query.device
        status = torch.empty(entries, rows, keys, dtype=torch.int8, device=device)
        lines, length = (rows, keys) if of_rows else (keys, rows)
        found = torch.empty(entries, lines, length, dtype=torch.int32, device=device)
        counts = torch.empty(entries, lines, 2, dtype=torch.int32, device=device)
        launch(
            tiles.tile_status, (rows * keys * entries,), _SMALL,
            self.masks, self.mask_strides, status, self.sizes, map_heads, rows, keys,
            GROUP=self.group, PACKED=self.packed, SHARED=self.shared, BLOCK_Q=config.block_q, BLOCK_K=config.block_k,
        )  # fmt: skip
        steps = (keys, 1) if of_rows else (1, keys)
        launch(tiles.list_tiles, (lines * entries,), _SMALL, status, found, counts, lines, length, *steps,
               BLOCK=_LIST_BLOCK)  # fmt: skip
        strides = (map_heads * lines if map_batch > 1 else 0, lines if map_heads > 1 else 0)
        return (found, counts), strides


def unit_of(*tensors: Tensor) -> int:
    """8 where all strides of batch, head and row divide by it, else 1: see tiles.py."""
    return 8 if all(n % 8 == 0 for x in tensors for n in x.stride()[:3]) else 1


def in_units(strides: tuple[int, ...], unit: int) -> tuple[int, ...]:
    return (strides[0] // unit, strides[1] // unit, strides[2] // unit, strides[3])


NO_LISTS: tuple[Any, tuple[int, int]] = ((None, None), (0, 0))


def key_strides(x: Tensor) -> tuple[int, ...]:
    """Of key or value: a batch of 1 serves all."""
    return (0 if x.shape[0] == 1 else x.stride(0), *x.stride()[1:])


def tma_descriptor(x: Tensor, block: int) -> Any:
    """A tensor descriptor of key or value for the copy engine of Hopper and later; None where that can't be."""
    if architecture(x.device) not in ("sm_90", "sm_100"):
        return None
    size = x.element_size()
    aligned = x.stride(3) == 1 and all(n * size % 16 == 0 for n in x.stride()[:3]) and x.data_ptr() % 16 == 0
    if not aligned or pieces(x.shape[3]) != (x.shape[3], 0) or 0 in x.stride():
        return None
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, block, x.shape[3]])


def _bytes(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.view(torch.uint8)


def _mask_strides(
    start: Tensor | None, end: Tensor | None, key_valid: Tensor | None, dense: Tensor | None, bias: Tensor | None
) -> tuple[int, ...]:
    found: tuple[int, ...] = ()
    for x, dims in ((start, 2), (end, 2), (key_valid, 2), (dense, 4), (bias, 4)):
        found += (0,) * dims if x is None else strides_of(x, *range(dims))
    return found
