"""The embedding cache: nothing is encoded twice, what is stored is read, and search is exact."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from embedding_caches import TEXTS, D, Encoder, files, filled, open_cache, units
from torch import Tensor

from mmkernels.models import embeddings_store
from mmkernels.models.embeddings import content_key

# Encoding and reading.


def test_a_second_run_encodes_nothing(tmp_path: Path) -> None:
    first = Encoder()
    rows = open_cache(tmp_path).encode(TEXTS, first, batch_size=4)
    assert rows.tolist() == list(range(10)) and rows.dtype == torch.int64
    assert first.batches == [TEXTS[:4], TEXTS[4:8], TEXTS[8:]]
    versions = files(tmp_path, "_versions")

    second, cache = Encoder(), open_cache(tmp_path)
    assert cache.encode(TEXTS[::-1], second).tolist() == list(range(10))[::-1]
    assert second.batches == []
    assert files(tmp_path, "_versions") == versions
    torch.testing.assert_close(cache.read(), units(TEXTS), rtol=0, atol=1e-7)
    assert len(cache) == 10 and cache.dim == D and cache.dtype == torch.float32 and "10 rows of 16" in repr(cache)


def test_only_what_is_new_is_encoded_and_once(tmp_path: Path) -> None:
    cache, encoder = filled(tmp_path, TEXTS[:3]), Encoder()
    texts = ["text 5", "text 1", "text 5", "text 7", "text 0", "text 7"]
    assert cache.encode(iter(texts), encoder, batch_size=2).tolist() == [3, 1, 3, 4, 0, 4]
    assert encoder.encoded == ["text 5", "text 7"]
    assert [len(cache.read(torch.tensor(rows).long())) for rows in ([], [4], [4, 0, 4])] == [0, 1, 3]
    torch.testing.assert_close(cache.read(torch.tensor([3, 1, 3])), units(["text 5", "text 1", "text 5"]))


def test_rows_and_keys(tmp_path: Path) -> None:
    texts = [f"text {n}" for n in range(17)]
    cache, encoder = filled(tmp_path, texts[:5]), Encoder()
    cache.encode(texts[5:14], encoder, batch_size=2)
    cache.add([content_key(text) for text in texts[14:]], torch.stack([encoder.row(text) for text in texts[14:]]))
    for again in (cache, open_cache(tmp_path)):
        order = torch.randperm(17)
        torch.testing.assert_close(again.read(order), units(texts)[order])
        assert again.keys_of(order) == [content_key(texts[row]) for row in order]
        assert again.keys_of() == [content_key(text) for text in texts]
        assert torch.equal(again.rows_of(again.keys_of(order)), order)


def test_what_is_read_is_a_copy(tmp_path: Path) -> None:
    cache = filled(tmp_path)
    for _ in range(2):
        cache.read().zero_()
        cache.read(torch.arange(10)).zero_()
        torch.testing.assert_close(cache.read(), units(TEXTS))
        cache.search(units(TEXTS), 1)  # now the rows are in memory


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


def test_defaults_of_pytorch(tmp_path: Path) -> None:
    """A default dtype or device, as they are set while a model is loaded, changes no row."""
    query, cache = units(["text 3"]), open_cache(tmp_path)
    expected = units(TEXTS)
    for dtype in (torch.bfloat16, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            rows = cache.add([content_key(text) for text in TEXTS], expected)
            with torch.device("meta"):
                assert torch.equal(cache.read(rows), cache.read())
                scores, found, _ = cache.search(query, 2)
                assert found[0, 0] == 3 and scores.dtype == torch.float32
        finally:
            torch.set_default_dtype(torch.float32)
        torch.testing.assert_close(cache.read(), expected)


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
        cache.create_index()


# Searching.


def test_search_is_exact(tmp_path: Path) -> None:
    texts = [f"text {n}" for n in range(200)]
    cache, query = filled(tmp_path, texts), torch.randn(30, D) * 5
    scores, rows, keys = cache.search(query, 7)
    expected = (F.normalize(query) @ units(texts).T).topk(7)
    assert rows.dtype == torch.int64 and torch.equal(rows, expected.indices)
    torch.testing.assert_close(scores, expected.values, rtol=0, atol=1e-6)
    assert keys == [[content_key(texts[row]) for row in line] for line in rows.tolist()]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(cache.search(query, 7).scores, scores)
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


def test_equal_scores_at_the_end(tmp_path: Path) -> None:
    """Of rows that equal the last one found, the first ones come, also from other blocks."""
    rows = torch.ones(50, D)
    rows[20] = 2.0
    for limit in (2**30, 1):
        cache = open_cache(tmp_path, normalize=False, memory_limit=limit)
        cache.add([content_key(str(n)) for n in range(50)], rows)
        assert cache.search(torch.ones(2, D), 4).rows.tolist() == [[20, 0, 1, 2]] * 2


def test_more_rows_than_fit_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are read for each search, with the same results."""
    monkeypatch.setattr(embeddings_store, "_TAKE_BYTES", 4 * D * 7)
    texts = [f"text {n}" for n in range(60)]
    cache, query = filled(tmp_path, texts), torch.randn(5, D)
    small = open_cache(tmp_path, memory_limit=1)
    scores, rows, keys = small.search(query, 9)
    expected = (F.normalize(query) @ units(texts).T).topk(9)
    torch.testing.assert_close(scores, expected.values, rtol=0, atol=1e-6)
    assert torch.equal(rows, expected.indices) and keys == cache.search(query, 9).keys
    assert torch.equal(small.ranks(query, torch.arange(5)), cache.ranks(query, torch.arange(5)))
    assert small._memory._held == 0


