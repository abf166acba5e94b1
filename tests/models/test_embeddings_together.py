"""One embedding cache and several threads, processes, models, platforms."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from embedding_caches import TEXTS, D, Encoder, filled, manifest, open_cache, units
from torch import Tensor

from mmkernels.models import embeddings_files
from mmkernels.models.embeddings import EmbeddingCache, EmbeddingCacheError, content_key

# Several at once.


def test_threads_that_append_at_once(tmp_path: Path) -> None:
    caches = [open_cache(tmp_path) for _ in range(4)]
    start = threading.Barrier(4)
    rows: dict[tuple[int, int], Tensor] = {}

    def work(number: int) -> None:
        start.wait()
        for n in range(10):  # each appends a text of one thread and one that all threads append
            rows[number, n] = caches[number].encode([f"thread {number} {n}", f"shared {n}"], Encoder())

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    cache = open_cache(tmp_path)
    assert len(cache) == 50 and len(rows) == 40
    for (number, n), held in rows.items():
        assert torch.equal(cache.rows_of([content_key(f"thread {number} {n}"), content_key(f"shared {n}")]), held)
        torch.testing.assert_close(cache.read(held), units([f"thread {number} {n}", f"shared {n}"]))
    for one in caches:
        one.refresh()
        assert one.keys_of(torch.arange(50)) == cache.keys_of(torch.arange(50))


@pytest.mark.slow
def test_processes_that_append_at_once(tmp_path: Path) -> None:
    script = """
import sys, torch
from mmkernels.models.embeddings import EmbeddingCache
cache = EmbeddingCache(sys.argv[1], "model-a")
sys.stdin.readline()
for n in range(25):
    cache.encode([f"{sys.argv[2]} {n}", f"shared {n}"], lambda items: torch.ones(len(items), 3))
"""
    workers = [
        subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "cache"), name], stdin=subprocess.PIPE)
        for name in "ab"
    ]
    for worker in workers:
        worker.stdin.write(b"go\n")  # type: ignore[union-attr]
        worker.stdin.close()  # type: ignore[union-attr]
    assert [worker.wait(120) for worker in workers] == [0, 0]
    cache = open_cache(tmp_path)
    keys = {content_key(f"{name} {n}") for name in ("a", "b", "shared") for n in range(25)}
    assert set(cache.keys_of(torch.arange(len(cache)))) == keys and len(cache) == 75


def test_a_lock_that_is_held(tmp_path: Path) -> None:
    cache = filled(tmp_path, lock_timeout=0.05)
    with embeddings_files.locked(cache.folder, 0):
        with pytest.raises(TimeoutError, match=r"cache/lock must be free within lock_timeout = 0.05 s, got a lock"):
            cache.encode(["new"], Encoder())
        assert cache.encode(TEXTS, Encoder()).tolist() == list(range(10))  # nothing to write: nothing to wait for
        with pytest.raises(TimeoutError, match="cache/lock must be free"):
            cache.update_index()
    assert cache.encode(["new"], Encoder()).tolist() == [10]


def test_a_search_waits_for_no_writer(tmp_path: Path) -> None:
    cache = filled(tmp_path, lock_timeout=30)
    with embeddings_files.locked(cache.folder, 0), warnings.catch_warnings():
        warnings.simplefilter("error")
        before = time.monotonic()
        result = cache.search(units(TEXTS), 1)
        assert time.monotonic() - before < 10
    assert result.rows[:, 0].tolist() == list(range(10))
    assert manifest(cache)["index"] is None
    cache.search(units(TEXTS), 1)  # the next one saves
    assert manifest(cache)["index"]["rows"] == 10


def test_an_index_that_is_current_is_left_alone(tmp_path: Path) -> None:
    cache, other = filled(tmp_path), open_cache(tmp_path, lock_timeout=0)
    cache.update_index()
    before = {path: path.stat().st_mtime_ns for path in cache.folder.iterdir()}
    with embeddings_files.locked(cache.folder, 0):  # nothing to write: nothing to wait for
        cache.update_index()
        other.update_index()
    assert before == {path: path.stat().st_mtime_ns for path in cache.folder.iterdir()}
    (path,) = cache.folder.glob("index-*.faiss")
    path.unlink()
    cache.update_index()
    assert path.exists()


@pytest.mark.slow
def test_searches_while_another_process_saves_indexes(tmp_path: Path) -> None:
    """None finds the index of another manifest than it read, which would pass for a damaged one."""
    cache = open_cache(tmp_path)
    cache.add([content_key(str(n)) for n in range(2000)], torch.randn(2000, 64))
    cache.update_index()
    script = """
