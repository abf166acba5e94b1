"""`EmbeddingCache`: embeddings on disk, keyed by content, with a FAISS index beside them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmkernels.models.embeddings_files import DTYPES, LARGEST_INTEGER, EmbeddingCacheError, is_finite
from mmkernels.models.embeddings_index import RowIndex
from mmkernels.models.embeddings_keys import content_key, fingerprint, key_bytes
from mmkernels.models.embeddings_store import Encoded, Store
from mmkernels.nn.checks import check_positive, described
from mmkernels.ops.contrastive.retrieval_ranks import retrieval_ranks
from mmkernels.runtime.checks import check_range

__all__ = ["EmbeddingCache", "EmbeddingCacheError", "SearchResult", "content_key", "fingerprint"]

_MISSING: Any = object()
_BLOCK = 2**20  # elements that are converted together


class SearchResult(NamedTuple):
    """The result of `EmbeddingCache.search`, best first."""

    scores: Tensor
    """Inner products ``[n, k]`` float32."""
    rows: Tensor
    """Rows of the cache ``[n, k]`` int64."""
    keys: list[list[str]]
    """The keys of these rows, n lists of k."""


class EmbeddingCache:
    """Embeddings of one model on disk: encode once, search many times, append later.

    The key of a row is a hash of the content that was encoded (`content_key`): the same content is never encoded twice,
    whatever its name or order. The number of a row never changes. The folder holds safetensors shards, one or more for
    each call that appends; ``manifest.json``, which lists them with their checksums; and an ``index-*.faiss``, made at
    the first search. Each file is written under another name, synced and renamed, under a lock: a crash, a full disk or
    another process that appends at the same time never loses or damages existing rows. Reading takes no lock.

    Nothing is written before the first rows are added. Rows are mapped from the files, not read into memory. Keys take
    about 180 bytes of memory a row, and the index 4 d bytes after the first search. Append in batches: every call that
    appends makes a file. Use each object in one thread; any number of objects, in any processes, can share a folder.

    Args:
        folder: the folder of the cache; it is made with the first rows.
        model_id: the model that encodes: a name with a version, or `fingerprint(model)`. A cache belongs to one model.
        dtype: in which rows are stored: float32, float16 or bfloat16. None: that of the cache; float32 in a new one.
        normalize: whether rows and queries are scaled to length 1, so that inner products are cosines. None: that of
            the cache; True in a new one.
        verify: whether to read every file when it is opened (about 1 GB a second from memory), to compare checksums and
            to check for NaN. False: only names, sizes, shapes and dtypes are compared.
        lock_timeout: seconds to wait for another process that writes.

    Raises:
        EmbeddingCacheError: a file is missing, damaged or does not match the manifest; or the cache has another model,
            dtype or normalization.
        ImportError: safetensors is not installed.
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
        verify: bool = True,
        lock_timeout: float = 60.0,
    ) -> None:
        _check_arguments(folder, model_id, dtype, normalize, lock_timeout)
        self._store = Store(Path(folder), model_id, dtype, normalize, verify, lock_timeout)
        self._index = RowIndex(self._store)

    # Content.

    @property
    def folder(self) -> Path:
        return self._store.folder

    @property
    def model_id(self) -> str:
        return self._store.model_id

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
        return self._store.dim

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._store)

    def __contains__(self, key: str) -> bool:
        return key_bytes("key", key) in self._store.row_of

    def __repr__(self) -> str:
        shape = f"{len(self)} rows of {self.dim}" if len(self) else "empty"
        return f"EmbeddingCache({str(self.folder)!r}, {self.model_id!r}: {shape}, {self.dtype})"

    def rows_of(self, keys: Iterable[str]) -> Tensor:
        """Returns the rows ``[n]`` int64 of n keys. ValueError: a key is not in the cache."""
        rows = []
        for key in keys:
            rows.append(self._store.row_of.get(key_bytes("keys", key), -1))
            if rows[-1] < 0:
                raise ValueError(f"keys must be in the cache, got {key}, which is not")
        return torch.tensor(rows, dtype=torch.int64)

    def keys_of(self, rows: Tensor) -> list[str]:
        """Returns the keys of rows ``[n]`` int64."""
        return [key.hex() for key in self._store.keys_of(self._check_rows("rows", rows))]

    def read(self, rows: Tensor | None = None) -> Tensor:
        """Returns a copy of the embeddings as they are stored.

        Args:
            rows: ``[n]`` int64. None: all, in order.

        Returns:
            ``[n, d]`` in the cache's dtype; ``[0, 0]`` of a cache without rows.
        """
        if rows is not None:
            return self._store.read(self._check_rows("rows", rows))
        return torch.cat([torch.empty(0, self.dim or 0, dtype=self.dtype), *self._store.blocks()])

    def refresh(self) -> int:
        """Adds the rows that other processes have appended since this cache was opened (`encode` and `add` do so too).

        Returns:
            The number of new rows.

        Raises:
            EmbeddingCacheError: as on opening, or the folder is gone or holds another cache.
        """
        return self._store.refresh()

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

        Content that occurs twice is encoded once. Rows are stored while the work goes on; if an error or an interrupt
        ends it, all rows that were encoded before are kept. For a progress bar, give ``tqdm(items)``.

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
            TimeoutError: another process held the lock for too long.
            OSError: the disk is full, or the like. EmbeddingCacheError: as `refresh`.
        """
        check_positive("batch_size", batch_size)
        if isinstance(items, (str, bytes)):
            raise TypeError(f"items must be a list of items, got one {type(items).__name__}")
        wanted: list[bytes] = []
        batch: dict[bytes, Any] = {}  # not encoded yet
        encoded = Encoded()  # but not on disk yet
        try:
            for item, key in _keyed(items, keys):
                wanted.append(key)
                if key not in self._store.row_of and key not in encoded.keys:
                    batch.setdefault(key, item)
                if len(batch) == batch_size:
                    self._encode(encode_fn, batch, encoded)
            self._encode(encode_fn, batch, encoded)
        finally:
            encoded.append_to(self._store)
        return torch.tensor([self._store.row_of[key] for key in wanted], dtype=torch.int64)

    def add(self, keys: Iterable[str], embeddings: Tensor) -> Tensor:
        """Appends embeddings that were computed elsewhere. A key that is in the cache keeps its row.

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
            if key not in self._store.row_of:
                first.setdefault(key, place)
        entries = iter(first.items())
        while part := dict(itertools.islice(entries, self._store.rows_per_shard(rows.shape[1]))):
            self._store.append(list(part), rows[list(part.values())])
        return torch.tensor([self._store.row_of[key] for key in names], dtype=torch.int64)

    def _encode(self, encode_fn: Callable[[list[Any]], Tensor], batch: dict[bytes, Any], encoded: Encoded) -> None:
        """Encodes a batch, and writes the encoded rows if they fill a shard."""
        if not batch:
            return
        with torch.no_grad():
            result = encode_fn(list(batch.values()))
        rows = self._prepared("encode_fn's result", result, len(batch), self.dim or encoded.dim)
        encoded.keys.update(dict.fromkeys(batch))
        encoded.blocks.append(rows)
        batch.clear()
        if len(encoded.keys) >= self._store.rows_per_shard(rows.shape[1]):
            encoded.append_to(self._store)

    # Searching.

    def search(self, query: Tensor, k: int) -> SearchResult:
        """Returns the k rows with the largest inner products: exact, by FAISS's IndexFlatIP in float32.

        The index is loaded (or built) at the first search; rows appended since are added to it. It is saved when an
        eighth or more of its rows are new and no other process writes, see `update_index`. A damaged index is built
        again, with a warning.

        Args:
            query: floats ``[n, d]``; scaled to length 1 where the cache is normalized.
            k: how many; where the cache has fewer rows, all of them are returned.

        Returns:
            scores ``[n, min(k, rows)]`` float32, best first (of equal ones the lower row first; which of them come in
            as the last is FAISS's choice), their rows int64 and their keys. Tensors lie on the query's device.

        Raises:
            ImportError: faiss is not installed.
            EmbeddingCacheError: as `refresh`.
            ValueError: another d, NaN or inf in the query or in an inner product, k < 1, an empty cache.
        """
        check_positive("k", k)
        self._check_some()
        scores, rows = self._index.search(self._query(query), k)
        if not scores.isfinite().all() or (rows < 0).any():
            raise ValueError("query must be small enough for inner products in float32, got one that is inf or NaN")
        rows, order = rows.sort(dim=1)
        scores, order = scores.gather(1, order).sort(dim=1, descending=True, stable=True)
        rows = rows.gather(1, order)
        keys = iter(self.keys_of(rows.reshape(-1)))
        names = [list(itertools.islice(keys, rows.shape[1])) for _ in range(rows.shape[0])]
        return SearchResult(scores.to(query.device), rows.to(query.device), names)

    def ranks(self, query: Tensor, target: Tensor | Sequence[str], *, backend: str | None = None) -> Tensor:
        """Returns the rank of the target of each query among all rows, for recall@k: exact, and without faiss.

        Args:
            query: floats ``[n, d]``; scaled to length 1 where the cache is normalized.
            target: the correct result of each query: rows ``[n]`` int64, or n keys.
            backend: of `mmkernels.retrieval_ranks`, which computes it, in float32.

        Returns:
            ``[n]`` int64 on the query's device, 0: best; of equal scores the lower row comes first.
        """
        self._check_some()
        queries = self._query(query)
        rows = self._check_rows("target", target) if isinstance(target, Tensor) else self.rows_of(target)
        if len(rows) != len(queries):
            raise ValueError(f"target must be for {len(queries)} queries, got {len(rows)}")
        gallery = self._index.rows()  # if the index holds them in memory
        if gallery is None:
            gallery = torch.cat([torch.empty(0, queries.shape[1]), *self._store.blocks()])  # float32
        device = query.device
        with torch.autocast(device.type, enabled=False):  # float32, also under autocast
            return retrieval_ranks(queries.to(device), gallery.to(device), rows.to(device), backend=backend)

    def update_index(self) -> None:
        """Updates and saves the index, unless it is current: the next process that searches only has to load it.

        Raises:
            OSError: it can't be written. TimeoutError: another process held the lock for too long.
        """
        self._check_some()
        self._index.save()

    # Checks.

    def _query(self, query: Tensor) -> Tensor:
        """A query as the index takes it: ``[n, d]`` float32 on the CPU."""
        if not isinstance(query, Tensor) or not query.is_floating_point():
            raise TypeError(f"query must be a tensor of floats, got {described(query)}")
        if query.dim() != 2 or query.shape[1] != self.dim:
            raise ValueError(f"query must be [n, {self.dim}], got shape {tuple(query.shape)}")
        return _converted("query", query, torch.float32, self.normalize)

    def _prepared(self, name: str, rows: Tensor, count: int, dim: int | None) -> Tensor:
        """Rows as they are stored: ``[count, d]`` on the CPU."""
        if not isinstance(rows, Tensor) or not rows.is_floating_point():
            raise TypeError(f"{name} must be a tensor of floats, got {described(rows)}")
        if rows.dim() != 2 or len(rows) != count or not rows.shape[1] or (dim and rows.shape[1] != dim):
            raise ValueError(f"{name} must be [{count}, {dim or 'd'}], got shape {tuple(rows.shape)}")
        if rows.shape[1] > LARGEST_INTEGER:  # what a manifest may say
            raise ValueError(f"{name} must have a d of at most {LARGEST_INTEGER}, got shape {tuple(rows.shape)}")
        self._store.settle()
        return _converted(name, rows, self.dtype, self.normalize)

    def _check_rows(self, name: str, rows: Tensor) -> Tensor:
        if not isinstance(rows, Tensor) or rows.dtype != torch.int64:
            raise TypeError(f"{name} must be an int64 tensor, got {described(rows)}")
        if rows.dim() != 1:
            raise ValueError(f"{name} must be [n], got shape {tuple(rows.shape)}")
        rows = rows.cpu()
        check_range(name, rows, 0, len(self) - 1)
        return rows

    def _check_some(self) -> None:
        if not len(self):
            raise ValueError(f"the cache must hold rows to be searched, got an empty one, {self.folder}")