def test_what_is_appended_is_found(tmp_path: Path) -> None:
    texts, query = [f"text {n}" for n in range(100)], torch.randn(3, D)
    cache = open_cache(tmp_path)
    for count in (64, 70, 100):
        cache.encode(texts[:count], Encoder())
        expected = (F.normalize(query) @ units(texts[:count]).T).topk(5)
        assert torch.equal(cache.search(query, 5).rows, expected.indices)
        torch.testing.assert_close(cache.read(), units(texts[:count]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_approximate_search(tmp_path: Path, dtype: torch.dtype) -> None:
    """Its recall of the exact one's rows, by the number of partitions that are searched; its scores are exact."""
    rows, query = torch.randn(2000, D), torch.randn(100, D)  # without clusters, which an index finds easily
    cache = open_cache(tmp_path, dtype=dtype)
    cache.add([content_key(str(n)) for n in range(2000)], rows)
    cache.create_index(num_partitions=32)
    exact, recall = cache.search(query, 10), list[float]()
    for probes in (1, 8, 32):
        found = cache.search(query, 10, approximate=True, probes=probes)
        hits = (found.rows[:, :, None] == exact.rows[:, None]).any(dim=1)
        recall.append(hits.float().mean().item())
        torch.testing.assert_close(found.scores[:, 0][hits[:, 0]], exact.scores[:, 0][hits[:, 0]])
    assert 0.1 < recall[0] < recall[1] - 0.1 and recall[1] > 0.6 and recall[2] > 0.999
    cache.add([content_key("new")], query[:1])
    assert cache.search(query[:1], 1, approximate=True, probes=1).rows.tolist() == [[2000]]  # newer than the index


def test_an_approximate_search_that_finds_too_few(tmp_path: Path) -> None:
    cache = open_cache(tmp_path)
    cache.add([content_key(str(n)) for n in range(300)], torch.randn(300, D))
    cache.create_index(num_partitions=30)
    scores, rows, keys = cache.search(torch.randn(1, D), 300, approximate=True, probes=1)
    count = int((rows >= 0).sum())
    assert 0 < count < 300 and keys[0][count:] == [""] * (300 - count) and scores[0, count:].eq(-torch.inf).all()
    assert len(set(rows[0, :count].tolist())) == count and scores[0, :count].isfinite().all()


def test_indexes_that_cannot_be_made(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"must be of a float32 or float16 cache, got torch.bfloat16"):
        filled(tmp_path / "half", dtype=torch.bfloat16).create_index()
    with pytest.raises(ValueError, match=r"kind must be one of IvfFlat, .*, got 'NONE'"):
        filled(tmp_path).create_index("NONE")


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


def test_no_lancedb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lancedb", None)
    with pytest.raises(ImportError, match=r'needs lancedb: pip install "mmkernels\[retrieval\]"'):
        open_cache(tmp_path)


def test_models_without_optional_packages() -> None:
    script = """
import sys
for name in ("transformers", "safetensors", "lancedb", "pyarrow", "PIL"):
    sys.modules[name] = None
from mmkernels.models import CLIP, EmbeddingCache, Flamingo
CLIP.from_size("tiny"), Flamingo.from_size("tiny")
"""
    subprocess.run([sys.executable, "-c", script], check=True)
