"""The LanceDB table of an `EmbeddingCache`: where it lies, how it is opened, and how it is made only once.

LanceDB can't be asked to make a table unless there is one: a table that has come to be during `create_table` is
replaced, in a second version. So in a folder the table is made under a hidden name and renamed, which fails where there
is one. In a bucket each process makes a table of its own, and the first version of another table, which is never
replaced, says which of them counts.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import json
import os
import shutil
import uuid
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mmkernels.models.embeddings_damage import HINT, EmbeddingCacheError
from mmkernels.models.embeddings_format import FORMAT

_TABLE = "embeddings"
_END = b"LANC"  # of each data file
_CHOSEN = "chosen"  # in a bucket: the table that holds the name of the other
_NEW = {"new_table_enable_stable_row_ids": "true"}  # rows keep their numbers when files are joined


def lancedb() -> Any:
    """The module, which takes a while to import and is optional."""
    try:
        module = importlib.import_module("lancedb")
    except ImportError as error:
        raise ImportError('EmbeddingCache needs lancedb: pip install "mmkernels[retrieval]"') from error
    # What it says at a fork, "a small chance of deadlock remains", holds for calls in the child; none are made there.
    warnings.filterwarnings("ignore", "lancedb fork support is experimental", RuntimeWarning)
    return module


def folder_of(place: str | Path) -> Path | None:
    """The folder of the table's files; None in an object store."""
    return place / f"{_TABLE}.lance" if isinstance(place, Path) else None


def open_table(place: str | Path, options: dict[str, str]) -> Any:
    """Returns the table; None where there is none."""
    folder = folder_of(place)
    if folder and not folder.is_dir():
        return None
    database = lancedb().connect(str(place), storage_options=options or None)
    if folder:
        hint = _hinted(folder)  # before the table is opened, as another process may commit meanwhile
        table = database.open_table(_TABLE)
        if hint > table.version:
            raise EmbeddingCacheError(f"the manifest of version {hint} is gone")
        return table
    try:
        chosen = database.open_table(_CHOSEN)
    except ValueError as error:
        if "not found" not in str(error):
            raise
        return None
    return database.open_table(_first(chosen))


def make_table(place: str | Path, options: dict[str, str], data: Any) -> Any:
    """Returns the table, made with its first rows. EmbeddingCacheError: another process has made one meanwhile."""
    name, folder = f"{_TABLE}-{uuid.uuid4().hex}", folder_of(place)
    if folder:
        hidden = folder.with_name(f".{name}")
        try:
            lancedb().connect(str(hidden)).create_table(_TABLE, data, storage_options={**options, **_NEW})
            made = hidden / folder.name / "data"
            if incomplete(made, os.listdir(made)):
                raise OSError(errno.ENOSPC, "a file is incomplete: the disk is full")
            for part in ("data", "_versions"):
                sync(hidden / folder.name / part, os.listdir(hidden / folder.name / part))
            (hidden / folder.name).rename(folder)
            sync(folder.parent, [])
        except Exception as error:
            if folder.is_dir():
                raise EmbeddingCacheError("the table already exists") from error
            raise
        finally:
            shutil.rmtree(hidden, ignore_errors=True)
        remove_unfinished(folder.parent)
        return open_table(place, options)
    database = lancedb().connect(str(place), storage_options=options or None)
    made = database.create_table(name, data, storage_options={**options, **_NEW})
    try:
        chosen = database.create_table(_CHOSEN, [{"table": name}])
    except (RuntimeError, ValueError):  # another process makes it
        chosen = database.open_table(_CHOSEN)
    if _first(chosen) != name:
        database.drop_table(name)
        raise EmbeddingCacheError("the table already exists")
    return made


def data_files(folder: Path | None) -> set[str]:
    try:
        return set(os.listdir(folder / "data")) if folder else set()
    except (FileNotFoundError, NotADirectoryError):
        return set()


def folder_time(folder: Path | None) -> int:
    """The time of the last change of the folder's manifests in ns; 0 without one."""
    try:
        return os.stat(folder / "_versions").st_mtime_ns if folder else 0
    except OSError:
        return 0


def remove_unfinished(place: Path) -> None:
    """Removes what processes left that were killed while they made the table. One that still makes it is too late."""
    for hidden in place.glob(f".{_TABLE}-*"):
        shutil.rmtree(hidden, ignore_errors=True)


def sync(folder: Path, names: Iterable[str]) -> None:
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


def incomplete(folder: Path, names: Iterable[str]) -> list[str]:
    """Returns those of the data files that have no end: LanceDB overlooks a full disk in the last write of a file."""
    found = []
    for name in names:
        with contextlib.suppress(FileNotFoundError), open(folder / name, "rb") as file:
            file.seek(-min(len(_END), file.seek(0, os.SEEK_END)), os.SEEK_END)
            if file.read() != _END:
                found.append(name)
    return found


def check_format(place: str | Path) -> None:
    if isinstance(place, Path) and (place / "manifest.json").exists():
        raise EmbeddingCacheError(
            f"{place}: must be a cache of format {FORMAT}, got one of format 1 (manifest.json and shards), which this "
            "version of mmkernels does not read: delete the folder or name another one, and encode again"
        )


def _hinted(folder: Path) -> int:
    """Returns the version of the newest manifest, as LanceDB notes it beside them; 0 without a note."""
    try:
        return int(json.loads((folder / "_versions" / HINT).read_bytes())["version"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _first(chosen: Any) -> str:
    chosen.checkout(1)
    return str(chosen.to_arrow()["table"][0])
