"""Modules: drop-in layers, thin over the ops."""

from mmkernels.nn.cross_attention import CrossAttention
from mmkernels.nn.gated_cross_attention import GatedCrossAttention
from mmkernels.nn.resampler import PerceiverResampler
from mmkernels.nn.token_buffer import TokenBuffer
from mmkernels.nn.visual_cache import VisualCache

__all__ = ["CrossAttention", "GatedCrossAttention", "PerceiverResampler", "TokenBuffer", "VisualCache"]
