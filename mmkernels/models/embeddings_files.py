"""The files of an `EmbeddingCache`: each is written completely or not at all, and any damage is an error on reading."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmkernels.models.blocks.checkpoint import CheckpointError, read_json

MANIFEST, LOCK = "manifest.json", "lock"
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
"""What rows may be stored as, and what safetensors calls it."""
KEY_BYTES = 32
LARGEST_INTEGER = 2**24
"""In a manifest that is read."""

_FORMAT = 1
_SHARD = re.compile(r"shard-([0-9]{5,9})\.safetensors")  # the whole name, so no path leads out of the folder
_INDEX = re.compile(r"index-[0-9]{5,}\.faiss")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_POLL = 0.02  # seconds between two tries to take the lock


class EmbeddingCacheError(ValueError):
    """A file of a cache does not hold what it must; the message names it, what was expected and what was found."""


class _Section:
    """A JSON object in a manifest, read key by key; each error names the file and the key.

    Args:
        values: the object.
        where: the file, and the path to the object in it.
    """

    def __init__(self, values: dict[str, Any], where: str) -> None:
        self.values, self.where = values, where

    def integer(self, key: str, default: int, least: int = 1) -> int:
        value = self.values.get(key, default)
        if type(value) is not int or not least <= value <= LARGEST_INTEGER:
            raise self.error(key, f"an integer from {least} to {LARGEST_INTEGER}")
        return value

    def choice(self, key: str, choices: Iterable[str]) -> str:
        value = self.values.get(key, "")
        if value not in list(choices):
            raise self.error(key, f"one of {', '.join(choices)}")
        return value

    def error(self, key: str, expected: str) -> CheckpointError:
        got = repr(self.values[key]) if key in self.values else "nothing"
        return CheckpointError(f"{self.where}: {key} must be {expected}, got {got[:200]}")


@dataclass(frozen=True)
class Shard:
    """A safetensors file of ``embeddings [rows, d]`` and ``keys [rows, 32]``, never changed once it is listed."""

    file: str
    rows: int
    sha256: str


@dataclass(frozen=True)
class SavedIndex:
    """The file of an index of the first `rows` rows; what is in it never changes, as rows don't."""

    rows: int
    sha256: str

    @property
    def file(self) -> str:
        return index_file(self.rows)


@dataclass(frozen=True)
class Manifest:
    """What a cache holds; a shard counts from when it is listed here."""

    model_id: str
    dim: int
    dtype: torch.dtype
    normalized: bool
    shards: tuple[Shard, ...] = ()
    index: SavedIndex | None = None

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.shards)


def index_file(rows: int) -> str:
    """The name of an index of so many rows."""
    return f"index-{rows:05}.faiss"


def remove_other_indexes(folder: Path, kept: str) -> None:
    """Delete the indexes that the one in file `kept` replaces, and those that no manifest came to name.

    The caller holds the lock. A process that reads one of them finds that the manifest names another by now.
    """
    for path in folder.iterdir():
        if _INDEX.fullmatch(path.name) and path.name != kept:
            with contextlib.suppress(OSError):
                path.unlink()


def read_manifest(folder: Path) -> Manifest | None:
    """The folder's manifest; None where there is no cache yet.

    Raises:
        EmbeddingCacheError: it is no manifest, or is gone while shards are there.
    """
    path = folder / MANIFEST
    if not path.exists():
        stray = next(folder.glob("shard-*.safetensors"), None)
        if stray is not None:
            raise EmbeddingCacheError(f"{path}: must stand beside {stray.name}, got no such file")
        return None
    if not path.is_file():
        raise EmbeddingCacheError(f"{path}: must be a file, got something else")
    try:
        section = _Section(read_json(path), str(path))
        section.choice("dtype", [_name(dtype) for dtype in DTYPES])
        if section.integer("format", -1, 0) != _FORMAT:
            raise section.error("format", f"{_FORMAT}, which this version of mmkernels reads")
        if type(section.values.get("normalized")) is not bool:
            raise section.error("normalized", "true or false")
        shards = _shards(section)
        return Manifest(
            model_id=_text(section, "model_id"),
            dim=section.integer("dim", -1),
            dtype=getattr(torch, section.values["dtype"]),
            normalized=section.values["normalized"],
            shards=shards,
            index=_saved_index(section, sum(shard.rows for shard in shards)),
        )
    except CheckpointError as error:
        raise EmbeddingCacheError(str(error)) from error


def write_manifest(folder: Path, manifest: Manifest) -> None:
    values = {
        "format": _FORMAT,
        "model_id": manifest.model_id,
        "dim": manifest.dim,
        "dtype": _name(manifest.dtype),
        "normalized": manifest.normalized,
        "shards": [vars(shard) for shard in manifest.shards],
        "index": None if manifest.index is None else vars(manifest.index),
    }
    data = json.dumps(values, indent=1).encode()
    replace_file(folder / MANIFEST, lambda path: path.write_bytes(data))


def write_shard(folder: Path, number: int, keys: Tensor, rows: Tensor) -> Shard:
    """Write keys ``[n, 32]`` uint8 and rows ``[n, d]`` as a new shard; it counts once a manifest lists it.

    Args:
        number: of the shard, if no file has it: one that no manifest lists (a crash came between) is left alone.
    """
    _safetensors()
    from safetensors.torch import save

    while (folder / (name := f"shard-{number:05}.safetensors")).exists():
        number += 1
    data = save({"embeddings": rows.contiguous(), "keys": keys})
    replace_file(folder / name, lambda path: path.write_bytes(data))
    return Shard(name, len(rows), hashlib.sha256(data).hexdigest())


