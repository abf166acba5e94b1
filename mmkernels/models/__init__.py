"""Whole models, one file per system, built on the modules and ops."""

from mmkernels.models.blip import BLIP
from mmkernels.models.blip2 import BLIP2
from mmkernels.models.blip2_config import BLIP2Config, BLIP2RetrievalConfig
from mmkernels.models.blip2_retrieval import BLIP2Retrieval
from mmkernels.models.blip_config import BLIPConfig
from mmkernels.models.blip_pretraining import BLIPPretraining
from mmkernels.models.blocks.audio import AudioError, LogMel, cut_sound, log_mel, read_audio, resample
from mmkernels.models.blocks.context import ContextCache, ContextPolicy
from mmkernels.models.blocks.visual import Visual
from mmkernels.models.clip import CLIP
from mmkernels.models.clip_config import CLIPConfig
from mmkernels.models.deepseek_vl import DeepSeekVL
from mmkernels.models.deepseek_vl2 import DeepSeekVL2
from mmkernels.models.deepseek_vl2_config import DeepSeekVL2Config
from mmkernels.models.deepseek_vl2_tiles import TiledImages, cut_images
from mmkernels.models.deepseek_vl_config import DeepSeekVLConfig
from mmkernels.models.embeddings import EmbeddingCache, EmbeddingCacheError, SearchResult, content_key, fingerprint
from mmkernels.models.flamingo import Flamingo
from mmkernels.models.flamingo_config import FlamingoConfig
from mmkernels.models.internvl import InternVL
from mmkernels.models.internvl_config import InternVLConfig
from mmkernels.models.janus import Janus
from mmkernels.models.janus_config import JanusConfig
from mmkernels.models.lxmert import LXMERT
from mmkernels.models.lxmert_config import LXMERTConfig
from mmkernels.models.qwen_audio import QwenAudio
from mmkernels.models.qwen_audio_config import QwenAudioConfig
from mmkernels.models.qwen_vl import QwenVL
from mmkernels.models.qwen_vl_config import QwenVLConfig
from mmkernels.models.vilbert import ViLBERT
from mmkernels.models.vilbert_config import ViLBERTConfig
from mmkernels.models.whisper import Whisper
from mmkernels.models.whisper_config import WhisperConfig
from mmkernels.models.whisper_tokens import WhisperTokens

__all__ = [
    "BLIP",
    "BLIP2",
    "CLIP",
    "LXMERT",
    "AudioError",
    "BLIP2Config",
    "BLIP2Retrieval",
    "BLIP2RetrievalConfig",
    "BLIPConfig",
    "BLIPPretraining",
    "CLIPConfig",
    "ContextCache",
    "ContextPolicy",
    "DeepSeekVL",
    "DeepSeekVL2",
    "DeepSeekVL2Config",
    "DeepSeekVLConfig",
    "EmbeddingCache",
    "EmbeddingCacheError",
    "Flamingo",
    "FlamingoConfig",
    "InternVL",
    "InternVLConfig",
    "Janus",
    "JanusConfig",
    "LXMERTConfig",
    "LogMel",
    "QwenAudio",
    "QwenAudioConfig",
    "QwenVL",
    "QwenVLConfig",
    "SearchResult",
    "TiledImages",
    "ViLBERT",
    "ViLBERTConfig",
    "Visual",
    "Whisper",
    "WhisperConfig",
    "WhisperTokens",
    "content_key",
    "cut_images",
    "cut_sound",
    "fingerprint",
    "log_mel",
    "read_audio",
    "resample",
]
