"""What an `EmbeddingCache` holds in memory: the number and the key of each row; after a search, the rows."""

from __future__ import annotations

from array import array
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from mmkernels.models.embeddings_arguments import check_rows
from mmkernels.models.embeddings_rows import floats, top
from mmkernels.models.embeddings_store import Store
from mmkernels.runtime.checks import check_range


class Memory:
    """The rows of a store that are known. A row's place is its position among them; its number is the store's."""

    def __init__(self, store: Store, limit: int) -> None:
        self._store, self._limit = store, limit
        self.row_of: dict[bytes, int] = {}
        self.keys: list[bytes] = []  # by place
        self._numbers = array("q")  # by place, ascending
        self._rows = floats(0, 0)  # with room for more
        self._held = 0  # so many of them are there

    def __len__(self) -> int:
        return len(self.keys)

    def take(self, numbers: list[int], keys: list[bytes]) -> list[int]:
        """Takes new rows of the store. Returns those whose key has a lower row, so that they don't count."""
        new, doubled = dict(zip(keys, numbers)), []
        if len(new) < len(keys) or not new.keys().isdisjoint(self.row_of):
            new = {}
            for number, key in zip(numbers, keys):
                if key in self.row_of or key in new:
                    doubled.append(number)
                else:
                    new[key] = number
        self.row_of.update(new)
        self._numbers.extend(new.values())
        self.keys.extend(new)
        return doubled

    def numbers(self) -> np.ndarray:
        """The numbers of all rows ``[N]`` int64, a copy."""
        return np.array(self._numbers, dtype=np.int64)

    def largest(self) -> int:
        """The largest number; -1 without rows."""
        return self._numbers[-1] if self._numbers else -1

    def places(self, name: str, rows: Tensor) -> Tensor:
        """Returns the places of rows ``[n]`` int64; `name` is the argument's, for the error."""
        check_rows(name, rows)
        rows = rows.cpu()
        check_range(name, rows, 0, self.largest())
        if self.largest() == len(self) - 1:  # no number is missing
            return rows
        numbers = torch.from_numpy(self.numbers())
        places = torch.searchsorted(numbers, rows)
        if missing := rows[numbers[places] != rows].tolist():
            raise ValueError(f"{name} must be rows of the cache, got {missing[0]}, which is not there")
        return places

    def read(self, places: Tensor | None) -> Tensor:
        """Returns the rows float32 at these places; None: all."""
        if self._held == len(self):
            return self._rows[: len(self)] if places is None else self._rows[places]
        if places is None:
            return self._stored(self.numbers(), floats(len(self), self._dim))
        different, back = places.unique(return_inverse=True)
        return self._stored(self.numbers()[different.numpy()], floats(len(different), self._dim))[back]

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """Gives all rows float32, the place of the first and ``[n, d]``: all at once if they fit into memory."""
        if 4 * len(self) * self._dim <= self._limit:
            if len(self._rows) < len(self):
                room = floats(max(len(self), len(self._rows) * 5 // 4), self._dim)
                if self._held:
                    room[: self._held] = self._rows[: self._held]
                self._rows = room
            self._stored(self.numbers()[self._held :], self._rows[self._held : len(self)])
            self._held = len(self)
            yield 0, self._rows[: len(self)]
            return
        step, numbers = self._store.rows_together(), self.numbers()
        for start in range(0, len(numbers), step):
            yield start, self._store.rows(numbers[start : start + step])

    def nearest(self, query: Tensor, k: int, probes: int) -> tuple[Tensor, Tensor]:
        """As `best`, of the rows that the store's index leads to. Where they are too few: score -inf and place -1."""
        scores, places = floats(len(query), k).fill_(-torch.inf), floats(len(query), k).long().fill_(-1)
        numbers = self.numbers()
        for n, found in enumerate(self._store.nearest(query.numpy(), 4 * k, probes)):  # more, as it orders them roughly
            found = found[np.isin(found, numbers)]  # without those that don't count, or came since the last refresh
            values, order = top(query[n : n + 1] @ self._store.rows(found).T, k)
            scores[n, : values.shape[1]] = values
            places[n, : values.shape[1]] = torch.from_numpy(np.searchsorted(numbers, found))[order]
        return scores, places

    @property
    def _dim(self) -> int:
        return self._store.header.dim if self._store.header else 0

    def _stored(self, numbers: np.ndarray, out: Tensor) -> Tensor:
        """Reads rows from the store into `out`, and returns it."""
        step = self._store.rows_together()
        for start in range(0, len(numbers), step):
            out[start : start + step] = self._store.rows(numbers[start : start + step])
        return out
