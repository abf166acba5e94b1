"""Damaged embedding caches: nothing is read wrong, the error names what is lost, and `repair` keeps the rest."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
import torch
from embedding_caches import TEXTS, Encoder, files, filled, intact, open_cache, units

from mmkernels.models.embeddings import EmbeddingCache, EmbeddingCacheError, content_key
from mmkernels.models.embeddings_format import different_numbers


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "deleted":
        path.unlink()
    elif how == "cut":
        path.write_bytes(data[: len(data) // 2])
    else:
        middle = len(data) // 3  # in the rows
        path.write_bytes(data[:middle] + bytes([data[middle] ^ 16]) + data[middle + 1 :])


@pytest.mark.parametrize("how", ["deleted", "cut", "flipped"])
def test_damaged_data(tmp_path: Path, how: str) -> None:
    """Each data file in turn: the error names the rows that are lost, and all others are kept, with their numbers."""
    cache = open_cache(tmp_path / "made")
    for start in range(0, 40, 10):
        cache.encode([f"text {n}" for n in range(start, start + 10)], Encoder())
    lost_rows = set[int]()
    for number in range(4):
        shutil.copytree(tmp_path / "made", tmp_path / str(number))
        damage(files(tmp_path / str(number), "data")[number], how)
        with pytest.raises(
            EmbeddingCacheError, match=r"\d+ rows can't be read, rows \d.*EmbeddingCache.repair\(folder\)"
        ):
            open_cache(tmp_path / str(number)).read()
        lost, manifests = EmbeddingCache.repair(tmp_path / str(number) / "cache")
        lost_rows.update(lost.tolist())
        assert manifests == [] and len(lost) == (1 if how == "flipped" else 10)
        texts = [f"text {n}" for n in range(40) if n not in lost.tolist()]
        again = open_cache(tmp_path / str(number))
        assert again.rows_of(map(content_key, texts)).tolist() == [int(text[5:]) for text in texts]
        torch.testing.assert_close(again.read(), units(texts))
        assert torch.equal(again.search(units(texts), 1).rows[:, 0], again.rows_of(map(content_key, texts)))
        encoder = Encoder()
        again.encode([f"text {n}" for n in range(40)], encoder)
        assert encoder.encoded == [f"text {n}" for n in lost.tolist()] and len(again) == 40
        assert len(EmbeddingCache.repair(tmp_path / str(number) / "cache").rows) == 0
    assert len(lost_rows) == (4 if how == "flipped" else 40)


def test_flipped_bytes_unverified(tmp_path: Path) -> None:
    """LanceDB reads them as they are: what the checksums are for."""
    filled(tmp_path)
    damage(files(tmp_path, "data")[0], "flipped")
    assert not torch.equal(open_cache(tmp_path, verify=False).read(), units(TEXTS))
    with pytest.raises(EmbeddingCacheError, match="1 rows can't be read"):
        open_cache(tmp_path).search(units(TEXTS), 1)


@pytest.mark.parametrize("how", ["deleted", "cut", "another header"])
def test_damaged_manifests(tmp_path: Path, how: str) -> None:
    cache = filled(tmp_path, TEXTS[:5])
    cache.encode(TEXTS, Encoder())
    cache.encode(["last"], Encoder())
    newest = files(tmp_path, "_versions")[0]
    if how == "another header":
        newest.write_bytes(newest.read_bytes().replace(b"model-a", b"model-b"))
    else:
        damage(newest, how)
    with pytest.raises(
        EmbeddingCacheError, match=r"cache: can't be opened: .* EmbeddingCache.repair\(folder\) goes back"
    ):
        open_cache(tmp_path)
    lost, manifests = EmbeddingCache.repair(tmp_path / "cache")
    assert len(lost) == 0 and len(manifests) == (how != "deleted")
    intact(tmp_path, TEXTS)


def test_nothing_is_moved_where_no_manifest_is_whole(tmp_path: Path) -> None:
    filled(tmp_path)
    found = files(tmp_path, "_versions")
    for path in found:
        damage(path, "cut")
    with pytest.raises(EmbeddingCacheError, match="can't be opened"):
        EmbeddingCache.repair(tmp_path / "cache")
    assert files(tmp_path, "_versions") == found


def test_a_cache_of_format_1(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "manifest.json").write_text('{"format": 1}')
    with pytest.raises(EmbeddingCacheError, match=r"got one of format 1 .*: delete the folder .* and encode again"):
        open_cache(tmp_path)


def test_rows_of_an_open_cache(tmp_path: Path) -> None:
    """Those of other files are read."""
    cache = filled(tmp_path, TEXTS[:5])
    first = files(tmp_path, "data")
    cache.encode(TEXTS, Encoder())
    (set(files(tmp_path, "data")) - set(first)).pop().unlink()
    torch.testing.assert_close(cache.read(torch.arange(5)), units(TEXTS[:5]))
    for rows, which in (([9], "1 rows can't be read, rows 9"), ([0, 7, 8], "2 rows can't be read, rows 7 to 8")):
        with pytest.raises(EmbeddingCacheError, match=which):
            cache.read(torch.tensor(rows))


def test_manifests_with_a_wrong_entry(tmp_path: Path) -> None:
    """The manifest before leads to the rows, which get new numbers; a wrong schema is never taken."""
    filled(tmp_path, TEXTS[:5])
    first = files(tmp_path, "data")[0].name.encode()
    open_cache(tmp_path).encode(TEXTS, Encoder())
    newest = files(tmp_path, "_versions")[0]
    newest.write_bytes(newest.read_bytes().replace(first, b"x" + first[1:]))
    with pytest.raises(EmbeddingCacheError, match="5 rows can't be read, rows 0 to 4"):
        open_cache(tmp_path)
    assert [part.tolist() for part in EmbeddingCache.repair(tmp_path / "cache").rows] == []
    assert open_cache(tmp_path).rows_of(map(content_key, TEXTS)).tolist() == [10, 11, 12, 13, 14, 5, 6, 7, 8, 9]
    newest = files(tmp_path, "_versions")[0]
    newest.write_bytes(newest.read_bytes().replace(b"vector", b"vectoR"))
    with pytest.raises(EmbeddingCacheError, match="can't be opened: its columns are not those of a cache"):
        open_cache(tmp_path)
    assert EmbeddingCache.repair(tmp_path / "cache").manifests == [newest.name]


def test_numbers_that_are_given_twice() -> None:
    with pytest.raises(ValueError, match="two rows the same number"):
        different_numbers({"_rowid": pytest.importorskip("pyarrow").array([3, 4, 3])})


def test_another_caches_file(tmp_path: Path) -> None:
    """Of the same model and size: its rows are not this cache's."""
    filled(tmp_path / "a", TEXTS[:5]), filled(tmp_path / "b", TEXTS[5:])
    own = files(tmp_path / "a", "data")[0].read_bytes()
    shutil.copyfile(files(tmp_path / "b", "data")[0], files(tmp_path / "a", "data")[0])
    with pytest.raises(EmbeddingCacheError, match="5 rows can't be read, rows 0 to 4"):
        open_cache(tmp_path / "a").read()
    with pytest.raises(EmbeddingCacheError, match="a/cache: can't be repaired: none of its 5 rows can be read"):
        EmbeddingCache.repair(tmp_path / "a" / "cache")
    files(tmp_path / "a", "data")[0].write_bytes(own)  # nothing was changed
    intact(tmp_path / "a", TEXTS[:5])


