"""What every launcher of the Triton attention kernels prepares: named tuples of arguments, lists of tiles."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from mmkernels.ops.attention.inputs import Scores
from mmkernels.ops.attention.philox import keep_scale
from mmkernels.ops.attention.triton.arguments import (
    Dropout,
    Gate,
    HeadDim,
    Layout,
    Lists,
    Masks,
    Sizes,
    Strides,
)
from mmkernels.ops.attention.triton.walks import list_tiles, tile_status
from mmkernels.ops.common.triton.constants import LOG2E
from mmkernels.ops.common.triton.launch import ceil_div, has_tma_layout, precision, stride_unit
from mmkernels.runtime.triton import launch
from mmkernels.runtime.tuning import Config

LISTED = 2**14  # scores of a problem from which on the tiles that a mask leaves are listed first
_LIST_BLOCK = 256
_SMALL = Config(0, 0, 4, 1)
_TMA_KEYS = 1024  # with fewer keys, the 5 us that a descriptor takes on the host are not small beside the kernel


@cache
def head_dim(size: int) -> HeadDim:
    """Returns the widths, powers of two of at least 16, that cover a head dim with the least to spare.

    72 channels would take one tile of 128, twice the work, and take 64 + 16.
    """
    whole = one_tile(size)
    first = whole.first // 2
    if first < 16 or size <= first:
        return whole
    second = one_tile(size - first).first
    return HeadDim(size, first, second) if first + second < whole.first else whole


def one_tile(size: int) -> HeadDim:
    """Returns a head dim that one tile covers."""
    return HeadDim(size, max(16, triton.next_power_of_2(size)), 0)


class Call:
    """One attention call as the kernels take it.

    Args:
        packed: a problem is a key head with all its query heads; else each query head is one.
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
        self.batch, self.heads, self.q_len, dim = query.shape
        self.key_heads, self.k_len = key.shape[1], key.shape[2]
        self.dim = head_dim(dim)
        shared = shared and key.shape[0] == 1 and self.batch > 1
        self.layout = Layout(self.heads // self.key_heads, packed, shared)
        self.sizes = Sizes(self.batch, self.heads, self.key_heads, self.q_len, self.k_len)
        self.problem_heads = self.key_heads if packed else self.heads
        self.problems = self.problem_heads * (1 if shared else self.batch)
        self.rows = self.q_len * (self.layout.group if packed else 1) * (self.batch if shared else 1)
        start, end, key_valid, dense, bias = args.start, args.end, args.key_valid, args.dense, args.bias
        self.masks = Masks(
            start, end, _bytes(key_valid), _bytes(dense), bias,
            *mask_strides(start, 2), *mask_strides(end, 2), *mask_strides(key_valid, 2), *mask_strides(dense, 4),
            *mask_strides(bias, 4),
        )  # fmt: skip
        self.hides = any(x is not None for x in (start, key_valid, dense, bias))
        self.constants: dict[str, Any] = {
            "LAYOUT": self.layout,
            "ALL_PARTIAL": any(x is not None for x in (key_valid, dense, bias)),  # also within its spans
            "NEGATE": args.scale < 0,
            "DIM": self.dim,
            "PRECISION": precision(query.dtype),
        }

    @property
    def scale_log2(self) -> float:
        """What scores are multiplied by for a base-2 softmax; a negative scale negates the query instead."""
        return abs(self.scale) * LOG2E.value

    def row_tiles(self, config: Config) -> int:
        return ceil_div(self.rows, config.block_q)

    def key_tiles(self, config: Config) -> int:
        return ceil_div(self.k_len, config.block_k)

    def lists(self, config: Config, *, of_rows: bool) -> Lists | None:
        """Returns the lists of the tiles that the mask leaves, or None where they are not worth making.

        Spans are a range of keys for each tile of rows, which needs no list.
        """
        masks = self.masks
        listed = masks.dense is not None or (not of_rows and (masks.start is not None or masks.key_valid is not None))
        return self.make_lists(config, of_rows=of_rows) if listed and self.rows * self.k_len >= LISTED else None

    def make_lists(self, config: Config, *, of_rows: bool) -> Lists:
        """Returns for each tile of rows (else: of keys) the tiles of keys (rows) that meet it, see `list_tiles`."""
        dense = self.masks.dense
        masked = [x for x in (self.masks.start, self.masks.end, self.masks.key_valid, dense) if x is not None]
        rows, keys = self.row_tiles(config), self.key_tiles(config)
        map_batch = self.batch if not self.layout.shared and any(x.shape[0] > 1 for x in masked) else 1
        map_heads = self.problem_heads if dense is not None and dense.shape[1] > 1 else 1
        entries = map_batch * map_heads
        device = self.query.device
        status = torch.empty(entries, rows, keys, dtype=torch.int8, device=device)
        lines, length = (rows, keys) if of_rows else (keys, rows)
        tiles = torch.empty(entries, lines, length, dtype=torch.int32, device=device)
        counts = torch.empty(entries, lines, 2, dtype=torch.int32, device=device)
        launch(
            tile_status, (rows * keys * entries,), _SMALL,
            self.masks, status, self.sizes, map_heads, rows, keys,
            LAYOUT=self.layout, BLOCK_Q=config.block_q, BLOCK_K=config.block_k,
        )  # fmt: skip
        steps = (keys, 1) if of_rows else (1, keys)
        launch(list_tiles, (lines * entries,), _SMALL, status, tiles, counts, lines, length, *steps, BLOCK=_LIST_BLOCK)
        return Lists(tiles, counts, map_heads * lines if map_batch > 1 else 0, lines if map_heads > 1 else 0)


def unit_of(*tensors: Tensor) -> int:
    """Returns the `stride_unit` of the strides of batch, head and row."""
    return stride_unit(n for x in tensors for n in x.stride()[:3])


def strides_of(x: Tensor, unit: int = 1) -> Strides:
    """Returns the strides in units; a batch of 1 serves all."""
    batch, head, row, channel = x.stride()
    return Strides(0 if x.shape[0] == 1 else batch // unit, head // unit, row // unit, channel)


def broadcast_strides(x: Tensor) -> tuple[int, ...]:
    """Returns strides, 0 where a dimension of size 1 is broadcast."""
    return tuple(0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True))


def mask_strides(x: Tensor | None, dims: int) -> tuple[int, ...]:
    """Returns `broadcast_strides`, 0 for a tensor that the call does not have."""
    return (0,) * dims if x is None else broadcast_strides(x)


def gate_of(gate: Tensor | None) -> Gate | None:
    return None if gate is None else Gate(gate, 0 if gate.numel() == 1 else gate.stride(0))


def dropout_of(seed: Tensor | None, dropout_p: float) -> Dropout | None:
    """Returns the `Dropout` of a call. Words of Philox below the threshold are dropped; all of them at 2^32."""
    return None if seed is None else Dropout(seed, round(dropout_p * 2**32), keep_scale(dropout_p))


def tma_sources(call: Call, value: Tensor | None, config: Config) -> tuple[object, object]:
    """Returns key and value, as tensor descriptors where the copy engine can fetch both."""
    if value is None or call.k_len < _TMA_KEYS or call.rows <= config.block_q:
        return call.key, value
    sources = tma_descriptor(call.key, config.block_k), tma_descriptor(value, config.block_k)
    return (call.key, value) if None in sources else sources


def tma_descriptor(x: Tensor, block: int) -> Any:
    """Returns a tensor descriptor of key or value for the copy engine, or None where that cannot be."""
    if not has_tma_layout(x) or head_dim(x.shape[3]).first != x.shape[3]:
        return None
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, block, x.shape[3]])


def _bytes(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.view(torch.uint8)
