"""What is lost of a damaged `EmbeddingCache`, and a way back to the rest."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmkernels.models.embeddings_rows import floats

if TYPE_CHECKING:
    from mmkernels.models.embeddings_store import Store

HINT = "latest_version_hint.json"  # LanceDB's note of the newest manifest, beside them
_PART = 1024  # rows of a damaged file that are tried together
_OLDER = 10  # manifests in which rows are looked for


class EmbeddingCacheError(ValueError):
    """An embedding cache that is damaged, gone, of another format, or another model's."""


class Repair(NamedTuple):
    """The result of `EmbeddingCache.repair`."""

    rows: Tensor
    """The rows that are lost ``[n]`` int64."""
    manifests: list[str]
    """The names of damaged manifests, which lie in the folder ``embeddings.lance/damaged`` now."""


def repair(store: Store) -> Repair:
    """Goes back to a manifest that leads to rows, and deletes those that can't be read from the table."""
    aside: list[Path] = []
    first: Exception | None = None
    while True:
        try:
            store.refresh()
            if store.header is None:
                raise EmbeddingCacheError(f"{store.place}: must hold a cache, to be repaired, got none")
            known = store.places()[0]
            lost = _lost(store, known)
            if len(lost) == len(known) > 0:
                raise EmbeddingCacheError(f"{store.place}: can't be repaired: none of its {len(lost)} rows can be read")
            numbers, keys, rows = _in_older_manifest(store, lost)
            store.delete(lost.tolist())
            break
        except (EmbeddingCacheError, TimeoutError) as error:
            first = first or error
            store.close()
            if not _set_newest_aside(store, aside):
                raise first from None
    if keys:
        store.commit(keys, rows.to(store.dtype))
    return Repair(torch.from_numpy(np.setdiff1d(lost, numbers)), [path.name for path in aside])


def _set_newest_aside(store: Store, aside: list[Path]) -> bool:
    """Moves the newest manifest. Returns whether there was one; if not, it is another fault, and all are put back."""
    if store.folder is None:
        return False
    versions, damaged_ones = store.folder / "_versions", store.folder / "damaged"
    if (versions / HINT).exists():  # it may name one that is gone
        (versions / HINT).unlink()
    elif newest := min(versions.glob("*.manifest"), default=None):  # the names count down
        damaged_ones.mkdir(exist_ok=True)
        aside.append(newest.rename(damaged_ones / newest.name))
    else:
        for path in aside:
            path.rename(versions / path.name)
        return False
    return True


def _in_older_manifest(store: Store, lost: np.ndarray) -> tuple[np.ndarray, list[bytes], Tensor]:
    """Returns the numbers, keys and rows of those that an older manifest leads to: the newest has a wrong entry."""
    nothing = np.empty(0, np.int64), list[bytes](), floats(0, 0)
    if not len(lost):
        return nothing
    newest = store.version
    for version in range(newest - 1, max(newest - _OLDER, 0), -1):
        try:
            store.look_at(version)
            found = np.setdiff1d(lost, _lost(store, lost))
            return store.whole(found) if len(found) else nothing
        except (EmbeddingCacheError, OSError):  # joined since, or damaged
            continue
        finally:
            store.look_at(None)
    return nothing


def damaged(store: Store, numbers: np.ndarray, cause: object) -> EmbeddingCacheError:
    """Returns the error that says which of the rows can't be read."""
    store.refresh()  # raises where the folder is gone, or holds another cache
    store.version = 0  # so that the next refresh takes what is new
    lost = _lost(store, numbers)
    if not len(lost):  # what failed has passed
        return EmbeddingCacheError(str(cause))
    cause = str(cause).removeprefix(f"{store.place}: ")
    return EmbeddingCacheError(
        f"{store.place}: {len(lost)} rows can't be read, rows {_spans(lost)}: {cause}. "
        "EmbeddingCache.repair(folder) leaves them out and keeps all others"
    )


def check_written(store: Store, seen: int) -> None:
    """Raises OSError if rows after `seen` can't be read, and deletes them, so that they are not taken for stored."""
    store.look_at(None)
    known = store.places()[0]
    lost = _lost(store, known[known > seen])
    if len(lost):
        store.delete(lost.tolist())
        raise OSError(errno.ENOSPC, f"{store.place}: a file of {len(lost)} rows is incomplete: the disk is full")


def _lost(store: Store, numbers: np.ndarray) -> np.ndarray:
    """Returns those of the rows that can't be read: file by file; in parts, then in halves, where a file fails."""
    if not len(numbers):
        return numbers
    known, files = store.places()
    lost = [np.setdiff1d(numbers, known)]
    asked = np.isin(known, numbers)
    for file in np.unique(files[asked]):
        here = np.sort(known[asked & (files == file)])
        parts = np.split(here, range(_PART, len(here), _PART))
        missing = [_missing(store, part) for part in parts]
        some = len(parts) == 1 or any(found is not None for found in missing)  # else the file is gone, or its end
        for part, found in zip(parts, missing):
            lost.append(found if found is not None else _halves(store, part) if some else part)
    return np.sort(np.concatenate(lost))


def _halves(store: Store, numbers: np.ndarray) -> np.ndarray:
    """As `_lost`, of rows that can't be read together."""
    if len(numbers) == 1:
        return numbers
    lost = []
    for half in np.array_split(numbers, 2):
        found = _missing(store, half)
        lost.append(_halves(store, half) if found is None else found)
    return np.concatenate(lost)


def _missing(store: Store, numbers: np.ndarray) -> np.ndarray | None:
    """Returns those of the rows that are not there or have wrong checksums; None if they can't be read together."""
    try:
        return np.setdiff1d(numbers, store.whole(numbers)[0])
    except (EmbeddingCacheError, OSError):
        return None


def _spans(numbers: np.ndarray) -> str:
    """Ascending numbers as a text: 3, 7 to 12."""
    runs = np.split(numbers, np.flatnonzero(np.diff(numbers) > 1) + 1)
    names = [str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs]
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
