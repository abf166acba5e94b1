"""The rows of an `EmbeddingCache`: a table of LanceDB, in a folder or a bucket.

LanceDB keeps rows in data files and, for each commit, a manifest that lists them; a commit is one atomic step. What it
leaves to its users is here: checksums, as it reads damaged bytes as they are; syncing, which it does not do; joining
small files; and, in files of their own, forks and a way back after damage.
"""

from __future__ import annotations

import importlib
import random
import re
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from mmkernels.models.embeddings_damage import EmbeddingCacheError, check_written, damaged
from mmkernels.models.embeddings_forks import calls_lance
from mmkernels.models.embeddings_format import COLUMNS, Header, different_numbers, keys_of, numbers_of
from mmkernels.models.embeddings_table import (
    check_format,
    data_files,
    folder_of,
    folder_time,
    incomplete,
    lancedb,
    make_table,
    open_table,
    sync,
)

T = TypeVar("T")
INDEXES = ("IvfFlat", "IvfSq", "IvfPq", "IvfRq", "HnswFlat", "HnswSq", "HnswPq")

_TAKE_BYTES = 32 * 2**20  # of rows that are read together
_FILES, _MOST_FILES = 64, 512  # data files that are joined, see `join_files`
_APPENDS = 8  # after so many commits, of all processes, it is looked at
_ALL_KEPT = timedelta(days=36500)
_KEPT = timedelta(seconds=10)  # for which files that were joined are left to readers in other processes
_SOURCE_LINE = re.compile(r", /\S+\.rs:\d+:\d+")  # of LanceDB, which its errors name
_SYSTEM_ERROR = re.compile(r"\(os error (\d+)\)")
# Errors of a commit that another overtook.
_REPEAT = re.compile(r"conflict|incompatible transaction|not found|already exists", re.IGNORECASE)