def _keyed(items: Iterable[Any], keys: Iterable[str] | None) -> Iterator[tuple[Any, bytes]]:
    if keys is None:
        for item in items:
            yield item, bytes.fromhex(content_key(item))
        return
    for item, key in itertools.zip_longest(items, keys, fillvalue=_MISSING):
        if item is _MISSING or key is _MISSING:
            raise ValueError(f"keys must be as many as items, got {'more' if item is _MISSING else 'fewer'}")
        yield item, key_bytes("keys", key)


def _converted(name: str, rows: Tensor, dtype: torch.dtype, normalize: bool) -> Tensor:
    """``[n, d]`` on the CPU, of length 1 if asked, finite, contiguous."""
    rows = rows.detach().cpu()
    out = torch.empty(rows.shape, dtype=dtype)
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
    if not is_finite(out):
        row = int((~out.isfinite()).any(dim=1).nonzero()[0])
        raise ValueError(f"{name} must be finite as {dtype}, got NaN or inf in row {row}")
    return out


def _check_arguments(folder: Any, model_id: Any, dtype: Any, normalize: Any, lock_timeout: Any) -> None:
    if not isinstance(folder, (str, Path)):
        raise TypeError(f"folder must be a str or a Path, got {type(folder).__name__}")
    if Path(folder).exists() and not Path(folder).is_dir():
        raise ValueError(f"folder must be a folder, got {folder}, which is a file")
    if not isinstance(model_id, str):
        raise TypeError(f"model_id must be a str, got {type(model_id).__name__}")
    if not model_id:
        raise ValueError("model_id must name the model, got an empty str")
    if dtype is not None and dtype not in DTYPES:
        raise TypeError(f"dtype must be one of {', '.join(str(known) for known in DTYPES)}, got {dtype}")
    if normalize is not None and not isinstance(normalize, bool):
        raise TypeError(f"normalize must be True, False or None, got {normalize!r}")
    if not isinstance(lock_timeout, (int, float)) or not lock_timeout >= 0:
        raise ValueError(f"lock_timeout must be seconds, 0 or more, got {lock_timeout!r}")
