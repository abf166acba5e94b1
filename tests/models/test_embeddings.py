"""The embedding cache: nothing is encoded twice, nothing is lost, and search is exact."""

from __future__ import annotations

import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from embedding_caches import TEXTS, D, Encoder, filled, manifest, open_cache, units
from torch import Tensor

from mmkernels.models import embeddings_store
from mmkernels.models.embeddings import EmbeddingCache, content_key

# Encoding and reading.


def test_a_second_run_encodes_nothing(tmp_path: Path) -> None:
    first = Encoder()
    rows = open_cache(tmp_path).encode(TEXTS, first, batch_size=4)
    assert rows.tolist() == list(range(10)) and rows.dtype == torch.int64
    assert first.batches == [TEXTS[:4], TEXTS[4:8], TEXTS[8:]]
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}

    second, cache = Encoder(), open_cache(tmp_path)
    assert cache.encode(TEXTS[::-1], second).tolist() == list(range(10))[::-1]
    assert second.batches == []
    assert files == {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    torch.testing.assert_close(cache.read(), units(TEXTS), rtol=0, atol=1e-7)
    assert len(cache) == 10 and cache.dim == D and cache.dtype == torch.float32 and "10 rows of 16" in repr(cache)


def test_only_what_is_new_is_encoded_and_once(tmp_path: Path) -> None:
    cache, encoder = filled(tmp_path, TEXTS[:3]), Encoder()
    texts = ["text 5", "text 1", "text 5", "text 7", "text 0", "text 7"]
    assert cache.encode(iter(texts), encoder, batch_size=2).tolist() == [3, 1, 3, 4, 0, 4]
    assert encoder.encoded == ["text 5", "text 7"]
    assert [len(cache.read(torch.tensor(rows).long())) for rows in ([], [4], [4, 0, 4])] == [0, 1, 3]
    torch.testing.assert_close(cache.read(torch.tensor([3, 1, 3])), units(["text 5", "text 1", "text 5"]))
    assert len(manifest(cache)["shards"]) == 2


def test_rows_of_many_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings_store, "_SHARD_BYTES", 3 * (4 * D + 32))
    texts = [f"text {n}" for n in range(17)]
    cache = filled(tmp_path, texts[:5])
    encoder = Encoder()
    cache.encode(texts[5:14], encoder, batch_size=2)
    cache.add([content_key(text) for text in texts[14:]], torch.stack([encoder.row(text) for text in texts[14:]]))
    assert [shard["rows"] for shard in manifest(cache)["shards"]] == [5, 4, 4, 1, 3]
    for again in (cache, open_cache(tmp_path)):
        order = torch.randperm(17)
        assert torch.equal(again.read(), torch.cat([again.read(row[None]) for row in torch.arange(17)]))
        torch.testing.assert_close(again.read(order), units(texts)[order])
        assert again.keys_of(order) == [content_key(texts[row]) for row in order]
        assert torch.equal(again.rows_of(again.keys_of(order)), order)


def test_what_is_read_is_a_copy(tmp_path: Path) -> None:
    cache = filled(tmp_path)
    cache.read().zero_()
    cache.read(torch.arange(10)).zero_()
    torch.testing.assert_close(cache.read(), units(TEXTS))
    assert open_cache(tmp_path).read().norm() > 3


def test_reading_maps_the_files(tmp_path: Path) -> None:
    """A cache that is opened, and read a few rows of, takes no memory for the others."""

    def anonymous() -> float:  # MiB that are not pages of a file
        return next(int(x.split()[1]) for x in Path("/proc/self/status").open() if x.startswith("RssAnon")) / 1024

    cache = open_cache(tmp_path, normalize=False)
    cache.add([content_key(str(n)) for n in range(4096)], torch.randn(4096, 4096))  # 64 MiB
    before = anonymous()
    again = open_cache(tmp_path)
    assert again.read(torch.tensor([0, 3000, 4095])).shape == (3, 4096)
    assert anonymous() - before < 16
    whole = again.read()
    assert whole.shape == (4096, 4096) and 60 < anonymous() - before < 80


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("normalize", [True, False])
def test_stored_dtypes(tmp_path: Path, dtype: torch.dtype, normalize: bool) -> None:
    x = torch.randn(5, D, dtype=torch.float64) * 7
    cache = open_cache(tmp_path, dtype=dtype, normalize=normalize)
    cache.add([content_key(text) for text in TEXTS[:5]], x)
    again = open_cache(tmp_path)
    assert again.dtype == dtype and again.normalize == normalize
    expected = (F.normalize(x) if normalize else x).to(dtype)
    assert torch.equal(again.read(), expected)
    found = again.search(F.normalize(expected.float()), 1)
    assert found.rows[:, 0].tolist() == list(range(5)) or not normalize
    torch.testing.assert_close(again.ranks(expected, torch.arange(5)), truth_ranks(expected, expected, normalize))


