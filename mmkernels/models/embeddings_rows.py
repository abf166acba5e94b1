"""Rows of an `EmbeddingCache` on their way in, and the best of them for a query."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

_BLOCK = 2**20  # elements that are converted together
_SCORES = 2**25  # inner products that are computed together
_ROWS = 2048  # rows that one query is compared with at once
_QUERIES = 1024  # queries that are searched together
_STORED_ROWS, _STORED_BYTES, _STORED_SECONDS = 2048, 16 * 2**20, 5.0  # encoded rows wait for the first of these


def floats(*shape: int) -> Tensor:
    """Returns float32 on the CPU without values, whatever PyTorch's default dtype and device are."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def integers(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device="cpu")


class SearchResult(NamedTuple):
    """The result of `EmbeddingCache.search`, best first."""

    scores: Tensor
    """Inner products ``[n, k]`` float32."""
    rows: Tensor
    """Rows of the cache ``[n, k]`` int64."""
    keys: list[list[str]]
    """The keys of these rows, n lists of k."""


class Encoded:
    """Rows that are encoded and not stored yet."""

    def __init__(self) -> None:
        self.keys: dict[bytes, None] = {}
        self.blocks: list[Tensor] = []
        self._since = time.monotonic()

    def add(self, keys: Iterable[bytes], rows: Tensor) -> None:
        self.keys.update(dict.fromkeys(keys))
        self.blocks.append(rows)

    def are_due(self) -> bool:
        """Whether they are so many, or so old, that they should be stored."""
        size = len(self.keys) * self.blocks[0].shape[1] * self.blocks[0].itemsize
        late = time.monotonic() - self._since > _STORED_SECONDS
        return len(self.keys) >= _STORED_ROWS or size >= _STORED_BYTES or late

    def taken(self) -> tuple[list[bytes], Tensor]:
        """Returns them and forgets them, whether or not storing them succeeds."""
        keys, rows = list(self.keys), torch.cat(self.blocks)
        self.keys, self.blocks, self._since = {}, [], time.monotonic()
        return keys, rows


def converted(name: str, rows: Tensor, dtype: torch.dtype, normalize: bool) -> Tensor:
    """Returns rows ``[n, d]`` on the CPU, of length 1 if asked, finite, contiguous."""
    if rows.layout != torch.strided or rows.is_meta:
        raise TypeError(f"{name} must be dense, with values, got {'one on meta' if rows.is_meta else rows.layout}")
    rows = rows.detach().cpu()
    out = torch.empty(rows.shape, dtype=dtype, device="cpu")
    step = max(1, _BLOCK // rows.shape[1])
    for start in range(0, len(rows), step):
        block = rows[start : start + step]
        if normalize:
            wide = block.double()  # a large float32's square overflows
            length = wide.norm(dim=1, keepdim=True)
            if bool((length == 0).any()):
                row = start + int((length == 0).nonzero()[0, 0])
                raise ValueError(f"{name} must have a length, to be normalized, got zeros in row {row}")
            block = wide / length
        out[start : start + step] = block
    if out.numel() and not all(bool(extreme.isfinite()) for extreme in out.aminmax()):  # NaN and inf reach the extremes
        row = int((~out.isfinite()).any(dim=1).nonzero()[0])
        raise ValueError(f"{name} must be finite as {dtype}, got NaN or inf in row {row}")
    return out


def best(query: Tensor, k: int, blocks: Callable[[], Iterator[tuple[int, Tensor]]]) -> tuple[Tensor, Tensor]:
    """Returns the k largest inner products of each query, and where the rows are; of equal ones the first.

    Args:
        query: ``[n, d]`` float32.
        k: at most the number of rows.
        blocks: gives all rows: the place of the first, and ``[m, d]`` float32, each time that it is called.

    Returns:
        Scores ``[n, k]`` float32, best first, and places int64.
    """
    scores, places = floats(len(query), k), floats(len(query), k).long()
    for first in range(0, len(query), _QUERIES):
        some = query[first : first + _QUERIES]
        found, where = floats(len(some), 0), floats(len(some), 0).long()
        for start, block in blocks():
            for part in block.split(max(1, _SCORES // len(some))):
                values, columns = top(_products(some, part), k)
                where = torch.cat([where, columns + start], dim=1)
                found, order = top(torch.cat([found, values], dim=1), k)  # of equal ones the earlier block's are first
                where = where.gather(1, order)
                start += len(part)
        scores[first : first + _QUERIES], places[first : first + _QUERIES] = found, where
    return scores, places


def _products(query: Tensor, rows: Tensor) -> Tensor:
    """Inner products ``[n, m]`` of queries ``[n, d]`` and rows ``[m, d]``."""
    if len(query) != 1:
        return query @ rows.T
    twice = query.repeat(2, 1).T  # for one column PyTorch's product reads memory at half the speed
    return torch.cat([block @ twice for block in rows.split(_ROWS)])[:, :1].T


def top(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Returns the k largest of each row of ``[n, m]``, best first, and their columns; of equal ones the first."""
    if scores.shape[1] <= k:
        return scores.sort(dim=1, descending=True, stable=True)
    values, columns = scores.topk(k, dim=1)  # of those that equal the last, any
    columns, order = columns.sort(dim=1)
    values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    columns = columns.gather(1, order)
    for row in ((scores >= values[:, -1:]).sum(dim=1) > k).nonzero()[:, 0].tolist():
        line, order = scores[row].sort(descending=True, stable=True)
        values[row], columns[row] = line[:k], order[:k]
    return values, columns