import itertools, sys, torch
from mmkernels.models.embeddings import EmbeddingCache, content_key
cache = EmbeddingCache(sys.argv[1], "model-a")
for n in itertools.count():
    cache.add([content_key(f"new {n}")], torch.randn(1, 64))
    cache.update_index()
"""
    writer = subprocess.Popen([sys.executable, "-c", script, str(cache.folder)])
    try:
        deadline = time.monotonic() + 120
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            while len(cache) < 2100 and time.monotonic() < deadline:
                cache = open_cache(tmp_path, verify=False)
                assert cache.search(torch.ones(1, 64), 1).rows.shape == (1, 1)
    finally:
        writer.kill()
        writer.wait()
    assert len(cache) >= 2100
    cache = open_cache(tmp_path)
    cache.add([content_key("last")], torch.randn(1, 64))
    cache.update_index()
    assert len(list(cache.folder.glob("index-*"))) == 1


def test_another_models_cache(tmp_path: Path) -> None:
    filled(tmp_path)
    for options, match in (
        ({"model_id": "model-b"}, "cache: model_id must be 'model-a', as in this cache, got 'model-b'"),
        ({"dtype": torch.float16}, "dtype must be torch.float32, as in this cache, got torch.float16"),
        ({"normalize": False}, "normalize must be True, as in this cache, got False"),
    ):
        with pytest.raises(EmbeddingCacheError, match=match):
            EmbeddingCache(**{"folder": tmp_path / "cache", "model_id": "model-a", **options})


def test_another_model_that_was_faster(tmp_path: Path) -> None:
    """Two open one new folder, and the second to append is refused."""
    late = EmbeddingCache(tmp_path / "cache", "model-b")
    narrow = open_cache(tmp_path)
    filled(tmp_path)
    with pytest.raises(EmbeddingCacheError, match="model_id must be 'model-a', as in this cache, got 'model-b'"):
        late.encode(["new"], Encoder())
    with pytest.raises(ValueError, match=r"embeddings must be \[n, 16\], as in this cache, got \(1, 3\)"):
        narrow.encode(["new"], Encoder(3))
    assert len(open_cache(tmp_path)) == 10


@pytest.mark.parametrize("call", ["add", "encode", "refresh"])
def test_what_another_made_of_a_new_folder(tmp_path: Path, call: str) -> None:
    """A cache that was opened without a dtype, when the folder was empty, takes the dtype of the other."""
    late = open_cache(tmp_path)
    assert late.dtype == torch.float32 and late.normalize
    filled(tmp_path, dtype=torch.float16, normalize=False)
    if call == "refresh":
        assert late.refresh() == 10
    elif call == "add":
        assert late.add([content_key("new")], torch.full((1, D), 3.0)).tolist() == [10]
    else:
        assert late.encode(["new"], lambda items: torch.full((1, D), 3.0)).tolist() == [10]
    assert late.dtype == torch.float16 and not late.normalize
    if call != "refresh":
        assert torch.equal(open_cache(tmp_path).read(torch.tensor([10])), torch.full((1, D), 3.0).half())


def test_another_dtype_that_was_faster(tmp_path: Path) -> None:
    """The folder was empty when rows were made ready, and is another's by the time they are written."""

    def encode(items: list[Any]) -> Tensor:
        if items == ["b"]:
            filled(tmp_path, dtype=torch.float16)
        return torch.ones(1, D)

    late = open_cache(tmp_path)
    with pytest.raises(EmbeddingCacheError, match=r"dtype must be torch.float16, as in this cache, got torch.float32"):
        late.encode(["a", "b"], encode, batch_size=1)
    assert len(open_cache(tmp_path)) == 10


def test_models_without_optional_packages() -> None:
    """Nor fcntl, which some platforms lack: models are there."""
    script = """
import sys
for name in ("fcntl", "transformers", "safetensors", "faiss", "PIL"):
    sys.modules[name] = None
from mmkernels.models import CLIP, Flamingo
CLIP.from_size("tiny"), Flamingo.from_size("tiny")
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_platform_without_fcntl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are no such locks, what is in a cache can be read and searched."""
    cache = filled(tmp_path)
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with pytest.raises(OSError, match=r"cache/lock must be locked by flock, .* got a platform without fcntl"):
        cache.encode(["new"], Encoder())
    with pytest.warns(RuntimeWarning, match="kept in memory alone: .* got a platform without fcntl"):
        result = open_cache(tmp_path).search(units(TEXTS), 1)
    assert result.rows[:, 0].tolist() == list(range(10))
