"""Embedding caches in folders and buckets: how they are named, and made once."""

from __future__ import annotations

import os
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from embedding_caches import TEXTS, Encoder, units

from mmkernels.models.embeddings import EmbeddingCache, EmbeddingCacheError, content_key


def test_places_as_users_write_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for folder in ("~/a", Path("~/a"), "a", tmp_path / "a", f"{tmp_path}/a/"):
        cache = EmbeddingCache(folder, "m")
        assert cache.encode(["text"], Encoder()).tolist() == [0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_the_working_folder_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cache = EmbeddingCache("a", "m")
    monkeypatch.chdir("/")
    assert cache.encode(TEXTS, Encoder()).tolist() == list(range(10)) and cache.folder == tmp_path / "a"
    assert len(pickle.loads(pickle.dumps(cache))) == len(EmbeddingCache(tmp_path / "a", "m")) == 10


def test_names_with_every_sign(tmp_path: Path) -> None:
    for name in ("a b", "ü 日本", "100%", "a%20b", "a?b#c", "[a]*{b}", "~nobody", "s3:"):
        assert EmbeddingCache(tmp_path / name, "m").encode(["text"], Encoder()).tolist() == [0]
        assert EmbeddingCache(tmp_path / name, "m").keys_of() == [content_key("text")]
        assert os.listdir(tmp_path / name) == ["embeddings.lance"]


def test_what_killed_processes_leave(tmp_path: Path) -> None:
    """A table that was not finished goes when another process makes one; one without a manifest is an error."""
    (tmp_path / "a" / ".embeddings-0").mkdir(parents=True)
    EmbeddingCache(tmp_path / "a", "m").encode(["text"], Encoder())
    assert os.listdir(tmp_path / "a") == ["embeddings.lance"]
    (tmp_path / "b" / "embeddings.lance").mkdir(parents=True)
    with pytest.raises(EmbeddingCacheError, match="b: can't be opened: Table 'embeddings' was not found"):
        EmbeddingCache(tmp_path / "b", "m")


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="file/cache: "):
        EmbeddingCache(tmp_path / "file" / "cache", "m").encode(TEXTS, Encoder())


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """A bucket named "bucket" on a local server, and the options to reach it."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    keys = {"aws_access_key_id": "key", "aws_secret_access_key": "secret"}
    server.start()
    host, port = server.get_host_and_port()
    client = pytest.importorskip("boto3").client(
        "s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1", **keys
    )
    client.create_bucket(Bucket="bucket")
    yield {"endpoint": f"http://{host}:{port}", "allow_http": "true", "region": "us-east-1", **keys}
    server.stop()


def test_a_bucket(bucket: dict[str, str]) -> None:
    cache = EmbeddingCache("s3://bucket/photos/", "m", storage_options=bucket)
    assert len(cache) == 0 and cache.encode(TEXTS, Encoder(), batch_size=4).tolist() == list(range(10))
    other = EmbeddingCache("s3://bucket/photos", "m", storage_options=bucket)
    assert other.encode(["text 3", "new"], Encoder()).tolist() == [3, 10]
    assert cache.refresh() == 1 and pickle.loads(pickle.dumps(cache)).keys_of() == cache.keys_of()
    torch.testing.assert_close(other.read(), units([*TEXTS, "new"]))
    assert other.search(units(["text 7"]), 1).rows.tolist() == [[7]]
    with pytest.raises(EmbeddingCacheError, match="s3://bucket/photos: model_id must be 'm'"):
        EmbeddingCache("s3://bucket/photos", "n", storage_options=bucket)
    assert len(EmbeddingCache.repair("s3://bucket/photos", storage_options=bucket).rows) == 0


def test_no_bucket(bucket: dict[str, str]) -> None:
    with pytest.raises((EmbeddingCacheError, OSError), match="s3://nothing/photos: "):
        EmbeddingCache("s3://nothing/photos", "m", storage_options=bucket).encode(TEXTS, Encoder())


@pytest.mark.parametrize("place", ["folder", "bucket"])
def test_a_cache_that_several_make_at_once(place: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """LanceDB lets the last one that makes a table replace the others': each row must be there all the same."""
    where = str(tmp_path / "cache") if place == "folder" else "s3://bucket/photos"
    options = request.getfixturevalue("bucket") if place == "bucket" else None

    def work(number: int, cache: EmbeddingCache, go: threading.Barrier, rows: dict[int, list[int]]) -> None:
        go.wait()
        rows[number] = cache.encode(["shared", f"text {number}"], Encoder()).tolist()

    for attempt in range(4):
        caches = [EmbeddingCache(f"{where}-{attempt}", "m", storage_options=options) for _ in range(4)]
        rows, go = dict[int, list[int]](), threading.Barrier(4)
        threads = [threading.Thread(target=work, args=(number, caches[number], go, rows)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        cache = EmbeddingCache(f"{where}-{attempt}", "m", storage_options=options)
        assert len(cache) == 5
        for number in range(4):
            assert cache.rows_of([content_key("shared"), content_key(f"text {number}")]).tolist() == rows[number]
        if place == "folder":
            assert os.listdir(f"{where}-{attempt}") == ["embeddings.lance"]
