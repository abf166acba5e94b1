"""An embedding cache whose process dies, or whose disk is full: what was there stays, and the next append works."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from damaged_caches import INDEX, TEXTS, check_search, encode, intact, make, open_cache, rewrite

from mmkernels.models.embeddings import content_key


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A cache of twelve texts, with an index."""
    return make(tmp_path / "cache")


class Killed(BaseException):
    """The process ends here."""


def killed_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """The first `step` writes, syncs, renames and deletions are done; the next is not done; a write stops half-way."""
    count = iter(range(step))

    def limited(function: Callable[..., Any], half: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            if next(count, None) is None:
                raise Killed
            return function(*arguments)

        def at_last(*arguments: Any) -> Any:
            try:
                return run(*arguments)
            except Killed:
                half(*arguments)
                raise

        return at_last

    def half_written(path: Path, data: bytes) -> None:
        with path.open("wb") as file:
            file.write(data[: len(data) // 2])

    monkeypatch.setattr(os, "replace", limited(os.replace, lambda *_: None))
    monkeypatch.setattr(os, "fsync", limited(os.fsync, lambda *_: None))
    monkeypatch.setattr(Path, "unlink", limited(Path.unlink, lambda *_: None))
    monkeypatch.setattr(Path, "write_bytes", limited(Path.write_bytes, half_written))


def deaths(monkeypatch: pytest.MonkeyPatch, work: Callable[[int], Any]) -> Iterator[int]:
    """Do the work, killed at its first step, its second, and so on, until it lives to the end."""
    for step in range(100):
        with monkeypatch.context() as patch:
            killed_at(patch, step)
            try:
                work(step)
                died = False
            except Killed:
                died = True
        yield step
        if not died:
            return
    raise AssertionError("it never ends")


def test_death_at_any_step_of_an_append(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    for _ in deaths(monkeypatch, lambda _: open_cache(folder).encode(["text 12"], encode)):
        counts.append(len(open_cache(folder)))
        intact(folder, counts[-1])
    # Write, sync, rename, sync, of a shard and a manifest: the row is there from the manifest's rename on.
    assert counts == [12] * 7 + [13] * 2
    open_cache(folder).encode(["text 13"], encode)
    intact(folder, 14)
    assert not [path for path in folder.iterdir() if "partial" in path.name]  # each was written over in the end
    assert len(list(folder.glob("shard-*"))) == 4 + 4  # four that no manifest lists, each unchanged


def test_death_at_any_step_of_the_first_append(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in deaths(monkeypatch, lambda step: open_cache(tmp_path / str(step)).encode(TEXTS, encode)):
        counted = len(open_cache(tmp_path / str(step)))
        assert counted == (12 if step > 10 else 0)
        open_cache(tmp_path / str(step)).encode(TEXTS, encode)
        intact(tmp_path / str(step))
    assert step == 12


def test_death_at_any_step_of_saving_the_index(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_cache(folder).encode(["text 12"], encode)
    copies = [shutil.copytree(folder, folder.with_name(str(step))) for step in range(9)]
    for step in deaths(monkeypatch, lambda step: open_cache(copies[step]).update_index()):
        intact(copies[step], 13)  # the manifest names the old index or the new one, and it is there
        open_cache(copies[step]).encode(["text 13", "text 14"], encode)
        open_cache(copies[step]).update_index()
        names = sorted(path.name for path in copies[step].iterdir())
        assert names[:3] == ["index-00015.faiss", "lock", "manifest.json"]  # no other index, no incomplete file
    # Sync, rename, sync, of the index; write, sync, rename, sync, of the manifest; the old index is deleted.
    assert step == 8


@contextlib.contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file grows beyond `size` bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk(folder: Path) -> None:
    cache = open_cache(folder)
    texts = [f"text {n}" for n in range(40)]
    before = {path: path.read_bytes() for path in folder.iterdir()}
    for size in (0, 100, 1500):
        with full_disk(size), pytest.raises(OSError, match=r"shard-00002.safetensors could not be written: File too"):
            cache.encode(texts, encode)
        assert before == {path: path.read_bytes() for path in folder.iterdir()}
    assert len(cache) == 12
    cache.encode(texts, encode)
    with (
        full_disk(1000),
        pytest.warns(RuntimeWarning, match="kept in memory alone: .*index-00040.faiss could not be written"),
    ):
        check_search(cache)
    assert before[folder / INDEX] == (folder / INDEX).read_bytes()
    with full_disk(1000), pytest.raises(OSError, match=r"index-00040.faiss could not be written"):
        cache.update_index()
    assert sorted(path.name for path in folder.iterdir()) == [
        *(INDEX, "lock", "manifest.json"),
        *(f"shard-0000{n}.safetensors" for n in range(3)),
    ]
    cache.update_index()
    intact(folder, 40)


def test_a_folder_that_cannot_be_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / INDEX).unlink()
    rewrite(folder, lambda values: values.update(index=None))
    (folder / "lock").unlink()
    (folder / "lock").mkdir()  # as good as a permission, which root doesn't need
    cache = open_cache(folder)
    with pytest.warns(RuntimeWarning, match="index is kept in memory alone"):
        check_search(cache)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the warning comes once
        check_search(cache)
    with pytest.raises(OSError, match="lock"):
        cache.encode(["text 99"], encode)
    assert content_key("text 99") not in cache
