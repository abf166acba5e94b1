"""`EmbeddingCache`: embeddings in a folder or a bucket, keyed by content, in a table of LanceDB."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmkernels.models.embeddings_arguments import check_encode, check_floats, check_settings, keyed, place_of
from mmkernels.models.embeddings_damage import EmbeddingCacheError, Repair, repair
from mmkernels.models.embeddings_forks import one_thread_if_forked
from mmkernels.models.embeddings_keys import content_key, fingerprint, key_bytes
from mmkernels.models.embeddings_memory import Memory
from mmkernels.models.embeddings_rows import Encoded, SearchResult, best, converted, floats, integers
from mmkernels.models.embeddings_store import INDEXES, Store
from mmkernels.nn.checks import check_positive
from mmkernels.ops.contrastive.retrieval_ranks import retrieval_ranks

__all__ = ["EmbeddingCache", "EmbeddingCacheError", "SearchResult", "content_key", "fingerprint"]


class EmbeddingCache:
    """Embeddings of one model in a store: encode once, search many times, append later.

    The key of a row is a hash of the content that was encoded (`content_key`): the same content is never encoded twice,
    whatever its name or order. Rows are numbered in the order in which they are stored, by all processes together. A
    number never changes and is not given twice; numbers are missing where two processes stored the same content at the
    same moment (the lower one counts), and where `repair` left out damaged rows.

    The rows are a LanceDB table (in a folder ``embeddings.lance``) with columns ``key``, ``vector`` (bfloat16: its bits
    as int16) and ``crc``, a checksum of the two, which is compared whenever a row is read. Any number of objects, in
    any processes, can share it: each append is one atomic commit, and takes no lock. Use each object in one thread. An
    object can be used after a fork, and pickled: what travels is the folder and the settings.

    Keys take about 180 bytes of memory a row. The first search reads all rows into memory, as float32 (4 d bytes a
    row), up to `memory_limit`; above, each search reads them from the store. Nothing is written before the first rows.

    Args:
        folder: a folder, which is made with the first rows, or a URI of an object store, as LanceDB takes it:
            ``s3://bucket/prefix``, ``gs://bucket/prefix``.
        model_id: the model that encodes: a name with a version, or `fingerprint(model)`. A cache belongs to one model.
        dtype: in which rows are stored: float32, float16 or bfloat16. None: that of the cache; float32 in a new one.
        normalize: whether rows and queries are scaled to length 1, so that inner products are cosines. None: that of
            the cache; True in a new one.
        storage_options: what the object store needs, as LanceDB takes it (endpoint, region, keys); a pickle holds it.
        memory_limit: bytes of rows that are kept in memory.
        verify: whether checksums are compared: 2 us for a row of 2 KB.
        lock_timeout: seconds for which an append is repeated while commits of other processes are in its way.

    Raises:
        EmbeddingCacheError: rows are missing or damaged (`repair` keeps all others); or the cache has another model,
            dtype, normalization or format.
        ImportError: lancedb is not installed.
        TypeError, ValueError: a wrong argument.

    Example:
        >>> import tempfile, torch
        >>> from mmkernels.models.embeddings import EmbeddingCache, content_key
        >>> folder = tempfile.TemporaryDirectory()
        >>> def encode(texts):  # a model's encode_text
        ...     print("encoding", texts)
        ...     return torch.tensor([[len(text), text.count("a"), text.count("b")] for text in texts]).float()
        >>> cache = EmbeddingCache(folder.name, "letters-v1")
        >>> cache.encode(["banana", "a cat", "banana"], encode)
        encoding ['banana', 'a cat']
        tensor([0, 1, 0])
        >>> cache = EmbeddingCache(folder.name, "letters-v1")  # another day
        >>> cache.encode(["a cat", "bob"], encode)  # only what is new; rows are numbered as they come
        encoding ['bob']
        tensor([1, 2])
        >>> scores, rows, keys = cache.search(torch.tensor([[3.0, 0.0, 2.0]]), k=2)
        >>> rows, keys[0][0] == content_key("bob")
        (tensor([[2, 0]]), True)
        >>> cache.read(rows[0]).shape
        torch.Size([2, 3])
        >>> folder.cleanup()
    """

    def __init__(
        self,
        folder: str | Path,
        model_id: str,
        *,
        dtype: torch.dtype | None = None,
        normalize: bool | None = None,
        storage_options: dict[str, str] | None = None,
        memory_limit: int = 4 * 2**30,
        verify: bool = True,
        lock_timeout: float = 60.0,
    ) -> None:
        self._place = place_of(folder)
        check_settings(model_id, dtype, normalize, storage_options, verify, lock_timeout)
        check_positive("memory_limit", memory_limit)
        self._settings: dict[str, Any] = {
            **{"folder": self._place, "model_id": model_id, "dtype": dtype, "normalize": normalize},
            **{"storage_options": storage_options, "memory_limit": memory_limit},
            **{"verify": verify, "lock_timeout": lock_timeout},
        }
        self._store = Store(self._place, model_id, dtype, normalize, storage_options, verify, lock_timeout)
        self._memory = Memory(self._store, memory_limit)
        self.refresh()

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(type(self), **self._settings), ()

    @property
    def folder(self) -> str | Path:
        """The folder, or the URI."""
        return self._place

    @property
    def model_id(self) -> str:
        return str(self._store.model_id)

    @property
    def dtype(self) -> torch.dtype:
        return self._store.dtype

    @property
    def normalize(self) -> bool:
        """Whether rows have length 1."""
        return self._store.normalized

    @property
    def dim(self) -> int | None:
        """d; None before the first rows."""
        return self._store.header.dim if self._store.header else None

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._memory)

    def __contains__(self, key: str) -> bool:
        return key_bytes("key", key) in self._memory.row_of

    def __repr__(self) -> str:
        shape = f"{len(self)} rows of {self.dim}" if len(self) else "empty"
        return f"EmbeddingCache({str(self.folder)!r}, {self.model_id!r}: {shape}, {self.dtype})"

    def rows_of(self, keys: Iterable[str]) -> Tensor:
        """Returns the rows ``[n]`` int64 of n keys. ValueError: a key is not in the cache."""
        rows = []
        for key in keys:
            rows.append(self._memory.row_of.get(key_bytes("keys", key), -1))
            if rows[-1] < 0:
                raise ValueError(f"keys must be in the cache, got {key}, which is not")
        return integers(rows)

    def keys_of(self, rows: Tensor | None = None) -> list[str]:
        """Returns the keys of rows ``[n]`` int64. None: all, in order."""
        if rows is None:
            return [key.hex() for key in self._memory.keys]
        return [self._memory.keys[place].hex() for place in self._memory.places("rows", rows).tolist()]

    def read(self, rows: Tensor | None = None) -> Tensor:
        """Returns a copy of the embeddings as they are stored, from memory where a search has read them.

        Args:
            rows: ``[n]`` int64. None: all, in order.

        Returns:
            ``[n, d]`` in the cache's dtype; ``[0, 0]`` of a cache without rows. EmbeddingCacheError: rows are damaged.
        """
        places = None if rows is None else self._memory.places("rows", rows)
        if not len(self):
            return floats(0, self.dim or 0).to(self.dtype)
        with one_thread_if_forked():
            return self._memory.read(places).to(self.dtype, copy=rows is None)

    def refresh(self) -> int:
        """Takes the rows that other processes have appended since this cache was opened (`encode` and `add` do so too).

        Returns:
            The number of new rows. EmbeddingCacheError: as on opening; the folder is gone or holds another cache.
        """
        if not self._store.refresh():
            return 0
        before = len(self)
        self._memory.take(*self._store.new())
        return len(self) - before

    # Appending.

    def encode(
        self,
        items: Iterable[Any],
        encode_fn: Callable[[list[Any]], Tensor],
        *,
        keys: Iterable[str] | None = None,
        batch_size: int = 64,
    ) -> Tensor:
        """Returns the rows of items. Items whose content is not in the cache are encoded and appended.

        Content that occurs twice is encoded once. Rows are stored while the work goes on, every 2,048 rows, 16 MB or
        five seconds: what a process that is killed loses is less than that and a batch. After an error or an interrupt
        in Python all rows that were encoded before are kept. For a progress bar, give ``tqdm(items)``.

        Args:
            items: anything that `content_key` takes, or that `keys` are given for; a generator too: no more than a
                batch of them is held. For large sets give `pathlib.Path`s and let `encode_fn` load them.
            encode_fn: takes a list of at most `batch_size` items, returns floats ``[len, d]`` on any device. It runs
                without gradients; whether the model is in eval mode is the caller's.
            keys: each item's key, as `content_key` returns it. None: `content_key` of each item.
            batch_size: items encoded together.

        Returns:
            The row of each item, ``[n]`` int64.

        Raises:
            TypeError, ValueError: as `content_key`; embeddings of another shape or d, NaN, inf (also as the cache's
                dtype), or of length 0 where they are normalized; as many keys as items are needed.
            TimeoutError: commits of other processes were in the way for longer than `lock_timeout`.
            OSError: the disk is full, or the like. EmbeddingCacheError: as `refresh`.
        """
        check_encode(items, encode_fn, batch_size)
        self.refresh()
        wanted: list[bytes] = []
        batch: dict[bytes, Any] = {}  # not encoded yet
        encoded = Encoded()  # but not stored yet
        try:
            for item, key in keyed(items, keys):
                wanted.append(key)
                if key not in self._memory.row_of and key not in encoded.keys:
                    batch.setdefault(key, item)
                if len(batch) == batch_size:
                    self._encode(encode_fn, batch, encoded)
            self._encode(encode_fn, batch, encoded)
        finally:
            self._append_encoded(encoded)
        return integers([self._memory.row_of[key] for key in wanted])

    def add(self, keys: Iterable[str], embeddings: Tensor) -> Tensor:
        """Appends embeddings that were computed elsewhere, in one commit. A key that is in the cache keeps its row.

        Args:
            keys: n keys, as `content_key` returns them. Of equal keys the first counts.
            embeddings: floats ``[n, d]``.

        Returns:
            The row of each key, ``[n]`` int64. Raises as `encode`.
        """
        names = [key_bytes("keys", key) for key in keys]
        rows = self._prepared("embeddings", embeddings, len(names), self.dim)
        first: dict[bytes, int] = {}
        for place, key in enumerate(names):
            if key not in self._memory.row_of:
                first.setdefault(key, place)
        if first:
            self._append(list(first), rows if len(first) == len(rows) else rows[list(first.values())])
        return integers([self._memory.row_of[key] for key in names])

    def _encode(self, encode_fn: Callable[[list[Any]], Tensor], batch: dict[bytes, Any], encoded: Encoded) -> None:
        """Encodes a batch, and stores the encoded rows if they are many or old enough."""
        if not batch:
            return
        with torch.no_grad():
            result = encode_fn(list(batch.values()))
        dim = self.dim or (encoded.blocks[0].shape[1] if encoded.blocks else None)
        encoded.add(batch, self._prepared("encode_fn's result", result, len(batch), dim))
        batch.clear()
        if encoded.are_due():
            self._append_encoded(encoded)

    def _append_encoded(self, encoded: Encoded) -> None:
        if not encoded.keys:
            return
        keys, rows = encoded.taken()
        try:
            self._append(keys, rows)
        except (KeyboardInterrupt, SystemExit):  # before, within or after a commit
            self._store.forget()
            self._memory = Memory(self._store, self._settings["memory_limit"])
            self._append(keys, rows)
            raise

    def _append(self, keys: list[bytes], rows: Tensor) -> None:
        """Stores rows of different keys, but for keys that another process has stored since the last refresh."""
        if self._store.may_have_changed():
            self.refresh()
        new = [place for place, key in enumerate(keys) if key not in self._memory.row_of]
        if not new:
            return
        if len(new) < len(keys):
            keys, rows = [keys[place] for place in new], rows[new]
        doubled = self._memory.take(*self._store.append(keys, rows))
        if doubled:  # another process stored some of them at the same moment; its rows count, as they came first
            self._store.delete(doubled)
        self._store.join_files()

    # Searching.

    def search(self, query: Tensor, k: int, *, approximate: bool = False, probes: int = 20) -> SearchResult:
        """Returns the k rows with the largest inner products, in float32: of all rows, unless `approximate`.

        Args:
            query: floats ``[n, d]``; scaled to length 1 where the cache is normalized.
            k: how many; where the cache has fewer rows, all of them are returned.
            approximate: whether to compare only the rows that the index of `create_index` leads to. Their scores are
                exact, but rows can be missed. Rows that were stored after the index was made are all compared.
            probes: how many of the index's partitions are searched: more miss less, and take longer.

        Returns:
            scores ``[n, min(k, rows)]`` float32, best first (of equal ones the lower row), their rows int64 and their
            keys. Tensors lie on the query's device. Where an approximate search finds fewer than k, the rest has score
            -inf, row -1 and key "".

        Raises:
            EmbeddingCacheError, ValueError: as `read`; another d, NaN or inf in the query or a product, k < 1, no rows.
        """
        check_positive("k", k)
        check_positive("probes", probes)
        if approximate:
            self._check_index()
        queries, k, memory = self._query(query), min(k, len(self)), self._memory
        with one_thread_if_forked(), torch.autocast("cpu", enabled=False):
            scores, places = memory.nearest(queries, k, probes) if approximate else best(queries, k, memory.blocks)
        if not (scores.isfinite() | (places < 0)).all():
            raise ValueError("query must be small enough for inner products in float32, got one that is inf or NaN")
        rows = torch.from_numpy(self._memory.numbers())[places.clamp(min=0)].where(places >= 0, -1)
        names = [[self._memory.keys[place].hex() if place >= 0 else "" for place in line] for line in places.tolist()]
        return SearchResult(scores.to(query.device), rows.to(query.device), names)

    def create_index(self, kind: str = "IvfFlat", **options: Any) -> None:
        """Makes or replaces the index in the store that a search with ``approximate=True`` uses, by LanceDB.

        Args:
            kind: a class of ``lancedb.index``: ``IvfFlat`` compares whole rows; ``IvfPq`` is smaller, and misses more.
            options: that class's, such as ``num_partitions``.

        Raises:
            TypeError: a bfloat16 cache: LanceDB can't compare its bits; an option that the class does not have.
            ValueError: an empty cache, another kind. EmbeddingCacheError: LanceDB can't make it.
        """
        self._check_index()
        if kind not in INDEXES:
            raise ValueError(f"kind must be one of {', '.join(INDEXES)}, got {kind!r}")
        self._store.create_index(kind, options)

    def ranks(self, query: Tensor, target: Tensor | Sequence[str], *, backend: str | None = None) -> Tensor:
        """Returns the rank of the target of each query among all rows, for recall@k: exact, in float32.

        Args:
            query: floats ``[n, d]``; scaled to length 1 where the cache is normalized.
            target: the correct result of each query: rows ``[n]`` int64, or n keys.
            backend: of `mmkernels.retrieval_ranks`, which computes it, with all rows in memory.

        Returns:
            ``[n]`` int64 on the query's device, 0: best; of equal scores the lower row comes first.
        """
        queries = self._query(query)
        places = self._memory.places("target", target if isinstance(target, Tensor) else self.rows_of(target))
        if len(places) != len(queries):
            raise ValueError(f"target must be for {len(queries)} queries, got {len(places)}")
        device = query.device
        with one_thread_if_forked(), torch.autocast(device.type, enabled=False):  # float32, also under autocast
            blocks = [block for _, block in self._memory.blocks()]
            gallery = blocks[0] if len(blocks) == 1 else torch.cat(blocks)
            return retrieval_ranks(queries.to(device), gallery.to(device), places.to(device), backend=backend)

    @staticmethod
    def repair(folder: str | Path, *, storage_options: dict[str, str] | None = None) -> Repair:
        """Makes a damaged cache usable: leaves out the rows that can't be read, and keeps all others.

        It reads the whole cache. If the newest manifest can't be used, the one before counts, and the rows of the last
        append are lost (in a bucket, go back to a version of the object instead). Rows that only an older manifest
        leads to get new numbers. Rows that are left out are encoded again by the next `encode` that meets their
        content. No other process may append meanwhile. The arguments are those of `EmbeddingCache`.

        Returns:
            What was left out. Open the cache again afterwards. EmbeddingCacheError: no row can be read; nothing was
            changed.
        """
        return repair(Store(place_of(folder), None, None, None, storage_options, True, 1.0))

    def _query(self, query: Tensor) -> Tensor:
        """A query ``[n, d]`` float32 on the CPU."""
        self._check_some()
        check_floats("query", query, None, self.dim)
        return converted("query", query, torch.float32, self.normalize)

    def _prepared(self, name: str, rows: Tensor, count: int, dim: int | None) -> Tensor:
        """Rows as they are stored: ``[count, d]`` on the CPU."""
        check_floats(name, rows, count, dim)
        self._store.settle()
        return converted(name, rows, self.dtype, self.normalize)

    def _check_some(self) -> None:
        if not len(self):
            raise ValueError(f"the cache must hold rows to be searched, got an empty one, {self.folder}")

    def _check_index(self) -> None:
        self._check_some()
        if self.dtype == torch.bfloat16:
            raise TypeError("an index must be of a float32 or float16 cache, got torch.bfloat16, stored as its bits")
