"""Modules: drop-in layers and losses, thin over the ops."""

from mmkernels.nn.attention_pool import AttentionPool
from mmkernels.nn.bi_attention import BiAttention
from mmkernels.nn.cached_contrastive import CachedContrastive
from mmkernels.nn.co_attention import CoAttention, co_attention_mask
from mmkernels.nn.contrastive import ClipLoss, SigLipLoss
from mmkernels.nn.cross_attention import CrossAttention
from mmkernels.nn.cross_entropy import CrossEntropyOutput, LinearCrossEntropyLoss
from mmkernels.nn.experts import Experts, TopKRouter
from mmkernels.nn.feature_queue import FeatureQueue
from mmkernels.nn.gated_cross_attention import GatedCrossAttention
from mmkernels.nn.late_interaction import LateInteractionLoss
from mmkernels.nn.latent_attention import LatentAttention, LatentSizes
from mmkernels.nn.post_norm import PostNormAttention, PostNormMLP
from mmkernels.nn.projectors import PatchMerger, PixelShuffleProjector
from mmkernels.nn.qformer import QFormer, QFormerOutput
from mmkernels.nn.reducer import Reduced, TokenReducer
from mmkernels.nn.resampler import PerceiverResampler
from mmkernels.nn.self_attention import SelfAttention
from mmkernels.nn.token_buffer import TokenBuffer
from mmkernels.nn.visual_cache import VisualCache

__all__ = [
    "AttentionPool",
    "BiAttention",
    "CachedContrastive",
    "ClipLoss",
    "CoAttention",
    "CrossAttention",
    "CrossEntropyOutput",
    "Experts",
    "FeatureQueue",
    "GatedCrossAttention",
    "LateInteractionLoss",
    "LatentAttention",
    "LatentSizes",
    "LinearCrossEntropyLoss",
    "PatchMerger",
    "PerceiverResampler",
    "PixelShuffleProjector",
    "PostNormAttention",
    "PostNormMLP",
    "QFormer",
    "QFormerOutput",
    "Reduced",
    "SelfAttention",
    "SigLipLoss",
    "TokenBuffer",
    "TokenReducer",
    "TopKRouter",
    "VisualCache",
    "co_attention_mask",
]
