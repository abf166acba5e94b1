"""The arguments of an `EmbeddingCache`."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mmkernels.models.embeddings_format import DTYPES
from mmkernels.models.embeddings_keys import content_key, key_bytes

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
    options = storage_options or {}
    if not isinstance(options, dict) or not all(isinstance(part, str) for pair in options.items() for part in pair):
        raise TypeError(f"storage_options must be a dict of texts, got {storage_options!r}")
    if not isinstance(verify, bool):
        raise TypeError(f"verify must be True or False, got {verify!r}")
    if not isinstance(lock_timeout, (int, float)) or not lock_timeout >= 0:
        raise ValueError(f"lock_timeout must be seconds, 0 or more, got {lock_timeout!r}")
