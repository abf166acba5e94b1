"""An embedding cache whose files are damaged: a clear error that names the file, or an index that is built again."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import pytest
import torch
from damaged_caches import INDEX, TEXTS, D, check_search, encode, intact, make, open_cache, rewrite
from safetensors.torch import load_file, save_file

from mmkernels.models import embeddings_index
from mmkernels.models.embeddings import EmbeddingCacheError, content_key


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("made") / "cache")


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(made, tmp_path / "cache")


def refused(folder: Path, match: str, **options: Any) -> None:
    with pytest.raises(EmbeddingCacheError, match=match):
        open_cache(folder, **options)


# The manifest.


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"1" * 10_000, b'"x"', b"[]", b"null"])
def test_a_manifest_that_is_no_json_object(folder: Path, content: bytes) -> None:
    (folder / "manifest.json").write_bytes(content)
    refused(folder, "cache/manifest.json: must (be JSON|hold a JSON object)")


def test_a_manifest_that_is_a_folder(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").mkdir()
    refused(folder, "cache/manifest.json: must be a file, got something else")


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("format", 2, "format must be 1, which this version of mmkernels reads, got 2"),
        ("format", None, "format must be an integer"),
        ("format", True, "format must be an integer"),
        ("model_id", 3, "model_id must be a text, got 3"),
        ("model_id", "", "model_id must be a text, got ''"),
        ("dim", 0, "dim must be an integer from 1"),
        ("dim", -D, "dim must be an integer from 1 to 16777216, got -8"),
        ("dim", 10**30, "dim must be an integer from 1"),
        ("dim", 8.0, "dim must be an integer from 1"),
        ("dim", 9, "shard-00000.safetensors: must hold .*5, 9.*got .*5, 8"),
        ("dtype", "float64", "dtype must be one of float32, float16, bfloat16, got 'float64'"),
        ("dtype", "Tensor", "dtype must be one of"),
        ("dtype", ["float32"], "dtype must be one of"),
        ("dtype", "float16", "shard-00000.safetensors: must hold .*F16.*got .*F32"),
        ("normalized", 0, "normalized must be true or false, got 0"),
        ("shards", {}, "shards must be a list of objects"),
        ("shards", "x", "shards must be a list of objects"),
        ("shards", [3], r"shards\[0\]: file must be the name of a shard .* got nothing"),
        ("index", [], "index must be null or an object"),
        ("index", {}, "index: rows must be an integer from 1 to 12, .* got nothing"),
    ],
)
@pytest.mark.parametrize("verify", [True, False])
def test_manifests_that_are_wrong(folder: Path, key: str, value: Any, match: str, verify: bool) -> None:
    rewrite(folder, lambda values: values.update({key: value}))
    refused(folder, match, verify=verify)
    rewrite(folder, lambda values: values.pop(key))
    if key != "index":
        refused(folder, f"{key} must be .* got nothing")


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("file", "../shard-00000.safetensors", "file must be the name of a shard beside it"),
        ("file", "/etc/passwd", "file must be the name of a shard beside it"),
        ("file", "a/../shard-00001.safetensors", "file must be the name of a shard beside it"),
        ("file", "shard-00001.safetensors\n", "file must be the name of a shard beside it"),
        ("file", "shard-٠٠٠٠١.safetensors", "file must be the name of a shard beside it"),
        ("file", 7, "file must be the name of a shard beside it"),
        ("file", "shard-00000.safetensors", "file must be another shard than those before"),
        (
            "file",
            "shard-00002.safetensors",
            "shard-00002.safetensors: must be there by manifest.json, got no such file",
        ),
        ("rows", -1, "rows must be an integer from 1 to 16777216, got -1"),
        ("rows", 0, "rows must be an integer from 1"),
        ("rows", 10**400, "rows must be an integer from 1"),
        ("rows", "7", "rows must be an integer from 1"),
        ("rows", 16777216, "shard-00001.safetensors: must hold .*16777216, 8.*got .*7, 8"),
        ("rows", 6, "shard-00001.safetensors: must hold .*6, 8.*got .*7, 8|index: rows must be .* to 11"),
        ("sha256", "0" * 64, "shard-00001.safetensors: must have SHA-256 0{64} by manifest.json, got [0-9a-f]{64}"),
        ("sha256", "0" * 63, "sha256 must be 64 hexadecimal digits"),
        ("sha256", None, "sha256 must be 64 hexadecimal digits"),
    ],
)
def test_manifests_whose_shards_are_wrong(folder: Path, key: str, value: Any, match: str) -> None:
    rewrite(folder, lambda values: values["shards"][1].update({key: value}))
    refused(folder, match)


@pytest.mark.parametrize("rows", [0, -1, 13, 10**30, 1.0, True, None])
def test_manifests_whose_index_is_wrong(folder: Path, rows: Any) -> None:
    rewrite(folder, lambda values: values["index"].update(rows=rows))
    refused(folder, "index: rows must be an integer from 1 to 12")


def test_a_manifest_that_is_gone(folder: Path) -> None:
    cache = open_cache(folder)
    (folder / "manifest.json").unlink()
    refused(folder, "manifest.json: must stand beside shard-0000[01].safetensors, got no such file")
    with pytest.raises(EmbeddingCacheError, match="must stand beside"):
        cache.encode(["text 99"], encode)
    assert len(list(folder.glob("shard-*"))) == 2


def test_a_folder_that_another_cache_took(folder: Path) -> None:
    cache = open_cache(folder)
    for path in folder.iterdir():
        path.unlink()
    with pytest.raises(EmbeddingCacheError, match="must list what this cache was opened with, got another list"):
        cache.refresh()
    open_cache(folder).encode(TEXTS[:3], encode)
    with pytest.raises(EmbeddingCacheError, match="must list what this cache was opened with, got another list"):
        cache.encode(["text 99"], encode)
    intact(folder, 3)


@pytest.mark.parametrize("searched", [False, True])
def test_a_folder_that_is_gone(folder: Path, searched: bool) -> None:
    cache = open_cache(folder)
    if searched:
        check_search(cache)
    shutil.rmtree(folder)
    gone = "cache: must be the folder that this cache is in, got none: it is gone"
    keys = [content_key(f"new {n}") for n in range(5)]
    for call in (
        *(cache.refresh, cache.update_index),
        lambda: cache.search(torch.ones(1, D), 1),
        lambda: cache.add(keys, torch.ones(5, D)),
    ):
        with pytest.raises(EmbeddingCacheError, match=gone):
            call()
    assert not folder.exists()


# Shards.


def respell(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Rewrite the second shard, with a checksum that is right."""
    path = folder / "shard-00001.safetensors"
    tensors = {name: x.clone() for name, x in load_file(path).items()}
    change(tensors)
    path.unlink()
    save_file(tensors, path)
    rewrite(folder, lambda v: v["shards"][1].update(sha256=hashlib.sha256(path.read_bytes()).hexdigest()))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.update(embeddings=t["embeddings"][:6].clone()), "must hold .*7, 8.*got .*6, 8"),
        (lambda t: t.update(keys=t["keys"][:6].clone()), "must hold .*7, 32.*got .*6, 32"),
        (lambda t: t.update(embeddings=t["embeddings"].view(-1)), r"must hold .*7, 8.*got .*\[56\]"),
        (lambda t: t.update(embeddings=t["embeddings"].half()), "must hold .*F32.*got .*F16"),
        (lambda t: t.update(keys=t["keys"].view(torch.int8)), "must hold .*U8.*got .*I8"),
        (lambda t: t.update(more=torch.ones(2)), "must hold .*got .*more"),
        (lambda t: t.pop("keys"), "must hold .*keys"),
        (lambda t: t["embeddings"][3, 2].fill_(torch.nan), "embeddings must be finite, got NaN or inf"),
        (lambda t: t["embeddings"][6, 7].fill_(torch.inf), "embeddings must be finite, got NaN or inf"),
    ],
)
def test_shards_that_are_wrong(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any], match: str) -> None:
    respell(folder, change)
    refused(folder, f"shard-00001.safetensors: {match}")