class Store:
    """The table of a folder or a bucket.

    Args:
        place: a folder, or the URI of an object store.
        model_id, dtype, normalized: what the table must hold. None: what it holds; float32 and True where it holds
            nothing when the first rows are made ready.
        storage_options, verify, lock_timeout: as in `EmbeddingCache`.
    """

    def __init__(
        self,
        place: str | Path,
        model_id: str | None,
        dtype: torch.dtype | None,
        normalized: bool | None,
        storage_options: dict[str, str] | None,
        verify: bool,
        lock_timeout: float,
    ) -> None:
        lancedb()
        self.place, self.model_id, self._options = place, model_id, storage_options or {}
        self._dtype, self._normalized, self._verify, self._timeout = dtype, normalized, verify, lock_timeout
        self.header: Header | None = None
        self._table: Any = None
        self.version = self._files_to_join = 0
        self._seen = -1  # the largest number that `new` has returned
        self._next: int | None = 0  # the number of the next row, where it is known
        self._time = 0  # of the folder's last change, in ns, when this object last committed
        self._synced = data_files(self.folder)
        check_format(place)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_table"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        vars(self).setdefault("_table", None)

    @property
    def folder(self) -> Path | None:
        """The folder of the table's files; None in an object store."""
        return folder_of(self.place)

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype or (self.header.dtype if self.header else torch.float32)

    @property
    def normalized(self) -> bool:
        if self._normalized is not None:
            return self._normalized
        return self.header.normalized if self.header else True

    def settle(self) -> None:
        """Before rows are made ready: from here on `dtype` and `normalized` are what they are now."""
        if self.header is None:
            self.refresh()
        self._dtype, self._normalized = self.dtype, self.normalized

    # Calls of LanceDB.

    def _call(self, what: Callable[[], T]) -> T:
        """Returns what a function that calls LanceDB returns, and makes its errors OSError or EmbeddingCacheError."""
        try:
            self._check_there()
            if self._table is None and self.header is not None:  # after a pickle
                self._open()
            return what()
        except BaseException as error:  # LanceDB's panics are no Exceptions
            if isinstance(error, (EmbeddingCacheError, KeyboardInterrupt, SystemExit)):
                raise
            text = _SOURCE_LINE.sub("", str(error))
            found = _SYSTEM_ERROR.search(text)
            if number := error.errno if isinstance(error, OSError) else found and int(found[1]):
                raise OSError(number, f"{self.place}: {text}") from error
            raise EmbeddingCacheError(f"{self.place}: {text or type(error).__name__}") from error

    def close(self) -> None:
        """Forgets the table, so that `refresh` opens it anew."""
        self._table, self.header, self.version = None, None, 0

    def forget(self) -> None:
        """Forgets what was read, so that `refresh` and `new` read it again."""
        self.version, self._seen, self._next, self._time = 0, -1, None, 0

    def _open(self) -> None:
        self._table = None
        self._table = open_table(self.place, self._options)

    @calls_lance
    def refresh(self) -> bool:
        """Takes the newest version of the table. Returns whether it is another one than before."""
        self._check_there()
        changed, now = self.may_have_changed(), folder_time(self.folder)
        try:
            self._call(self._open if self._table is None else lambda: self._table.checkout_latest())
            if self._table is None:
                return False
            version = self._call(lambda: self._table.version)
            if version == self.version:
                if not changed:
                    return False
                self._call(self._open)  # another table may have taken the place of this one
            header = Header.of(self._call(lambda: self._table.schema))
        except (EmbeddingCacheError, KeyError, TypeError, ValueError) as error:
            raise self._manifest_error(error) from error
        for name, given, stored in (
            ("model_id", self.model_id, header.model_id),
            ("dtype", self._dtype, header.dtype),
            ("normalize", self._normalized, header.normalized),
        ):
            if given not in (None, stored):
                raise EmbeddingCacheError(f"{self.place}: {name} must be {stored!r}, as in this cache, got {given!r}")
        if self.header not in (None, header):
            raise EmbeddingCacheError(f"{self.place}: must be the cache that was opened, got another; open it again")
        self.header, self.version, self._next, self._time = header, version, None, now
        return True

    def _check_there(self) -> None:
        if self.header is not None and self.folder and not self.folder.is_dir():
            raise EmbeddingCacheError(f"{self.place}: must be the folder of this cache, got none: it is gone")

    def _manifest_error(self, error: Exception) -> EmbeddingCacheError:
        reason = str(error).removeprefix(f"{self.place}: ")
        return EmbeddingCacheError(
            f"{self.place}: can't be opened: {reason}. If its newest manifest is damaged, "
            "EmbeddingCache.repair(folder) goes back to the one before"
        )

    def may_have_changed(self) -> bool:
        """Whether to `refresh` before an append.

        False where the folder's time is that of this object's last commit or `refresh`. A commit of another process in
        the same tick of its clock is missed, and found by the append.
        """
        return self.folder is None or folder_time(self.folder) != self._time

    # Writing.

    @calls_lance
    def append(self, keys: list[bytes], rows: Tensor) -> tuple[list[int], list[bytes]]:
        """As `commit`. Returns as `new`, these rows among them."""
        version = self.commit(keys, rows)
        first, self._next = self._next if version == self.version + 1 else None, None
        if first is not None:  # no other process has committed meanwhile, so there is nothing to read
            self.version, self._next, self._seen = version, first + len(keys), first + len(keys) - 1
            return list(range(first, self._next)), keys
        self.refresh()
        found = self.new()
        if version == self.version:  # these rows are the last
            self._next = self._seen + 1
        return found

    @calls_lance
    def commit(self, keys: list[bytes], rows: Tensor) -> int:
        """Commits rows ``[n, d]`` with their keys, ``[n]`` of 32 bytes; they are on the disk when this returns.

        Returns:
            The version of the table.

        Raises:
            TimeoutError: commits of other processes were in the way for too long.
            OSError: the disk is full, or the like.
        """

        def add() -> int:
            if self.header is not None and self.header.dim != rows.shape[1]:
                raise ValueError(
                    f"embeddings must be [n, {self.header.dim}], as in this cache, got {tuple(rows.shape)}"
                )
            if self.header is not None:
                return self._add(self.header.to_arrow(keys, rows))
            header = Header(str(self.model_id), self.dtype, self.normalized, rows.shape[1], uuid.uuid4().hex)
            self._table = make_table(self.place, self._options, header.to_arrow(keys, rows))
            self.header = header
            return int(self._table.version)

        version = self._repeated(add)
        if self.folder is not None:
            if self._sync_new(version):  # if not another process is writing it
                check_written(self, self._seen)
            self._time = folder_time(self.folder)
        return version

    def _sync_new(self, version: int) -> list[str]:
        """Syncs a manifest, and the data files that are new. Returns those of them that are incomplete."""
        if self.folder is None:
            return []
        files = data_files(self.folder)
        new, self._synced = files - self._synced, files
        sync(self.folder / "data", new)
        sync(self.folder / "_versions", [f"{2**64 - 1 - version}.manifest"])
        return incomplete(self.folder / "data", new)

    def _repeated(self, what: Callable[[], T]) -> T:
        """Returns what a function returns that commits; repeats it where a commit of another process was in its way."""
        end = time.monotonic() + self._timeout
        while True:
            try:
                return self._call(what)
            except EmbeddingCacheError as error:
                if not _REPEAT.search(str(error)):
                    raise
                if time.monotonic() > end:
                    raise TimeoutError(
                        f"{self.place}: no commit in lock_timeout = {self._timeout} s: {error}"
                    ) from error
            time.sleep(random.uniform(0, 0.05))
            self.refresh()  # raises if the folder is gone, or another model's cache is in it by now

    def _add(self, data: Any) -> int:
        return int(self._table.add(data).version)

    @calls_lance
    def delete(self, numbers: list[int]) -> None:
        """Deletes rows; their numbers are not given again."""
        for start in range(0, len(numbers), 2**14):
            listed = ",".join(map(str, numbers[start : start + 2**14]))
            self._repeated(partial(self._delete, f"_rowid in ({listed})"))

    def _delete(self, which: str) -> None:
        self._table.delete(which)

    @calls_lance
    def join_files(self) -> None:
        """Joins the small data files that many appends leave, so that neither reading nor appending slows down.

        LanceDB copies all files of less than a million rows for it. So the larger they are, the more files are waited
        for.
        """
        if self.version % _APPENDS:
            return
        stats = self._call(lambda: self._table.stats())
        small = stats["fragment_stats"]["num_small_fragments"]
        if small < self._files_to_join + min(max(_FILES, stats["total_bytes"] // 2**20), _MOST_FILES):
            return
        try:
            self._call(lambda: self._table.optimize(cleanup_older_than=_ALL_KEPT))
            self._sync_new(self._table.version)  # before what was joined is deleted
            self._call(lambda: self._table.optimize(cleanup_older_than=_KEPT))
            self._files_to_join = 0
        except (EmbeddingCacheError, OSError):  # another process joins them, a file is damaged, the disk is full
            self._files_to_join = small

    @calls_lance
    def create_index(self, kind: str, options: dict[str, Any]) -> None:
        config = getattr(importlib.import_module("lancedb.index"), kind)(distance_type="dot", **options)
        self._call(lambda: self._table.create_index("vector", config=config))

    # Reading.

    @calls_lance
    def new(self) -> tuple[list[int], list[bytes]]:
        """Returns the numbers and the keys of the rows that are new since the last call, in order."""
        if self.header is None:
            return [], []

        def read() -> tuple[np.ndarray, list[bytes]]:
            query = self._table.search().select(["key"]).with_row_id(True)
            found = (query if self._seen < 0 else query.where(f"_rowid > {self._seen}")).limit(None).to_arrow()
            return different_numbers(found), keys_of(found)

        try:
            numbers, keys = self._newest(read)
        except (EmbeddingCacheError, OSError) as error:
            raise damaged(self, self.places()[0], error) from error
        order = np.argsort(numbers, kind="stable").tolist()
        if order:
            self._seen = int(numbers[order[-1]])
        return numbers[order].tolist(), [keys[place] for place in order]

    @calls_lance
    def rows(self, numbers: np.ndarray) -> Tensor:
        """Returns the rows ``[n, d]`` float32 of ascending numbers ``[n]``: about `rows_together` at once, at most."""
        try:
            found, _, rows = self._newest(partial(self._take, numbers))
        except (EmbeddingCacheError, OSError) as error:
            raise damaged(self, numbers, error) from error
        if len(found) < len(numbers):
            raise damaged(self, numbers, "they are missing, or have another checksum")
        return rows

    def rows_together(self) -> int:
        """How many rows should be read at once."""
        assert self.header is not None
        return max(1, _TAKE_BYTES // (4 * self.header.dim))

    @calls_lance
    def nearest(self, query: np.ndarray, k: int, probes: int) -> list[np.ndarray]:
        """Returns, for each query of ``[n, d]``, the numbers of about k rows that the index finds, ascending."""

        def one(vector: np.ndarray) -> np.ndarray:
            search = self._table.search(vector, vector_column_name="vector").distance_type("dot").nprobes(probes)
            return numbers_of(search.select(["crc", "_distance"]).with_row_id(True).limit(k).to_arrow())

        return [np.sort(self._newest(partial(one, vector))) for vector in query]

    @calls_lance
    def whole(self, numbers: np.ndarray) -> tuple[np.ndarray, list[bytes], Tensor]:
        """Returns the numbers, keys and rows of those that are there and whole. Raises where files fail."""
        return self._call(partial(self._take, numbers))

    @calls_lance
    def look_at(self, version: int | None) -> None:
        """Takes an older version of the table, to be read from only; None: the newest."""
        self._call(lambda: self._table.checkout_latest() if version is None else self._table.checkout(version))

    @calls_lance
    def places(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the numbers of all rows, and the number of each one's file, as the manifest lists them."""

        def read() -> tuple[np.ndarray, np.ndarray]:
            found = self._table.search().select(["_rowid", "_rowaddr"]).limit(None).to_arrow()
            return different_numbers(found), (found["_rowaddr"].to_numpy() >> np.uint64(32)).astype(np.int64)

        try:
            return self._call(read)
        except EmbeddingCacheError as error:
            raise self._manifest_error(error) from error

    def _newest(self, read: Callable[[], T]) -> T:
        """Reads, and again in the newest version if files of the one that is open are gone, since they were joined."""
        try:
            return self._call(read)
        except (EmbeddingCacheError, OSError):
            self._call(lambda: self._table.checkout_latest())
            return self._call(read)

    def _take(self, wanted: np.ndarray) -> tuple[np.ndarray, list[bytes], Tensor]:
        """Returns the numbers, keys and rows float32 of those of the rows that are there, and have their checksums."""
        assert self.header is not None
        found = self._table.take_row_ids(wanted.tolist()).select(COLUMNS).with_row_id().to_arrow()
        numbers, keys, (rows, whole) = numbers_of(found), keys_of(found), self.header.from_arrow(found, self._verify)
        order = np.argsort(numbers, kind="stable")
        order = order[whole[order]]
        if len(order) < len(numbers) or (order[1:] < order[:-1]).any():
            numbers, keys, rows = numbers[order], [keys[place] for place in order], rows[torch.from_numpy(order)]
        return numbers, keys, rows.float()
