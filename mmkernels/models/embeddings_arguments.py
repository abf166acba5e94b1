"""The arguments of an `EmbeddingCache`."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmkernels.models.embeddings_format import DTYPES
from mmkernels.models.embeddings_keys import content_key, key_bytes
from mmkernels.nn.checks import check_positive, described

_MISSING: Any = object()
_OBJECT_STORE = re.compile(r"(?!file|memory|shared-memory)[a-z][a-z0-9+-]*://[^/]", re.IGNORECASE)


def keyed(items: Iterable[Any], keys: Iterable[str] | None) -> Iterator[tuple[Any, bytes]]:
    if keys is None:
        for item in items:
            yield item, bytes.fromhex(content_key(item))
        return
    for item, key in itertools.zip_longest(items, keys, fillvalue=_MISSING):
        if item is _MISSING or key is _MISSING:
            raise ValueError(f"keys must be as many as items, got {'more' if item is _MISSING else 'fewer'}")
        yield item, key_bytes("keys", key)


def place_of(folder: Any) -> str | Path:
    """The absolute path of a folder, or the URI of an object store."""
    if not isinstance(folder, (str, Path)):
        raise TypeError(f"folder must be a str or a Path, got {type(folder).__name__}")
    if folder == "":
        raise ValueError("folder must name a folder, got an empty str")
    if isinstance(folder, str) and "://" in folder:
        if not _OBJECT_STORE.match(folder):
            raise ValueError(f"folder must be a path or the URI of an object store, got {folder}")
        return folder.rstrip("/")
    place = Path(os.path.expanduser(folder)).absolute()
    if place.exists() and not place.is_dir():
        raise ValueError(f"folder must be a folder, got {folder}, which is a file")
    return place


def check_encode(items: Any, encode_fn: Any, batch_size: Any) -> None:
    check_positive("batch_size", batch_size)
    if isinstance(items, (str, bytes, bytearray, Path)) or items is None:
        raise TypeError(f"items must be a list of items, got one {type(items).__name__}")
    if not callable(encode_fn):
        raise TypeError(f"encode_fn must be a function, got {type(encode_fn).__name__}")


def check_floats(name: str, x: Any, count: int | None, dim: int | None) -> None:
    """Floats ``[count, dim]``. None: any number."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"{name} must be a tensor of floats, got {described(x)}")
    if x.dim() != 2 or not x.shape[1] or count not in (None, len(x)) or dim not in (None, x.shape[1]):
        wanted = f"[{'n' if count is None else count}, {dim or 'd'}]"
        raise ValueError(f"{name} must be {wanted}, got shape {tuple(x.shape)}")


def check_rows(name: str, rows: Any) -> None:
    if not isinstance(rows, Tensor) or rows.dtype != torch.int64:
        raise TypeError(f"{name} must be an int64 tensor, got {described(rows)}")
    if rows.dim() != 1:
        raise ValueError(f"{name} must be [n], got shape {tuple(rows.shape)}")


def check_settings(
    model_id: Any, dtype: Any, normalize: Any, storage_options: Any, verify: Any, lock_timeout: Any
) -> None:
    if not isinstance(model_id, str):
        raise TypeError(f"model_id must be a str, got {type(model_id).__name__}")
    if not model_id:
        raise ValueError("model_id must name the model, got an empty str")
    if dtype is not None and dtype not in DTYPES.values():
        raise TypeError(f"dtype must be one of {', '.join(str(known) for known in DTYPES.values())}, got {dtype}")
    if normalize is not None and not isinstance(normalize, bool):
        raise TypeError(f"normalize must be True, False or None, got {normalize!r}")
    if storage_options is not None and not isinstance(storage_options, dict):
        raise TypeError(f"storage_options must be a dict, got {type(storage_options).__name__}")
    for name, value in (storage_options or {}).items():  # no value is shown: some are secret
        if not isinstance(name, str) or not isinstance(value, str):
            raise TypeError(f"storage_options must hold texts, got {type(value).__name__} for {name!r}")
    if not isinstance(verify, bool):
        raise TypeError(f"verify must be True or False, got {verify!r}")
    if not isinstance(lock_timeout, (int, float)) or not lock_timeout >= 0:
        raise ValueError(f"lock_timeout must be seconds, 0 or more, got {lock_timeout!r}")