def truth_ranks(query: Tensor, gallery: Tensor, normalize: bool) -> Tensor:
    query = F.normalize(query.double()).float() if normalize else query.float()
    order = (query @ gallery.float().T).sort(dim=1, descending=True, stable=True).indices
    return (order == torch.arange(len(query))[:, None]).nonzero()[:, 1]


def test_extreme_lengths_are_normalized(tmp_path: Path) -> None:
    """Squares that overflow, or vanish, in float32."""
    cache = open_cache(tmp_path)
    cache.add([content_key("large"), content_key("small")], torch.tensor([[3e30, 4e30], [3e-30, 4e-30]]))
    torch.testing.assert_close(cache.read(), torch.tensor([[0.6, 0.8], [0.6, 0.8]]))


def test_what_was_encoded_before_an_error_is_kept(tmp_path: Path) -> None:
    encoder = Encoder()

    def fails(items: list[Any]) -> Tensor:
        if "text 5" in items:
            raise KeyboardInterrupt
        return encoder(items)

    cache = open_cache(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        cache.encode(TEXTS, fails, batch_size=2)
    assert len(cache) == len(open_cache(tmp_path)) == 4
    encoder = Encoder()
    cache.encode(TEXTS, encoder, batch_size=2)
    assert encoder.encoded == TEXTS[4:]


def test_an_item_that_fails_keeps_what_came_before(tmp_path: Path) -> None:
    def items() -> Iterator[Any]:
        yield from TEXTS[:3]
        raise RuntimeError("a file that can't be read")

    cache = open_cache(tmp_path)
    with pytest.raises(RuntimeError, match="can't be read"):
        cache.encode(items(), Encoder(), batch_size=2)
    assert len(cache) == 2  # the third was in no whole batch


def test_keys_given(tmp_path: Path) -> None:
    cache, encoder = open_cache(tmp_path), Encoder()
    names = [content_key(f"id {n}") for n in range(3)]
    assert cache.encode([["any"], ["thing"], ["else"]], lambda items: torch.eye(3), keys=names).tolist() == [0, 1, 2]
    assert names[1] in cache and content_key("any") not in cache
    for keys, got in ((names[:2], "fewer"), ([*names, names[0]], "more")):
        with pytest.raises(ValueError, match=f"keys must be as many as items, got {got}"):
            cache.encode(["a", "b", "c"], encoder, keys=keys)
    assert encoder.batches == []
    with pytest.raises(ValueError, match=r"keys must be 64 hexadecimal digits each, .* got 'id 1'"):
        cache.encode(["a"], encoder, keys=["id 1"])
    with pytest.raises(TypeError, match=r"keys must be texts, .* got bytes"):
        cache.encode(["a"], encoder, keys=[b"1"])  # type: ignore[list-item]


def test_empty(tmp_path: Path) -> None:
    cache = open_cache(tmp_path)
    assert cache.encode([], Encoder()).tolist() == [] and cache.read().shape == (0, 0) and cache.dim is None
    assert cache.keys_of(torch.empty(0, dtype=torch.int64)) == [] and "empty" in repr(cache)
    assert not cache.folder.exists()  # nothing is written for nothing
    for call in (lambda: cache.search(torch.ones(1, D), 1), lambda: cache.ranks(torch.ones(1, D), ["a"])):
        with pytest.raises(ValueError, match=r"cache must hold rows to be searched, got an empty one, .*cache"):
            call()
    with pytest.raises(ValueError, match="cache must hold rows"):
        cache.update_index()


# Searching.


def test_search_is_exact(tmp_path: Path) -> None:
    texts = [f"text {n}" for n in range(200)]
    cache, query = filled(tmp_path, texts), torch.randn(30, D) * 5
    scores, rows, keys = cache.search(query, 7)
    expected = (F.normalize(query) @ units(texts).T).topk(7)
    assert rows.dtype == torch.int64 and torch.equal(rows, expected.indices)
    torch.testing.assert_close(scores, expected.values, rtol=0, atol=1e-6)
    assert keys == [[content_key(texts[row]) for row in line] for line in rows.tolist()]
    again = open_cache(tmp_path).search(query.double(), 7)
    assert torch.equal(again.rows, rows) and torch.equal(again.scores, scores)
    none = cache.search(query[:0], 7)
    assert none.scores.shape == none.rows.shape == (0, 7) and none.keys == []


def test_more_than_there_are(tmp_path: Path) -> None:
    scores, rows, keys = filled(tmp_path).search(torch.randn(2, D), 10**9)
    assert scores.shape == rows.shape == (2, 10) and [len(line) for line in keys] == [10, 10]
    assert rows.sort().values.tolist() == [list(range(10))] * 2


def test_equal_scores_come_by_row(tmp_path: Path) -> None:
    cache = open_cache(tmp_path)
    cache.add([content_key(text) for text in TEXTS], torch.ones(10, D))
    assert cache.search(torch.ones(1, D), 10).rows.tolist() == [list(range(10))]
    assert cache.ranks(torch.ones(10, D), torch.arange(10)).tolist() == list(range(10))


def test_the_index_grows_by_what_was_appended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmkernels.models import embeddings_index

    extended: list[int] = []
    extend = embeddings_index.extend_index

    def noted(index: Any, rows: int, blocks: Iterator[Tensor]) -> None:
        parts = list(blocks)
        extended.append(sum(len(part) for part in parts))
        extend(index, rows, parts)

    monkeypatch.setattr(embeddings_index, "extend_index", noted)
    texts = [f"text {n}" for n in range(100)]
    query = torch.randn(3, D)

    def check(cache: EmbeddingCache, count: int) -> None:
        expected = (F.normalize(query) @ units(texts[:count]).T).topk(5)
        assert torch.equal(cache.search(query, 5).rows, expected.indices)

    cache = filled(tmp_path, texts[:64])
    check(cache, 64)
    assert extended == [64] and manifest(cache)["index"]["rows"] == 64
    cache.encode(texts[:70], Encoder())  # fewer than an eighth: kept in memory
    check(cache, 70)
    assert extended == [64, 6] and manifest(cache)["index"]["rows"] == 64
    again = open_cache(tmp_path)  # what the saved one lacks is added
    check(again, 70)
    assert extended == [64, 6, 6]
    again.encode(texts[:72], Encoder())
    check(again, 72)
    assert extended == [64, 6, 6, 2] and manifest(cache)["index"]["rows"] == 72
    again.encode(texts[:73], Encoder())
    again.update_index()
    assert manifest(cache)["index"]["rows"] == 73
    cache.refresh()
    check(cache, 73)
    cache.update_index()
    assert manifest(cache)["index"]["rows"] == 73
    check(open_cache(tmp_path), 73)
    assert extended == [64, 6, 6, 2, 1, 3]


def test_ranks(tmp_path: Path) -> None:
    texts = [f"text {n}" for n in range(60)]
    cache, query = filled(tmp_path, texts[:40]), torch.randn(60, D) + units(texts) * 2
    cache.encode(texts, Encoder())
    expected = truth_ranks(query, units(texts), True)
    order = torch.randperm(60)
    assert torch.equal(cache.ranks(query, torch.arange(60)), expected)
    assert torch.equal(cache.ranks(query[order], [content_key(texts[n]) for n in order]), expected[order])
    cache.search(query[:1], 1)  # now the index holds the rows
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(cache.ranks(query, torch.arange(60), backend="reference"), expected)
    assert 5 < expected.count_nonzero() < 60
    cache.encode(["text 60"], Encoder())  # now it lacks one
    assert cache.ranks(units(["text 60"]), torch.tensor([60])).tolist() == [0]


def test_no_faiss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    cache = filled(tmp_path)
    for call in (lambda: cache.search(torch.ones(1, D), 1), cache.update_index):
        with pytest.raises(ImportError, match=r'needs faiss: pip install "mmkernels\[retrieval\]"'):
            call()
    assert cache.read().shape == (10, D)
    assert cache.ranks(units(TEXTS), torch.arange(10)).tolist() == [0] * 10


def test_no_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r'needs safetensors: pip install "mmkernels\[retrieval\]"'):
        filled(tmp_path)


def test_a_cache_of_format_1(tmp_path: Path) -> None:
    """The folder was written when the format was new: texts a, bc, then def, ghij, with an index."""
    folder = shutil.copytree(Path(__file__).parent / "data" / "embedding_cache_format_1", tmp_path / "cache")
    cache, texts = open_cache(tmp_path), ["a", "bc", "def", "ghij"]
    rows = torch.tensor([[float(len(text)), float(ord(text[0])), -1.0, 2.0] for text in texts])
    torch.testing.assert_close(cache.read(), F.normalize(rows))
    assert cache.normalize and cache.dtype == torch.float32
    encoder = Encoder(4)
    assert cache.encode(texts[::-1], encoder).tolist() == [3, 2, 1, 0] and encoder.encoded == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a damaged index would be built again, with a warning
        assert cache.search(F.normalize(rows), 1).rows[:, 0].tolist() == [0, 1, 2, 3]
    assert cache.encode(["new"], encoder).tolist() == [4]
    cache.update_index()
    assert len(open_cache(tmp_path)) == 5 and (folder / "index-00005.faiss").exists()
