"""Embedding caches in a temporary folder, and what their encoder makes of a text."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels.models.embeddings import EmbeddingCache, content_key

D = 16
TEXTS = [f"text {n}" for n in range(10)]


class Encoder:
    """Encodes any item as fixed random numbers, and records what it was given."""

    def __init__(self, dim: int = D) -> None:
        self.dim, self.batches = dim, list[list[Any]]()

    def __call__(self, items: list[Any]) -> Tensor:
        assert not torch.is_grad_enabled()
        self.batches.append(items)
        return torch.stack([self.row(item) for item in items])

    def row(self, item: Any) -> Tensor:
        return torch.randn(self.dim, generator=torch.Generator().manual_seed(zlib.crc32(content_key(item).encode())))

    @property
    def encoded(self) -> list[Any]:
        return [item for batch in self.batches for item in batch]


def open_cache(folder: Path, **options: Any) -> EmbeddingCache:
    return EmbeddingCache(folder / "cache", "model-a", **options)


def filled(folder: Path, texts: list[str] = TEXTS, **options: Any) -> EmbeddingCache:
    cache = open_cache(folder, **options)
    cache.encode(texts, Encoder())
    return cache


def units(texts: list[str]) -> Tensor:
    return F.normalize(torch.stack([Encoder().row(text) for text in texts]).double()).float()


def intact(folder: Path, texts: list[str]) -> None:
    """The cache holds these texts, each once and as it was encoded, and the next append works."""
    cache = open_cache(folder)
    keys = [content_key(text) for text in texts]
    assert len(cache) == len(texts) and all(key in cache for key in keys)
    torch.testing.assert_close(cache.read(cache.rows_of(keys)), units(texts))
    with_next = len(cache.encode(["the next"], Encoder()))
    assert with_next == 1 and len(open_cache(folder)) == len({*texts, "the next"})


def files(folder: Path, kind: str) -> list[Path]:
    """The files of a cache: its "data", or "_versions", the newest first."""
    found = (folder / "cache" / "embeddings.lance" / kind).iterdir()
    return sorted(path for path in found if path.suffix in (".lance", ".manifest"))