def open_shard(folder: Path, shard: Shard, manifest: Manifest, verify: bool) -> tuple[Tensor, Tensor]:
    """Keys ``[rows, 32]`` uint8 and embeddings ``[rows, d]`` of a shard, both mapped from the file: not to be written.

    Args:
        verify: also read the whole file once: its checksum, and that every row is finite.
    """
    path = folder / shard.file
    if not path.is_file():
        raise EmbeddingCacheError(f"{path}: must be there by {MANIFEST}, got no such file")
    SafetensorError, safe_open = _safetensors()
    try:
        file = safe_open(path, framework="pt")
        expected = {
            "embeddings": ([shard.rows, manifest.dim], DTYPES[manifest.dtype]),
            "keys": ([shard.rows, KEY_BYTES], "U8"),
        }
        names = list(file.keys())
        found = {name: (file.get_slice(name).get_shape(), file.get_slice(name).get_dtype()) for name in names}
        if found != expected:
            raise EmbeddingCacheError(f"{path}: must hold {expected} by {MANIFEST}, got {found}")
        keys, embeddings = file.get_tensor("keys"), file.get_tensor("embeddings")
    except (SafetensorError, OSError) as error:
        raise EmbeddingCacheError(f"{path}: must be a whole safetensors file, got an error: {error}") from error
    if verify:
        checksum = sha256_of(path)
        if checksum != shard.sha256:
            raise EmbeddingCacheError(f"{path}: must have SHA-256 {shard.sha256} by {MANIFEST}, got {checksum}")
        if not is_finite(embeddings):
            raise EmbeddingCacheError(f"{path}: embeddings must be finite, got NaN or inf")
    return keys, embeddings


def is_finite(x: Tensor) -> bool:
    """Whether there is no NaN and no inf; both reach the extremes, which one pass finds without a tensor of flags."""
    return x.numel() == 0 or all(bool(extreme.isfinite()) for extreme in x.aminmax())


def sha256_of(path: Path, start: bytes = b"") -> str:
    """Of `start` and then the file."""
    digest = hashlib.sha256(start)
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def replace_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Put what `write` writes at `path`, on the disk when this returns; where it fails, what was there stays.

    The caller holds the lock.

    Args:
        write: writes a file at the path that it is given.

    Raises:
        OSError: the disk is full, or the like.
    """
    partial = path.with_name(".partial")  # one name: what a crash leaves is overwritten, and never read
    try:
        write(partial)
        _sync(partial)
        os.replace(partial, path)
        _sync(path.parent)  # the new name
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise OSError(error.errno, f"{path} could not be written: {error.strerror or error}") from error


@contextlib.contextmanager
def locked(folder: Path, timeout: float) -> Iterator[None]:
    """Hold the folder's lock, which other processes and threads wait for. It ends with the process, however that ends.

    Raises:
        TimeoutError: another held it for `timeout` seconds.
        OSError: the platform has no such locks.
    """
    path = folder / LOCK
    try:
        import fcntl
    except ImportError as error:
        raise OSError(f"{path} must be locked by flock, to write beside it, got a platform without fcntl") from error
    with path.open("ab") as file:
        deadline = time.monotonic() + timeout
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise TimeoutError(
                        f"{path} must be free within lock_timeout = {timeout} s, got a lock that another process holds"
                    ) from None
            time.sleep(_POLL)
        yield


def _safetensors() -> tuple[Any, Any]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError('an EmbeddingCache needs safetensors: pip install "mmkernels[retrieval]"') from error
    return SafetensorError, safe_open


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shards(section: _Section) -> tuple[Shard, ...]:
    values = section.values.get("shards")
    if not isinstance(values, list):
        raise section.error("shards", "a list of objects")
    found: dict[str, Shard] = {}
    for number, value in enumerate(values):
        entry = _Section(value if isinstance(value, dict) else {}, f"{section.where}, shards[{number}]")
        file = _text(entry, "file", _SHARD, "the name of a shard beside it, shard-NNNNN.safetensors")
        if file in found:
            raise entry.error("file", "another shard than those before")
        sha256 = _text(entry, "sha256", _SHA256, "64 hexadecimal digits")
        found[file] = Shard(file, entry.integer("rows", -1), sha256)
    return tuple(found.values())


def _saved_index(section: _Section, rows: int) -> SavedIndex | None:
    value = section.values.get("index")
    if value is None:
        return None
    if not isinstance(value, dict):
        raise section.error("index", "null or an object")
    entry = _Section(value, f"{section.where}, index")
    covered = value.get("rows")
    if type(covered) is not int or not 0 < covered <= rows:
        raise entry.error("rows", f"an integer from 1 to {rows}, the rows of its shards")
    return SavedIndex(covered, _text(entry, "sha256", _SHA256, "64 hexadecimal digits"))


def _text(section: _Section, key: str, pattern: re.Pattern[str] | None = None, must: str = "a text") -> str:
    value = section.values.get(key)
    if not isinstance(value, str) or not value or (pattern and not pattern.fullmatch(value)):
        raise section.error(key, must)
    return value