def test_what_is_no_cache(tmp_path: Path) -> None:
    with pytest.raises(EmbeddingCacheError, match="cache: must hold a cache, to be repaired, got none"):
        EmbeddingCache.repair(tmp_path / "cache")
    pytest.importorskip("lancedb").connect(tmp_path / "cache").create_table("embeddings", [{"a": 1}])
    found = files(tmp_path, "_versions")
    for call in (open_cache, lambda folder: EmbeddingCache.repair(folder / "cache")):
        with pytest.raises(EmbeddingCacheError, match="can't be opened: it is a table of something else"):
            call(tmp_path)
    assert files(tmp_path, "_versions") == found


def test_random_damage(tmp_path: Path) -> None:
    """Any byte of any file: each row is right, or an error says what to do, and `repair` keeps all but one append."""
    draw, cache = random.Random(0), open_cache(tmp_path / "made")
    for start in range(0, 40, 10):
        cache.encode([f"text {n}" for n in range(start, start + 10)], Encoder())
    truth = dict(zip(cache.keys_of(), cache.read()))
    for n in range(30):
        folder = tmp_path / str(n)
        shutil.copytree(tmp_path / "made", folder)
        found = files(folder, "data") if n % 2 else files(folder, "_versions")[:1]
        path = draw.choice(found)
        data = bytearray(path.read_bytes())
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
        said = ""
        try:
            again = open_cache(folder)
            again.read()
        except EmbeddingCacheError as error:
            said = str(error)
        if said:
            assert "EmbeddingCache.repair(folder)" in said
            EmbeddingCache.repair(folder / "cache")
            again = open_cache(folder)
            assert len(again) >= 30
        else:
            assert len(again) == 40
        for key, row in zip(again.keys_of(), again.read()):
            assert torch.equal(row, truth[key])
