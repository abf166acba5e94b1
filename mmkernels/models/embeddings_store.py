"""The rows of an `EmbeddingCache`: open shards, the row of each key, and appending."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from mmkernels.models.embeddings_files import (
    KEY_BYTES,
    MANIFEST,
    EmbeddingCacheError,
    Manifest,
    SavedIndex,
    locked,
    open_shard,
    read_manifest,
    write_manifest,
    write_shard,
)

_SHARD_BYTES = 64 * 2**20  # of a shard, at most: what writing one takes in memory, and what an interrupt can cost


class Store:
    """A folder's rows, open.

    Args:
        dtype, normalized: what the folder must hold. None: what it holds; float32 and True where it holds nothing when
            the first rows are made ready.
        verify, lock_timeout: as in `EmbeddingCache`.
    """

    def __init__(
        self,
        folder: Path,
        model_id: str,
        dtype: torch.dtype | None,
        normalized: bool | None,
        verify: bool,
        lock_timeout: float,
    ) -> None:
        self.folder, self.model_id, self.verify, self.lock_timeout = folder, model_id, verify, lock_timeout
        self.manifest: Manifest | None = None
        self.row_of: dict[bytes, int] = {}
        self.keys: list[Tensor] = []  # each shard's [rows, 32] uint8
        self.embeddings: list[Tensor] = []  # each shard's [rows, d]
        self._dtype, self._normalized = dtype, normalized
        self.refresh()

    def __len__(self) -> int:
        return len(self.row_of)

    @property
    def dim(self) -> int | None:
        return self.manifest.dim if self.manifest else None

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype or (self.manifest.dtype if self.manifest else torch.float32)

    @property
    def normalized(self) -> bool:
        if self._normalized is not None:
            return self._normalized
        return self.manifest.normalized if self.manifest else True

    @property
    def saved_index(self) -> SavedIndex | None:
        return self.manifest.index if self.manifest else None

    def rows_per_shard(self, dim: int) -> int:
        return max(1, _SHARD_BYTES // (dim * self.dtype.itemsize + KEY_BYTES))

    def settle(self) -> None:
        """Before rows are made ready: from here on `dtype` and `normalized` are what they are now."""
        if self.manifest is None:
            self.refresh()
        self._dtype, self._normalized = self.dtype, self.normalized

    def check_folder(self) -> None:
        """Raise where the folder of an open cache is gone."""
        if not self.folder.is_dir():
            raise EmbeddingCacheError(f"{self.folder}: must be the folder that this cache is in, got none: it is gone")

    def refresh(self) -> int:
        """Adds the rows that other processes have appended, and returns their number."""
        manifest = read_manifest(self.folder)
        if manifest is None and self.manifest is None:
            return 0
        self.check_folder()
        held = self.manifest.shards if self.manifest else ()
        if manifest is None or manifest.shards[: len(held)] != held:
            raise EmbeddingCacheError(
                f"{self.folder / MANIFEST}: must list what this cache was opened with, got another list; open it again"
            )
        for name, given, stored in (
            ("model_id", self.model_id, manifest.model_id),
            ("dtype", self._dtype, manifest.dtype),
            ("normalize", self._normalized, manifest.normalized),
            ("d", self.dim, manifest.dim),
        ):
            if given is not None and given != stored:
                raise EmbeddingCacheError(f"{self.folder}: {name} must be {stored!r}, as in this cache, got {given!r}")
        new = manifest.shards[len(held) :]
        self._take([open_shard(self.folder, shard, manifest, self.verify) for shard in new])
        self.manifest = manifest
        return sum(shard.rows for shard in new)

    def append(self, keys: list[bytes], rows: Tensor) -> None:
        """Write rows ``[n, d]`` of n different keys as one shard, but for keys that another process appended since."""
        with self.lock(self.lock_timeout):
            manifest = self.manifest or Manifest(self.model_id, rows.shape[1], self.dtype, self.normalized)
            if rows.shape[1] != manifest.dim:
                raise ValueError(f"embeddings must be [n, {manifest.dim}], as in this cache, got {tuple(rows.shape)}")
            new = [place for place, key in enumerate(keys) if key not in self.row_of]
            if not new:
                return
            if len(new) < len(keys):
                keys, rows = [keys[place] for place in new], rows[new]
            if self.manifest is None:
                write_manifest(self.folder, manifest)  # first: shards without one are a damaged cache
            names = torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).view(-1, KEY_BYTES)
            shard = write_shard(self.folder, len(manifest.shards), names, rows)
            manifest = replace(manifest, shards=(*manifest.shards, shard))
            write_manifest(self.folder, manifest)
            self._take([open_shard(self.folder, shard, manifest, verify=False)])
            self.manifest = manifest

    @contextlib.contextmanager
    def lock(self, timeout: float) -> Iterator[None]:
        """Holds the lock of the folder, after a refresh. The folder of a new cache is made."""
        if self.manifest is None:
            self.folder.mkdir(parents=True, exist_ok=True)
        self.check_folder()
        with locked(self.folder, timeout):
            self.refresh()
            yield

    def record_index(self, saved: SavedIndex) -> None:
        """Note in the manifest what the index on disk covers. The caller holds the lock."""
        assert self.manifest is not None
        manifest = replace(self.manifest, index=saved)
        write_manifest(self.folder, manifest)
        self.manifest = manifest

    def keys_of(self, rows: Tensor) -> list[bytes]:
        return _split(_gather(self.keys, rows)) if len(rows) else []

    def read(self, rows: Tensor) -> Tensor:
        return _gather(self.embeddings, rows) if len(rows) else torch.empty(0, self.dim or 0, dtype=self.dtype)

    def blocks(self, start: int = 0) -> Iterator[Tensor]:
        """The embeddings from a row on, as each shard has them: mapped from its file, not to be written."""
        for rows in self.embeddings:
            if start < len(rows):
                yield rows[max(start, 0) :]
            start -= len(rows)

    def _take(self, shards: list[tuple[Tensor, Tensor]]) -> None:
        """Adds open shards."""
        new: dict[bytes, int] = {}
        count = len(self)
        for keys, _ in shards:
            new.update(zip(_split(keys), range(count, count + len(keys))))
            count += len(keys)
        if len(new) != count - len(self) or not new.keys().isdisjoint(self.row_of):
            raise EmbeddingCacheError(f"{self.folder}: must hold every key once, got one twice in its shards")
        self.row_of.update(new)
        self.keys += [keys for keys, _ in shards]
        self.embeddings += [embeddings for _, embeddings in shards]


class Encoded:
    """Rows that are encoded and not on disk yet."""

    def __init__(self) -> None:
        self.keys: dict[bytes, None] = {}
        self.blocks: list[Tensor] = []

    @property
    def dim(self) -> int | None:
        return self.blocks[0].shape[1] if self.blocks else None

    def append_to(self, store: Store) -> None:
        """Write them as a shard, and forget them, whether or not that succeeds."""
        keys, blocks = list(self.keys), self.blocks
        self.keys, self.blocks = {}, []
        if keys:
            store.append(keys, torch.cat(blocks))


def _gather(shards: list[Tensor], rows: Tensor) -> Tensor:
    """``[n, w]`` at rows ``[n]`` of all shards' ``[rows, w]`` together."""
    ends = torch.tensor([len(shard) for shard in shards]).cumsum(0)
    shard_of = torch.bucketize(rows, ends, right=True)
    out = torch.empty(len(rows), shards[0].shape[1], dtype=shards[0].dtype)
    for number in shard_of.unique().tolist():
        here = shard_of == number
        out[here] = shards[number][rows[here] - (int(ends[number]) - len(shards[number]))]
    return out


def _split(keys: Tensor) -> list[bytes]:
    data = keys.numpy().tobytes()
    return [data[start : start + KEY_BYTES] for start in range(0, len(data), KEY_BYTES)]