def test_shards_that_share_a_key(folder: Path) -> None:
    first = load_file(folder / "shard-00000.safetensors")["keys"].clone()
    respell(folder, lambda tensors: tensors["keys"][6].copy_(first[0]))
    refused(folder, "must hold every key once, got one twice in its shards")
    respell(folder, lambda tensors: tensors["keys"][6].copy_(tensors["keys"][0]))
    refused(folder, "must hold every key once", verify=False)


def test_a_new_shard_that_shares_a_key(folder: Path, tmp_path: Path) -> None:
    older = shutil.copytree(folder, tmp_path / "older")
    rewrite(older, lambda values: values.update(shards=values["shards"][:1], index=None))
    cache = open_cache(older)
    first = load_file(folder / "shard-00000.safetensors")["keys"].clone()
    respell(folder, lambda tensors: tensors["keys"][6].copy_(first[0]))
    shutil.copytree(folder, older, dirs_exist_ok=True)
    with pytest.raises(EmbeddingCacheError, match="must hold every key once"):
        cache.refresh()
    assert len(cache) == 5


@pytest.mark.parametrize("verify", [True, False])
def test_a_shard_cut_short_anywhere(folder: Path, verify: bool) -> None:
    path = folder / "shard-00000.safetensors"
    data = path.read_bytes()
    for length in [*range(0, len(data), 7), len(data) - 1]:
        path.write_bytes(data[:length])
        refused(folder, "shard-00000.safetensors: must be a whole safetensors file, got an error", verify=verify)
    path.write_bytes(data + b"\0")
    refused(folder, "shard-00000.safetensors: must be a whole safetensors file, got an error", verify=verify)
    path.unlink()
    path.mkdir()
    refused(folder, "shard-00000.safetensors: must be there by manifest.json, got no such file", verify=verify)


