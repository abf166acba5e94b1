"""An embedding cache of two shards and an index whose files tests damage, and what must hold of an intact one."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mmkernels.models.embeddings import EmbeddingCache

D = 8
INDEX = "index-00012.faiss"
TEXTS = [f"text {n}" for n in range(12)]


def encode(texts: list[str]) -> torch.Tensor:
    return torch.stack([torch.randn(D, generator=torch.Generator().manual_seed(int(text[5:]))) for text in texts])


def open_cache(folder: Path, **options: Any) -> EmbeddingCache:
    return EmbeddingCache(folder, "model-a", normalize=False, **options)


def make(folder: Path) -> Path:
    """A cache of two shards and an index."""
    cache = open_cache(folder)
    cache.encode(TEXTS[:5], encode)
    cache.encode(TEXTS[5:], encode)
    cache.update_index()
    return folder


def intact(folder: Path, count: int = 12) -> EmbeddingCache:
    """The first `count` texts are there, and can be searched, without a warning about the index."""
    cache = open_cache(folder)
    assert torch.equal(cache.read(), encode([f"text {n}" for n in range(count)]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_search(cache)
    return cache


def check_search(cache: EmbeddingCache) -> None:
    query = torch.randn(4, D)
    found = cache.search(query, 3)
    expected = (query @ cache.read().T).topk(3)
    assert torch.equal(found.rows, expected.indices)
    torch.testing.assert_close(found.scores, expected.values)


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "manifest.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
