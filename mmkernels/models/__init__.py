"""Whole models, one file per system, built on the modules and ops."""

from mmkernels.models.blip import BLIP
from mmkernels.models.blip2 import BLIP2
from mmkernels.models.blip2_config import BLIP2Config, BLIP2RetrievalConfig
from mmkernels.models.blip2_retrieval import BLIP2Retrieval
from mmkernels.models.blip_config import BLIPConfig
from mmkernels.models.blip_pretraining import BLIPPretraining
from mmkernels.models.blocks.context import ContextCache, ContextPolicy
from mmkernels.models.blocks.visual import Visual
from mmkernels.models.clip import CLIP
from mmkernels.models.clip_config import CLIPConfig
from mmkernels.models.embeddings import EmbeddingCache, EmbeddingCacheError, SearchResult, content_key, fingerprint
from mmkernels.models.flamingo import Flamingo
from mmkernels.models.flamingo_config import FlamingoConfig
from mmkernels.models.internvl import InternVL
from mmkernels.models.internvl_config import InternVLConfig
from mmkernels.models.qwen_vl import QwenVL
from mmkernels.models.qwen_vl_config import QwenVLConfig

__all__ = [
    "BLIP",
    "BLIP2",
    "CLIP",
    "BLIP2Config",
    "BLIP2Retrieval",
    "BLIP2RetrievalConfig",
    "BLIPConfig",
    "BLIPPretraining",
    "CLIPConfig",
    "ContextCache",
    "ContextPolicy",
    "EmbeddingCache",
    "EmbeddingCacheError",
    "Flamingo",
    "FlamingoConfig",
    "InternVL",
    "InternVLConfig",
    "QwenVL",
    "QwenVLConfig",
    "SearchResult",
    "Visual",
    "content_key",
    "fingerprint",
]
