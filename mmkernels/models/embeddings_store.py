"""The rows of an `EmbeddingCache`: a table of LanceDB, in a folder or a bucket.

LanceDB keeps rows in data files and, for each commit, a manifest that lists them; a commit is one atomic step. What it
leaves to its users is here: checksums, as it reads damaged bytes as they are; syncing, which it does not do; joining
small files; and, in files of their own, forks and a way back after damage.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import re
import shutil
import time
import uuid
import warnings
from collections.abc import Callable, Iterable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from mmkernels.models.embeddings_damage import HINT, EmbeddingCacheError, damaged
from mmkernels.models.embeddings_forks import calls_lance
from mmkernels.models.embeddings_format import FORMAT, HEADER, KEY_BYTES, Header, checksums, keys_of, numbers_of

T = TypeVar("T")
INDEXES = ("IvfFlat", "IvfSq", "IvfPq", "IvfRq", "HnswFlat", "HnswSq", "HnswPq")

_TABLE = "embeddings"
_CHOSEN = "chosen"  # in a bucket: the table that holds the name of the other
_COLUMNS = ["key", "vector", "crc"]
_TAKE_BYTES = 32 * 2**20  # of rows that are read together
_FILES, _MOST_FILES = 64, 512  # data files that are joined, see `join_files`
_APPENDS = 8  # after so many commits, of all processes, it is looked at
_KEPT = timedelta(seconds=10)  # for which files that were joined are left to readers in other processes
_NEW_TABLE = {"new_table_enable_stable_row_ids": "true"}  # rows keep their numbers when files are joined
_SOURCE_LINE = re.compile(r", /\S+\.rs:\d+:\d+")  # of LanceDB, which its errors name
_WRITE_ERRORS = re.compile(r"\(os error (\d+)\)")
_OVERTAKEN = re.compile(r"conflict|incompatible transaction|not found|already exists", re.IGNORECASE)  # in errors


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
        _lancedb()
        self.place, self.model_id, self._options = place, model_id, storage_options or {}
        self._dtype, self._normalized, self._verify, self._timeout = dtype, normalized, verify, lock_timeout
        self.header: Header | None = None
        self._table: Any = None
        self._version = self._files_to_join = 0
        self._seen = -1  # the largest number that `new` has returned
        self._next: int | None = 0  # the number of the next row, where it is known
        self._time = 0  # of the folder's last change, in ns, when this object last committed
        self._synced = set(os.listdir(self.folder / "data")) if self.folder and self.folder.is_dir() else set[str]()
        if isinstance(place, Path) and (place / "manifest.json").exists():
            raise EmbeddingCacheError(
                f"{place}: must be a cache of format {FORMAT}, got one of format 1 (manifest.json and shards), which "
                "this version of mmkernels does not read: delete the folder or name another one, and encode again"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_table"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        vars(self).setdefault("_table", None)

    @property
    def folder(self) -> Path | None:
        """The folder of the table's files; None in an object store."""
        return self.place / f"{_TABLE}.lance" if isinstance(self.place, Path) else None

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
            if self._table is None and self.header is not None:  # after a pickle
                self._open()
            return what()
        except BaseException as error:  # LanceDB's panics are no Exceptions
            if isinstance(error, (EmbeddingCacheError, KeyboardInterrupt, SystemExit)):
                raise
            text = _SOURCE_LINE.sub("", str(error))
            if number := _WRITE_ERRORS.search(text):
                raise OSError(int(number[1]), f"{self.place}: {text}") from error
            raise EmbeddingCacheError(f"{self.place}: {text or type(error).__name__}") from error

    def close(self) -> None:
        """Forgets the table, so that `refresh` opens it anew."""
        self._table, self.header, self._version = None, None, 0

    def _connect(self) -> Any:
        return _lancedb().connect(str(self.place), storage_options=self._options or None)

    def _open(self) -> None:
        self._table = None
        if isinstance(self.place, Path) and not self.place.is_dir():
            return
        hint = self._hinted()  # before the table is opened, as another process may commit meanwhile
        try:
            self._table = self._connect().open_table(_TABLE if self.folder else self._chosen())
        except ValueError as error:
            if "not found" not in str(error):
                raise
        if hint > (self._table.version if self._table else 0):
            self._table = None
            raise EmbeddingCacheError(f"the manifest of version {hint} is gone")

    def _chosen(self) -> str:
        """Returns the name of the table in a bucket."""
        table = self._connect().open_table(_CHOSEN)
        table.checkout(1)
        return str(table.to_arrow()["table"][0])

    def _hinted(self) -> int:
        """Returns the version of a folder's newest manifest, as LanceDB notes it beside them; 0 without a note."""
        try:
            assert self.folder is not None
            return int(json.loads((self.folder / "_versions" / HINT).read_bytes())["version"])
        except (AssertionError, OSError, ValueError, KeyError, TypeError):
            return 0

    @calls_lance
    def refresh(self) -> bool:
        """Takes the newest version of the table. Returns whether it is another one than before."""
        if self.header and isinstance(self.place, Path) and not self.place.is_dir():
            raise EmbeddingCacheError(f"{self.place}: must be the folder of this cache, got none: it is gone")
        try:
            self._call(self._open if self._table is None else lambda: self._table.checkout_latest())
            if self._table is None:
                return False
            version = self._call(lambda: self._table.version)
            if version == self._version:
                return False
            metadata = self._call(lambda: self._table.schema.metadata) or {}
            header = Header.from_json(metadata[HEADER])
        except (EmbeddingCacheError, KeyError, TypeError, ValueError) as error:
            reason = str(error).removeprefix(f"{self.place}: ")
            raise EmbeddingCacheError(
                f"{self.place}: can't be opened: {reason}. If its newest manifest is damaged, "
                "EmbeddingCache.repair(folder) goes back to the one before"
            ) from error
        for name, given, stored in (
            ("model_id", self.model_id, header.model_id),
            ("dtype", self._dtype, header.dtype),
            ("normalize", self._normalized, header.normalized),
        ):
            if given not in (None, stored):
                raise EmbeddingCacheError(f"{self.place}: {name} must be {stored!r}, as in this cache, got {given!r}")
        if self.header not in (None, header):
            raise EmbeddingCacheError(f"{self.place}: must be the cache that was opened, got another; open it again")
        self.header, self._version, self._next = header, version, None
        return True

    def may_have_changed(self) -> bool:
        """Whether to `refresh` before an append.

        False where the folder's time is that of this object's last commit. A commit of another process in the same tick
        of its clock is missed, and found by the append.
        """
        try:
            return self.folder is None or os.stat(self.folder / "_versions").st_mtime_ns != self._time
        except OSError:
            return True

    # Writing.

    @calls_lance
    def append(self, keys: list[bytes], rows: Tensor) -> tuple[list[int], list[bytes]]:
        """Commits rows ``[n, d]`` with their keys, ``[n]`` of 32 bytes; they are on the disk when this returns.

        Returns:
            As `new`, these rows among them.

        Raises:
            TimeoutError: commits of other processes were in the way for too long.
            OSError: the disk is full, or the like.
        """

        def commit() -> int:
            if self.header is not None and self.header.dim != rows.shape[1]:
                raise ValueError(
                    f"embeddings must be [n, {self.header.dim}], as in this cache, got {tuple(rows.shape)}"
                )
            data = self._to_arrow(keys, rows)
            return self._create(data) if self.header is None else self._add(data)

        version = self._commit(commit)
        if self.folder is not None:
            files = set(os.listdir(self.folder / "data"))
            _sync(self.folder / "data", files - self._synced)
            _sync(self.folder / "_versions", [f"{2**64 - 1 - version}.manifest"])
            self._synced = files
            self._time = os.stat(self.folder / "_versions").st_mtime_ns
        first, self._next = self._next if version == self._version + 1 else None, None
        if first is not None:  # no other process has committed meanwhile, so there is nothing to read
            self._version, self._next, self._seen = version, first + len(keys), first + len(keys) - 1
            return list(range(first, self._next)), keys
        self.refresh()
        found = self.new()
        if version == self._version:  # these rows are the last
            self._next = self._seen + 1
        return found

    def _commit(self, what: Callable[[], T]) -> T:
        """Returns what a function returns that commits; repeats it where a commit of another process was in its way."""
        end = time.monotonic() + self._timeout
        while True:
            try:
                return self._call(what)
            except EmbeddingCacheError as error:
                if not _OVERTAKEN.search(str(error)):
                    raise
                if time.monotonic() > end:
                    raise TimeoutError(
                        f"{self.place}: no commit in lock_timeout = {self._timeout} s: {error}"
                    ) from error
            time.sleep(random.uniform(0, 0.05))
            self.refresh()  # raises if the folder is gone, or another model's cache is in it by now

    def _create(self, data: Any) -> int:
        """Makes the table with its first rows, unless another process has made one meanwhile.

        LanceDB can't be asked to: a table that has come to be during `create_table` is replaced, in a second version.
        So in a folder the table is made elsewhere and renamed, which fails if there is one. In a bucket each process
        makes a table of its own, and the first version of another table says which of them counts.
        """
        options, name = {**self._options, **_NEW_TABLE}, f"{_TABLE}-{uuid.uuid4().hex}"
        if isinstance(self.place, Path):
            assert self.folder is not None
            hidden = self.place / f".{name}"
            try:
                _lancedb().connect(str(hidden)).create_table(_TABLE, data, storage_options=options)
                for part in ("data", "_versions"):
                    _sync(hidden / self.folder.name / part, os.listdir(hidden / self.folder.name / part))
                (hidden / self.folder.name).rename(self.folder)
            except OSError as error:
                if self.folder.exists():
                    raise EmbeddingCacheError("the table already exists") from error
                raise
            finally:
                shutil.rmtree(hidden, ignore_errors=True)
            self._open()
        else:
            bucket = self._connect()
            made = bucket.create_table(name, data, storage_options=options)
            try:
                bucket.create_table(_CHOSEN, [{"table": name}])
            except (RuntimeError, ValueError) as error:
                if not _OVERTAKEN.search(str(error)):
                    raise
            if self._chosen() != name:
                bucket.drop_table(name)
                raise EmbeddingCacheError("the table already exists")
            self._table = made
        self.header = Header.from_json(data.schema.metadata[HEADER])
        return int(self._table.version)

    def _add(self, data: Any) -> int:
        return int(self._table.add(data).version)

    def _delete(self, where: str) -> None:
        self._table.delete(where)

    @calls_lance
    def delete(self, numbers: list[int]) -> None:
        """Deletes rows; their numbers are not given again."""
        for start in range(0, len(numbers), 2**14):
            listed = ",".join(map(str, numbers[start : start + 2**14]))
            self._commit(partial(self._delete, f"_rowid in ({listed})"))

    @calls_lance
    def join_files(self) -> None:
        """Joins the small data files that many appends leave, so that neither reading nor appending slows down.

        LanceDB copies all files of less than a million rows for it. So the larger they are, the more files are waited
        for.
        """
        if self._version % _APPENDS:
            return
        stats = self._call(lambda: self._table.stats())
        small = stats["fragment_stats"]["num_small_fragments"]
        if small < self._files_to_join + min(max(_FILES, stats["total_bytes"] // 2**20), _MOST_FILES):
            return
        try:
            self._call(lambda: self._table.optimize(cleanup_older_than=_KEPT))
            self._files_to_join = 0
        except (EmbeddingCacheError, OSError):  # another process joins them, a file is damaged, the disk is full
            self._files_to_join = small

    @calls_lance
    def create_index(self, kind: str, options: dict[str, Any]) -> None:
        config = getattr(importlib.import_module("lancedb.index"), kind)(distance_type="dot", **options)
        self._call(lambda: self._table.create_index("vector", config=config))

    def _to_arrow(self, keys: list[bytes], rows: Tensor) -> Any:
        pa = importlib.import_module("pyarrow")
        header = self.header or Header(str(self.model_id), self.dtype, self.normalized, rows.shape[1], uuid.uuid4().hex)
        stored = (rows.view(torch.int16) if rows.dtype == torch.bfloat16 else rows).numpy()  # Arrow has no bfloat16
        columns = {
            "key": pa.FixedSizeBinaryArray.from_buffers(
                pa.binary(KEY_BYTES), len(keys), [None, pa.py_buffer(b"".join(keys))]
            ),
            "vector": pa.FixedSizeListArray.from_arrays(pa.array(stored.reshape(-1)), rows.shape[1]),
            "crc": pa.array(checksums(b"".join(keys), stored)),
        }
        fields = [pa.field(name, column.type, nullable=False) for name, column in columns.items()]
        return pa.table(list(columns.values()), pa.schema(fields, metadata={HEADER: header.to_json().encode()}))

    # Reading.

    @calls_lance
    def new(self) -> tuple[list[int], list[bytes]]:
        """Returns the numbers and the keys of the rows that are new since the last call, in order."""
        if self.header is None:
            return [], []

        def read() -> Any:
            query = self._table.search().select(["key"]).with_row_id(True)
            return (query if self._seen < 0 else query.where(f"_rowid > {self._seen}")).limit(None).to_arrow()

        try:
            found = self._newest(read)
        except (EmbeddingCacheError, OSError) as error:
            raise damaged(self, self.places()[0], error) from error
        numbers, keys = numbers_of(found), keys_of(found)
        if not len(numbers):
            return [], []
        order = np.argsort(numbers, kind="stable")
        self._seen = int(numbers[order[-1]])
        return numbers[order].tolist(), [keys[KEY_BYTES * n : KEY_BYTES * (n + 1)] for n in order.tolist()]

    @calls_lance
    def rows(self, numbers: np.ndarray) -> Tensor:
        """Returns the rows ``[n, d]`` float32 of ascending numbers ``[n]``: about `rows_together` at once, at most."""
        try:
            found, rows = self._newest(partial(self._take, numbers))
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
    def whole(self, numbers: np.ndarray) -> np.ndarray:
        """Returns the numbers of those of the rows that are there and have their checksums. Raises where files fail."""
        return self._call(partial(self._take, numbers))[0]

    @calls_lance
    def places(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the numbers of all rows, and the number of each one's file, as the manifest lists them."""
        found = self._call(lambda: self._table.search().select(["_rowid", "_rowaddr"]).limit(None).to_arrow())
        return numbers_of(found), (found["_rowaddr"].to_numpy() >> np.uint64(32)).astype(np.int64)

    def _newest(self, read: Callable[[], T]) -> T:
        """Reads, and again in the newest version if files of the one that is open are gone, since they were joined."""
        try:
            return self._call(read)
        except (EmbeddingCacheError, OSError):
            self._call(lambda: self._table.checkout_latest())
            return self._call(read)

    def _take(self, wanted: np.ndarray) -> tuple[np.ndarray, Tensor]:
        """Returns the numbers and rows float32 of those of the rows that are there, and have their checksums."""
        assert self.header is not None
        found = self._table.take_row_ids(wanted.tolist()).select(_COLUMNS).with_row_id().to_arrow()
        numbers, keys, crc = numbers_of(found), keys_of(found), found["crc"].to_numpy()
        stored = found["vector"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        stored = np.require(stored, requirements="W").reshape(len(numbers), self.header.dim)
        whole = np.ones(len(numbers), bool)
        if self._verify:
            whole = crc == checksums(keys, stored)
        rows = torch.from_numpy(stored)
        if self.header.dtype == torch.bfloat16:
            rows = rows.view(torch.bfloat16)
        order = np.argsort(numbers, kind="stable")
        order = order[whole[order]]
        if len(order) < len(numbers) or (order[1:] < order[:-1]).any():
            numbers, rows = numbers[order], rows[torch.from_numpy(order)]
        return numbers, rows.float()


def _lancedb() -> Any:
    """The module, which takes a while to import and is optional."""
    try:
        module = importlib.import_module("lancedb")
    except ImportError as error:
        raise ImportError('EmbeddingCache needs lancedb: pip install "mmkernels[retrieval]"') from error
    # What it says at a fork, "a small chance of deadlock remains", holds for calls in the child; none are made there.
    warnings.filterwarnings("ignore", "lancedb fork support is experimental", RuntimeWarning)
    return module


def _sync(folder: Path, names: Iterable[str]) -> None:
    """Writes files and their folder through to the disk, which LanceDB leaves to the system."""
    for name in (*names, "."):
        try:
            descriptor = os.open(folder / name, os.O_RDONLY)
        except FileNotFoundError:  # joined with others meanwhile
            continue
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
