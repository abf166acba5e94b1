"""An embedding cache's store: killed writers, full disks, several processes, forks, damaged files, buckets."""

from __future__ import annotations

import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from embedding_caches import TEXTS, D, Encoder, filled, intact, open_cache, units
from torch import Tensor

from mmkernels.models import embeddings_rows, embeddings_store
from mmkernels.models.embeddings import EmbeddingCache, EmbeddingCacheError, content_key

# Processes that fork from here can't call LanceDB, as this one has loaded it: scripts run in fresh ones.
_START = "import sys, os, signal, time, torch\nsys.path.insert(0, sys.argv[1])\nfrom embedding_caches import *\n"


def start(script: str, folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """Runs a script that finds the helpers of these tests, and the cache's folder as `sys.argv[2]`."""
    command = [sys.executable, "-c", _START + script, str(Path(__file__).parent), str(folder), *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


# Killed.


def test_writers_that_are_killed(tmp_path: Path) -> None:
    """At random moments: each row that `add` has returned is there, once and whole, and the next append works."""
    script = """
for line in sys.stdin:  # the number of the first text; each writer is a child that has not loaded LanceDB before
    if (writer := os.fork()) == 0:
        cache = open_cache(Path(sys.argv[2]))
        for n in range(int(line), int(line) + 10_000):
            cache.encode([f"text {n}", f"more {n}"], Encoder())
            os.write(1, b"%d\\n" % n)
    os.write(1, b"%d\\n" % writer)
    os.waitpid(writer, 0)
    os.write(1, b"killed\\n")
"""
    work, returned, draw = start(script, tmp_path), [], random.Random(0)
    assert work.stdin is not None and work.stdout is not None
    for kill in range(3):
        work.stdin.write(b"%d\n" % (10_000 * kill))
        work.stdin.flush()
        writer, seen = int(work.stdout.readline()), 0
        while (line := work.stdout.readline()) != b"killed\n":
            returned.append(int(line))
            seen += 1
            if seen == 3:
                time.sleep(draw.uniform(0, 0.05))
                os.kill(writer, signal.SIGKILL)
    work.communicate()
    cache = open_cache(tmp_path)
    texts = [text for n in returned for text in (f"text {n}", f"more {n}")]
    torch.testing.assert_close(cache.read(cache.rows_of(map(content_key, texts))), units(texts))
    keys = cache.keys_of()
    assert len(returned) >= 9 and len(set(keys)) == len(keys) == len(cache) <= len(texts) + 6
    assert cache._store._table.count_rows() == len(cache)
    assert cache.encode(["the next"], Encoder()).tolist() == [len(keys)]


def test_an_encoding_run_that_is_ended(tmp_path: Path) -> None:
    """By SIGTERM, which Python does not hear: most of what was encoded is there."""
    script = """
def encode(items):
    if "text 5000" in items:
        os.kill(os.getpid(), signal.SIGTERM)
    return torch.ones(len(items), 4)
open_cache(Path(sys.argv[2])).encode((f"text {n}" for n in range(8000)), encode)
"""
    assert start(script, tmp_path).wait() == -signal.SIGTERM
    assert len(open_cache(tmp_path)) == 2 * 2048


def test_rows_are_stored_after_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow model's, too."""
    monkeypatch.setattr(embeddings_rows, "_STORED_SECONDS", 0.0)
    stored: list[int] = []

    def encode(items: list[Any]) -> Tensor:
        stored.append(len(open_cache(tmp_path)))
        return Encoder()(items)

    open_cache(tmp_path).encode(TEXTS[:4], encode, batch_size=1)
    assert stored == [0, 1, 2, 3]


@pytest.mark.parametrize("when", ["before", "after", "later"])
def test_an_interrupt_within_a_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """What was encoded is kept, once."""
    cache, calls, add = filled(tmp_path, ["first"]), iter(range(1)), embeddings_store.Store._add

    def interrupted(store: Any, data: Any) -> int:
        if when == "after":
            add(store, data)
        if next(calls, None) is not None:
            raise KeyboardInterrupt
        return add(store, data) if when == "before" else store._table.version

    def interrupted_later(store: Any, *rows: Any) -> Any:
        found = append(store, *rows)
        if next(calls, None) is not None:
            raise KeyboardInterrupt
        return found

    append = embeddings_store.Store.append
    name, change = ("append", interrupted_later) if when == "later" else ("_add", interrupted)
    monkeypatch.setattr(embeddings_store.Store, name, change)
    with pytest.raises(KeyboardInterrupt):
        cache.encode(TEXTS, Encoder(), batch_size=4)
    monkeypatch.undo()
    assert len(cache) == 11
    intact(tmp_path, ["first", *TEXTS])


def test_a_full_disk(tmp_path: Path) -> None:
    cache, limits = filled(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    other = open_cache(tmp_path / "other")
    texts = [f"text {n}" for n in range(40)]
    for size in (0, 100, 1500, 3900):  # LanceDB does not notice it in the last write of a file, that of 3,900 bytes
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))  # no file grows beyond it
        try:
            for one in (cache, other):
                with pytest.raises(OSError, match=r"cache: .*(File too large|is incomplete: the disk is full)"):
                    one.encode(texts, Encoder())
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert len(cache) == len(open_cache(tmp_path)) == 10 and len(other) == 0
    intact(tmp_path, TEXTS)


# Several at once.


def test_processes_that_append_the_same(tmp_path: Path) -> None:
    """Each text gets one row, which all agree on, while files are joined and removed; a reader sees no less."""
    script = """
from datetime import timedelta
from mmkernels.models import embeddings_rows, embeddings_store
embeddings_store._FILES, embeddings_store._KEPT = 8, timedelta(seconds=0.1)
cache = open_cache(Path(sys.argv[2]))
sys.stdin.readline()
rows = [cache.encode([f"shared {n}", f"{sys.argv[3]} {n}"], Encoder()).tolist() for n in range(20)]
print(rows)
"""
    writers = [start(script, tmp_path, name) for name in "ab"]
    time.sleep(1)
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write(b"go\n")
        writer.stdin.flush()
    reader, seen = open_cache(tmp_path), dict[str, int]()
    while any(writer.poll() is None for writer in writers):
        reader.refresh()
        keys = reader.keys_of()
        now = dict(zip(keys, reader.rows_of(keys).tolist()))
        assert seen.items() <= now.items()
        seen = now
        if keys:
            assert len(reader.read(reader.rows_of(keys[:1]))) == 1
    cache = open_cache(tmp_path)
    for name, writer in zip("ab", writers):
        assert writer.stdout is not None
        for n, rows in enumerate(eval(writer.stdout.read())):
            assert cache.rows_of([content_key(f"shared {n}"), content_key(f"{name} {n}")]).tolist() == rows
    texts = [f"{name} {n}" for name in ("a", "b", "shared") for n in range(20)]
    assert len(cache) == 60 and cache._store._table.count_rows() == 60
    torch.testing.assert_close(cache.read(cache.rows_of(map(content_key, texts))), units(texts))


def test_rows_stored_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two append the same content without seeing each other: the first row counts, in both and in a new one."""
    one, two = filled(tmp_path, ["a"]), open_cache(tmp_path)
    monkeypatch.setattr(two, "refresh", lambda: 0)
    assert one.encode(["b", "c"], Encoder()).tolist() == [1, 2]
    assert two.encode(["c", "d", "b"], Encoder()).tolist() == [2, 4, 1]
    assert two.encode(["e"], Encoder()).tolist() == [6]
    for cache in (one, two, open_cache(tmp_path)):
        cache._memory.take(*cache._store.new()) if cache is one and cache._store.refresh() else None
        assert cache.rows_of(map(content_key, "abcde")).tolist() == [0, 1, 2, 4, 6] and len(cache) == 5
        torch.testing.assert_close(cache.read(), units(list("abcde")))
        assert cache.search(units(list("abcde")), 1).rows[:, 0].tolist() == [0, 1, 2, 4, 6]
        assert cache.ranks(units(["d"]), torch.tensor([4])).tolist() == [0]
        with pytest.raises(ValueError, match="rows must be rows of the cache, got 3, which is not there"):
            cache.read(torch.tensor([3]))
    assert one._store._table.count_rows() == 5  # the second ones are deleted


def test_commits_that_others_overtake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An append is repeated; after `lock_timeout` it is an error."""
    cache, calls = filled(tmp_path, lock_timeout=0.2), iter(range(2))
    add = embeddings_store.Store._add

    def overtaken(store: Any, data: Any) -> int:
        if next(calls, None) is not None:
            raise RuntimeError("lance error: Retryable commit conflict for version 7")
        return add(store, data)

    monkeypatch.setattr(embeddings_store.Store, "_add", overtaken)
    assert cache.encode(["new"], Encoder()).tolist() == [10]
    calls = iter(range(10**9))
    with pytest.raises(TimeoutError, match=r"no commit in lock_timeout = 0.2 s: .* conflict for version 7"):
        cache.encode(["newer"], Encoder())
    assert len(open_cache(tmp_path)) == 11


def test_small_appends(tmp_path: Path) -> None:
    """Files are joined: their number stays small, rows keep their numbers, also in a cache that was open before."""
    cache, before = open_cache(tmp_path, normalize=False), None
    keys, rows = [content_key(str(n)) for n in range(400)], torch.randn(400, D)
    for n in range(200):
        cache.add(keys[2 * n : 2 * n + 2], rows[2 * n : 2 * n + 2])
        before = before or open_cache(tmp_path)
    stats = cache._store._table.stats()["fragment_stats"]
    assert stats["num_fragments"] < 100
    assert torch.equal(cache.rows_of(keys), torch.arange(400)) and torch.equal(cache.read(), rows)
    assert before is not None and before.refresh() == 398 and torch.equal(before.read(), rows)
    order = torch.randperm(400)
    assert torch.equal(open_cache(tmp_path).read(order), rows[order])


def test_another_models_cache(tmp_path: Path) -> None:
    filled(tmp_path)
    for options, match in (
        ({"model_id": "model-b"}, "cache: model_id must be 'model-a', as in this cache, got 'model-b'"),
        ({"dtype": torch.float16}, "dtype must be torch.float32, as in this cache, got torch.float16"),
        ({"normalize": False}, "normalize must be True, as in this cache, got False"),
    ):
        with pytest.raises(EmbeddingCacheError, match=match):
            EmbeddingCache(**{"folder": tmp_path / "cache", "model_id": "model-a", **options})


def test_another_that_was_faster(tmp_path: Path) -> None:
    """Several open one new folder: the second to append is refused if it has another model, d or dtype."""
    late, narrow = EmbeddingCache(tmp_path / "cache", "model-b"), open_cache(tmp_path)
    half, undecided = open_cache(tmp_path, dtype=torch.float16), open_cache(tmp_path)
    filled(tmp_path, normalize=False)
    with pytest.raises(EmbeddingCacheError, match="model_id must be 'model-a', as in this cache, got 'model-b'"):
        late.encode(["new"], Encoder())
    with pytest.raises(EmbeddingCacheError, match=r"dtype must be torch.float32, as in this cache, got torch.float16"):
        half.encode(["new"], Encoder())
    with pytest.raises(ValueError, match=r"must be \[1, 16\], got shape \(1, 3\)"):
        narrow.encode(["new"], Encoder(3))
    assert undecided.add([content_key("new")], torch.full((1, D), 3.0)).tolist() == [10] and not undecided.normalize
    assert torch.equal(open_cache(tmp_path).read(torch.tensor([10])), torch.full((1, D), 3.0))


def test_a_cache_that_is_gone(tmp_path: Path) -> None:
    cache = filled(tmp_path)
    shutil.rmtree(tmp_path / "cache")
    for call in (cache.refresh, lambda: cache.encode(["new"], Encoder())):
        with pytest.raises(EmbeddingCacheError, match="must be the folder of this cache, got none: it is gone"):
            call()
    with pytest.raises(EmbeddingCacheError, match=r"cache: must be the folder of this cache, got none: it is gone$"):
        cache.read()
    for texts in (["other"], ["another"]):  # the first one has the version of the one that is gone
        filled(tmp_path, texts)
        for call in (cache.refresh, cache.read, lambda: cache.add([content_key("new")], torch.ones(1, D))):
            with pytest.raises(EmbeddingCacheError, match="must be the cache that was opened, got another"):
                call()
    assert len(open_cache(tmp_path)) == 2


# Forked and pickled.


def test_forks_and_pickles(tmp_path: Path) -> None:
    """After a search in this process, a forked one searches from memory, appends, and reads what is not in memory."""
    cache = filled(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.ones(2000, 2000).sum()  # OpenMP's threads are started
    cache.search(units(TEXTS), 1)
    child = os.fork()
    if child == 0:
        signal.alarm(100)
        try:
            assert cache.search(units(TEXTS), 1).rows[:, 0].tolist() == list(range(10))
            assert cache.encode(["new", "text 3"], Encoder()).tolist() == [10, 3] and len(cache) == 11
            assert torch.equal(pickle.loads(pickle.dumps(cache)).read(), cache.read())
            with pytest.raises(EmbeddingCacheError, match="model_id must be 'model-a'"):
                EmbeddingCache(tmp_path / "cache", "model-b")
        except BaseException as error:
            os.write(2, repr(error).encode())
            os._exit(1)
        os._exit(0)
    torch.set_num_threads(threads)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert cache.refresh() == 1
    torch.testing.assert_close(cache.read(), units([*TEXTS, "new"]))
    again = pickle.loads(pickle.dumps(cache))
    assert again.folder == cache.folder and torch.equal(again.read(), cache.read())
