"""Embedding caches in a temporary folder, and what their encoder makes of a text."""

from __future__ import annotations

import json
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


def manifest(cache: EmbeddingCache) -> dict[str, Any]:
    return json.loads((cache.folder / "manifest.json").read_text())
