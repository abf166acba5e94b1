"""The FAISS index of an `EmbeddingCache`: exact inner products, kept beside the rows, which are the truth."""

from __future__ import annotations

import importlib
import os
import struct
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmkernels.models.embeddings_files import SavedIndex, index_file, remove_other_indexes, replace_file, sha256_of
from mmkernels.models.embeddings_store import Store

# How FAISS writes an IndexFlatIP: type, d, rows, two unused, trained, metric, number of floats; then the floats.
_HEADER = struct.Struct("<4sIqqqBiQ")
_INNER_PRODUCT = 0


class IndexFileError(ValueError):
    """A saved index is not the one that the manifest describes."""


def faiss() -> Any:
    """The faiss module, whose import takes a while and which is optional."""
    try:
        return importlib.import_module("faiss")
    except ImportError as error:
        raise ImportError(
            'EmbeddingCache.search needs faiss: pip install "mmkernels[retrieval]" (encoding, reading and ranks do not)'
        ) from error


class RowIndex:
    """A store's IndexFlatIP: loaded or built when it is first needed, then extended by what was appended."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._index: Any = None  # of the first ntotal rows
        self._saved = 0  # rows that the index on disk covers
        self._damaged: SavedIndex | None = None

    def rows(self) -> Tensor | None:
        """All rows ``[N, d]`` float32, if the index holds them: its own memory, valid until it changes."""
        index = self._index
        if index is None or index.ntotal < len(self._store):
            return None
        return torch.from_numpy(faiss().rev_swig_ptr(index.get_xb(), index.ntotal * index.d)).view(-1, index.d)

    def search(self, query: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Scores float32 and rows int64 ``[n, k]``, k at most the rows there are, in FAISS's order."""
        index = self._current()
        if index.ntotal - self._saved >= max(1, self._saved // 8):  # so that all the saving is linear in the rows
            try:
                self.save(lock_timeout=0)
            except TimeoutError:  # another process writes: a later search will save it
                pass
            except OSError as error:  # a folder that can't be written, a full disk: searching goes on
                warnings.warn(f"the index is kept in memory alone: {error}", RuntimeWarning, stacklevel=3)
                self._saved = index.ntotal
        scores, rows = index.search(query.numpy(), min(k, index.ntotal))
        return torch.from_numpy(scores), torch.from_numpy(rows)

    def save(self, lock_timeout: float | None = None) -> None:
        """Bring it up to date and write it, unless what is on disk covers it.

        Args:
            lock_timeout: None: the store's.
        """
        store, index = self._store, self._current()
        if not self._is_saved():
            with store.lock(store.lock_timeout if lock_timeout is None else lock_timeout):
                if not self._is_saved():
                    saved = save_index(store.folder, index)
                    store.record_index(saved)
                    remove_other_indexes(store.folder, saved.file)
                    self._damaged = None
        self._saved = index.ntotal

    def _is_saved(self) -> bool:
        """Whether the index that the manifest names has all rows of this one, and is there."""
        saved = self._store.saved_index
        if saved is None or saved == self._damaged or saved.rows < self._index.ntotal:
            return False
        return (self._store.folder / saved.file).is_file()

    def _current(self) -> Any:
        self._store.check_folder()
        if self._index is None:
            self._index = self._load()
        if self._index.ntotal < len(self._store):
            extend_index(self._index, len(self._store), self._store.blocks(self._index.ntotal))
        return self._index

    def _load(self) -> Any:
        """The index on disk, or an empty one."""
        store = self._store
        empty = faiss().IndexFlatIP(store.dim)
        store.refresh()
        while (saved := store.saved_index) is not None:
            try:
                index = load_index(store.folder, saved, empty.d, store.verify)
                self._saved = saved.rows
                return index
            except IndexFileError as error:
                store.refresh()
                if store.saved_index == saved:  # no other process has saved a newer one in between
                    message = f"{error}; it is built again from the shards, which hold the rows themselves"
                    warnings.warn(message, RuntimeWarning, stacklevel=5)
                    self._damaged = saved
                    break
        return empty


def extend_index(index: Any, rows: int, blocks: Iterable[Tensor]) -> None:
    """Make an IndexFlatIP hold `rows` rows: after those it has come those of `blocks`, each ``[n, d]`` of any dtype.

    `index.add` would let its memory grow by doubling, with a copy each time; this takes what is needed, once.
    """
    dim, done = index.d, index.ntotal
    index.codes.resize(rows * dim * 4)  # bytes
    held = faiss().rev_swig_ptr(index.get_xb(), rows * dim).reshape(rows, dim)
    for block in blocks:
        held[done : done + len(block)] = block.float().numpy()
        done += len(block)
    assert done == rows
    index.ntotal = rows  # last: had a block failed, the index would still be as before


def load_index(folder: Path, saved: SavedIndex, dim: int, verify: bool) -> Any:
    """The saved IndexFlatIP.

    Its header and size are checked before FAISS sees the file, so that no other kind of index is read, and nothing is
    allocated that the file doesn't hold.

    Args:
        verify: compare the checksum too.

    Raises:
        IndexFileError: the file is missing or isn't that index.
    """
    path = folder / saved.file
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header = file.read(_HEADER.size)
        if header != _header(saved.rows, dim, header) or size != _HEADER.size + 4 * saved.rows * dim:
            raise IndexFileError(f"{path}: must be an IndexFlatIP of {saved.rows} rows of {dim}, got another file")
        if verify and sha256_of(path) != saved.sha256:
            raise IndexFileError(f"{path}: must have the SHA-256 that the manifest says, got another")
        index = faiss().read_index(str(path))
    except (OSError, RuntimeError) as error:
        raise IndexFileError(f"{path}: must be an index, got an error: {error}") from error
    if (type(index).__name__, index.d, index.ntotal) != ("IndexFlatIP", dim, saved.rows):
        raise IndexFileError(f"{path}: must be an IndexFlatIP of {saved.rows} rows of {dim}, got another index")
    return index


def save_index(folder: Path, index: Any) -> SavedIndex:
    """Write the index; it counts once a manifest records it. The caller holds the lock.

    Raises:
        OSError: the disk is full, or the like.
    """
    path = folder / index_file(index.ntotal)
    checksum = ""

    def write(partial: Path) -> None:
        nonlocal checksum
        try:
            faiss().write_index(index, str(partial))
        except RuntimeError as error:  # how FAISS reports a full disk
            raise OSError(None, str(error)) from error
        if os.path.getsize(partial) != _HEADER.size + 4 * index.ntotal * index.d:
            raise OSError(None, "FAISS wrote a file of another size than an IndexFlatIP has")
        checksum = sha256_of(partial)

    replace_file(path, write)
    return SavedIndex(index.ntotal, checksum)


def _header(rows: int, dim: int, found: bytes) -> bytes:
    """The header that the file must start with; its two unused numbers are taken from the `found` one."""
    if len(found) != _HEADER.size:
        return b""
    unused = _HEADER.unpack(found)[3:5]
    return _HEADER.pack(b"IxFI", dim, rows, *unused, True, _INNER_PRODUCT, rows * dim)
