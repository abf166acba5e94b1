"""Whole models, one file per system, built on the modules and ops."""

from mmkernels.models.clip import CLIP
from mmkernels.models.clip_config import CLIPConfig
from mmkernels.models.embeddings import EmbeddingCache, EmbeddingCacheError, SearchResult, content_key, fingerprint
from mmkernels.models.flamingo import Flamingo
from mmkernels.models.flamingo_config import FlamingoConfig

__all__ = [
    "CLIP",
    "CLIPConfig",
    "EmbeddingCache",
    "EmbeddingCacheError",
    "Flamingo",
    "FlamingoConfig",
    "SearchResult",
    "content_key",
    "fingerprint",
]