@pytest.mark.parametrize("name", ["shard-00000.safetensors", "manifest.json"])
def test_any_byte_changed(folder: Path, name: str) -> None:
    """An error that is the cache's, or (a space in the manifest) nothing."""
    path = folder / name
    data, random_ = path.read_bytes(), random.Random(0)
    refusals = 0
    for place in random_.sample(range(len(data)), 100):
        changed = bytearray(data)
        changed[place] ^= 1 << random_.randrange(8)
        path.write_bytes(changed)
        try:
            cache = open_cache(folder)
        except EmbeddingCacheError:
            refusals += 1
        else:
            assert name == "manifest.json"
            assert torch.equal(cache.read(), encode(TEXTS))
    assert refusals == 100 if name != "manifest.json" else refusals > 50


# The index.


def bytes_of(index: Any) -> bytes:
    return faiss.serialize_index(index).tobytes()


def flat(rows: int, dim: int, kind: str = "IndexFlatIP") -> Any:
    index = getattr(faiss, kind)(dim)
    index.add(torch.ones(rows, dim).numpy())
    return index


def header(kind: bytes, dim: int, rows: int, floats: int) -> bytes:
    return struct.pack("<4sIqqqBiQ", kind, dim, rows, 1 << 20, 1 << 20, 1, 0, floats)


def cut(data: bytes) -> bytes:
    return data[:-4]


def flipped(data: bytes) -> bytes:
    at = 45 + 4 * 3 + 1  # in the fraction of a number: another exponent could make inner products infinite
    return data[:at] + bytes([data[at] ^ 64]) + data[at + 1 :]


