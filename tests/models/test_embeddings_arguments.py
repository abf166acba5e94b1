"""Bad arguments of the embedding cache: each is a clear error, and nothing is stored."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from embedding_caches import D, Encoder, filled, open_cache

from mmkernels.models.embeddings import EmbeddingCache, content_key


@pytest.mark.parametrize(
    ("result", "error", "match"),
    [
        (torch.ones(3, D), ValueError, r"encode_fn's result must be \[2, 16\], got shape \(3, 16\)"),
        (torch.ones(2, D + 1), ValueError, r"must be \[2, 16\], got shape \(2, 17\)"),
        (torch.ones(D), ValueError, r"must be \[2, 16\], got shape \(16,\)"),
        (torch.ones(2, D, dtype=torch.int64), TypeError, "must be a tensor of floats, got torch.int64"),
        (np.ones((2, D)), TypeError, "must be a tensor of floats, got ndarray"),
        (None, TypeError, "must be a tensor of floats, got NoneType"),
        (torch.tensor([[1.0], [torch.nan]]).expand(2, D), ValueError, "must be finite .* NaN or inf in row 1"),
        (torch.tensor([[-torch.inf], [1.0]]).expand(2, D), ValueError, "must be finite .* NaN or inf in row 0"),
        (torch.tensor([[1.0], [0.0]]).expand(2, D), ValueError, "must have a length, .* zeros in row 1"),
    ],
)
def test_encoders_that_are_wrong(tmp_path: Path, result: Any, error: type[Exception], match: str) -> None:
    cache = filled(tmp_path)
    with pytest.raises(error, match=match):
        cache.encode(["new", "newer"], lambda items: result)
    assert len(cache) == len(open_cache(tmp_path)) == 10


def test_a_first_encoder_that_is_wrong(tmp_path: Path) -> None:
    widths = iter((3, 4))
    cache = open_cache(tmp_path)
    with pytest.raises(ValueError, match=r"encode_fn's result must be \[1, 3\], got shape \(1, 4\)"):
        cache.encode(["a", "b"], lambda items: torch.ones(1, next(widths)), batch_size=1)
    with pytest.raises(ValueError, match=r"must be \[1, 3\], got shape \(1, 0\)"):
        cache.encode(["c"], lambda items: torch.ones(1, 0))
    half = EmbeddingCache(tmp_path / "half", "model-a", dtype=torch.float16, normalize=False)
    with pytest.raises(ValueError, match=r"must be finite as torch.float16, got NaN or inf in row 0"):
        half.encode(["a"], lambda items: torch.full((1, 3), 1e6))


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda c: c.search(torch.ones(1, D + 1), 1), ValueError, r"query must be \[n, 16\], got shape \(1, 17\)"),
        (lambda c: c.search(torch.ones(D), 1), ValueError, r"query must be \[n, 16\], got shape \(16,\)"),
        (lambda c: c.search(torch.full((1, D), torch.nan), 1), ValueError, "query must be finite .* row 0"),
        (lambda c: c.search(torch.full((1, D), torch.inf), 1), ValueError, "query must be finite .* row 0"),
        (lambda c: c.search(torch.zeros(1, D), 1), ValueError, "query must have a length"),
        (lambda c: c.search(torch.ones(1, D, dtype=torch.int64), 1), TypeError, "query must be a tensor of floats"),
        (lambda c: c.search(np.ones((1, D)), 1), TypeError, "query must be a tensor of floats, got ndarray"),
        (lambda c: c.search(torch.ones(1, D), 0), ValueError, "k must be a positive integer, got 0"),
        (lambda c: c.search(torch.ones(1, D), 1, probes=0), ValueError, "probes must be a positive integer, got 0"),
        (lambda c: c.search(torch.ones(1, D), 1.5), ValueError, "k must be a positive integer, got 1.5"),
        (lambda c: c.ranks(torch.full((1, D), torch.nan), torch.tensor([0])), ValueError, "query must be finite"),
        (lambda c: c.ranks(torch.ones(2, D), torch.tensor([0])), ValueError, "target must be for 2 queries, got 1"),
        (lambda c: c.ranks(torch.ones(1, D), torch.tensor([10])), ValueError, "target must be from 0 to 9, got 10"),
        (lambda c: c.ranks(torch.ones(1, D), torch.tensor([1.0])), TypeError, "target must be an int64 tensor"),
        (lambda c: c.ranks(torch.ones(1, D), [content_key("x")]), ValueError, "keys must be in the cache, got .{64},"),
        (lambda c: c.read(torch.tensor([0, -1])), ValueError, "rows must be from 0 to 9, got -1 to 0"),
        (lambda c: c.read(torch.tensor([[0]])), ValueError, r"rows must be \[n\], got shape \(1, 1\)"),
        (lambda c: c.read([0]), TypeError, "rows must be an int64 tensor, got list"),
        (lambda c: c.keys_of(torch.tensor([2**40])), ValueError, "rows must be from 0 to 9"),
        (lambda c: c.rows_of(["text 0"]), ValueError, "keys must be 64 hexadecimal digits each"),
        (lambda c: "text 0" in c, ValueError, "key must be 64 hexadecimal digits each"),
        (lambda c: c.encode("text 0", Encoder()), TypeError, "items must be a list of items, got one str"),
        (lambda c: c.encode(None, Encoder()), TypeError, "items must be a list of items, got one NoneType"),
        (lambda c: c.encode(["a"], None), TypeError, "encode_fn must be a function, got NoneType"),
        (
            lambda c: c.search(torch.ones(1, D).to_sparse(), 1),
            TypeError,
            "query must be dense, .* got torch.sparse_coo",
        ),
        (lambda c: c.search(torch.ones(1, D, device="meta"), 1), TypeError, "query must be dense, .* got one on meta"),
        (lambda c: c.encode([3], Encoder()), TypeError, "item must be a text, bytes, .* got int"),
        (lambda c: c.encode(["a"], Encoder(), batch_size=0), ValueError, "batch_size must be a positive integer"),
        (lambda c: c.add([content_key("a")], torch.ones(2, D)), ValueError, r"embeddings must be \[1, 16\]"),
    ],
)
def test_bad_arguments(tmp_path: Path, call: Callable[[Any], Any], error: type[Exception], match: str) -> None:
    cache = filled(tmp_path)
    with pytest.raises(error, match=match):
        call(cache)
    assert len(open_cache(tmp_path)) == 10


def test_inner_products_that_overflow(tmp_path: Path) -> None:
    cache = filled(tmp_path, normalize=False)
    with pytest.raises(ValueError, match="query must be small enough for inner products in float32"):
        cache.search(torch.full((1, D), 3e38), 1)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"model_id": ""}, ValueError, "model_id must name the model"),
        ({"model_id": None}, TypeError, "model_id must be a str, got NoneType"),
        ({"folder": 3}, TypeError, "folder must be a str or a Path, got int"),
        ({"folder": ""}, ValueError, "folder must name a folder, got an empty str"),
        ({"folder": "file:///tmp/a"}, ValueError, "folder must be a path or the URI of an object store, got file:///"),
        ({"folder": "memory://a"}, ValueError, "folder must be a path or the URI of an object store, got memory:"),
        ({"folder": "s3://"}, ValueError, "folder must be a path or the URI of an object store, got s3://"),
        ({"folder": __file__}, ValueError, "folder must be a folder, got .* which is a file"),
        ({"dtype": torch.float64}, TypeError, "dtype must be one of torch.float32, .* got torch.float64"),
        ({"dtype": "float16"}, TypeError, "dtype must be one of torch.float32, .* got float16"),
        ({"normalize": 1}, TypeError, "normalize must be True, False or None, got 1"),
        ({"memory_limit": 0}, ValueError, "memory_limit must be a positive integer, got 0"),
        ({"storage_options": {"a": 1}}, TypeError, "storage_options must hold texts, got int for 'a'"),
        ({"verify": "no"}, TypeError, "verify must be True or False, got 'no'"),
        ({"lock_timeout": float("nan")}, ValueError, "lock_timeout must be seconds, 0 or more, got nan"),
    ],
)
def test_bad_caches(tmp_path: Path, arguments: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        EmbeddingCache(**{"folder": tmp_path / "cache", "model_id": "model-a", **arguments})