BAD_INDEXES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "cut": cut,
    "longer": lambda data: data + b"\0",
    "flipped": flipped,
    "fewer rows": lambda data: bytes_of(flat(11, D)),
    "another d": lambda data: bytes_of(flat(6, 2 * D)),
    "L2": lambda data: bytes_of(flat(12, D, "IndexFlatL2")),
    "HNSW": lambda data: bytes_of(faiss.index_factory(D, "HNSW4", faiss.METRIC_INNER_PRODUCT)),
    "pickle": lambda data: b"cos\nsystem\n(S'false'\ntR." + data,
    "more rows than bytes": lambda data: header(b"IxFI", D, 2**40, 2**40 * D) + data[45:],
    "more floats than bytes": lambda data: header(b"IxFI", D, 12, 2**50) + data[45:],
    "more floats than there are rows": lambda data: header(b"IxFI", D, 12, 12 * D - 1) + data[45:],
    "negative rows": lambda data: header(b"IxFI", D, -12, 12 * D) + data[45:],
}


@pytest.mark.parametrize("kind", BAD_INDEXES)
@pytest.mark.parametrize("signed", [False, True])
def test_indexes_that_are_wrong(folder: Path, kind: str, signed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Built again, with a warning; also if the checksum is that of the damaged file, or is not compared."""
    path = folder / INDEX
    data = BAD_INDEXES[kind](path.read_bytes())
    path.write_bytes(data)
    if signed:
        rewrite(folder, lambda values: values["index"].update(sha256=hashlib.sha256(data).hexdigest()))
    cache = open_cache(folder, verify=not signed or kind == "flipped")
    if signed and kind == "flipped":
        cache.search(torch.randn(1, D), 1)  # a valid IndexFlatIP, whose checksum was changed too
        return
    with monkeypatch.context() as patch:
        patch.setattr(faiss, "read_index", None)  # FAISS must not read such a file
        with pytest.warns(
            RuntimeWarning, match=r"index-00012.faiss: must .* got .*; it is built again from the shards"
        ):
            check_search(cache)
    intact(folder)


def test_an_index_that_is_gone(folder: Path) -> None:
    (folder / INDEX).unlink()
    with pytest.warns(RuntimeWarning, match="index-00012.faiss: must be an index, got an error: .*; it is built again"):
        check_search(open_cache(folder))
    intact(folder)


def test_an_index_that_is_a_folder(folder: Path) -> None:
    (folder / INDEX).unlink()
    (folder / INDEX).mkdir()
    cache = open_cache(folder)
    with pytest.warns(RuntimeWarning) as warned:
        check_search(cache)
    assert [str(w.message).split(":")[0].split("/")[-1] for w in warned] == [
        INDEX,
        "the index is kept in memory alone",
    ]


def test_an_index_saved_by_another_meanwhile(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No damage: the manifest that was read is older than the file."""
    cache, other = open_cache(folder), open_cache(folder)
    load = embeddings_index.load_index

    def late(*arguments: Any) -> Any:
        if len(other) == 12:
            other.encode([f"text {n}" for n in range(20)], encode)
            other.update_index()
        return load(*arguments)

    monkeypatch.setattr(embeddings_index, "load_index", late)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_search(cache)
    assert len(cache) == 20


def test_indexes_that_no_manifest_names(folder: Path) -> None:
    """Deleted with the next that is saved, and nothing else is."""
    stale = [folder / f"index-{name}.faiss" for name in ("00011", "00013", "123456")]
    others = [folder / name for name in ("index-00013.faiss.mine", "index.faiss", "my-index-00013.faiss")]
    for path in (*stale, *others):
        path.write_bytes(b"x")
    cache = open_cache(folder)
    cache.encode([f"text {n}" for n in range(14)], encode)
    cache.update_index()
    assert sorted(folder.glob("*index*")) == sorted([*others, folder / "index-00014.faiss"])
    intact(folder, 14)


def test_an_index_of_more_rows_is_kept(folder: Path) -> None:
    cache, other = open_cache(folder), open_cache(folder)
    check_search(cache)
    other.encode([f"text {n}" for n in range(20)], encode)
    other.update_index()
    cache.update_index()
    assert json.loads((folder / "manifest.json").read_text())["index"]["rows"] == 20
    intact(folder, 20)
