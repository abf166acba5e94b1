"""Fused, memory-linear ops for multimodal models, as a kernel of the Hugging Face Hub.

The functions are those of the package mmkernels, with the same arguments and results; `layers` replace the forward
methods of models' layers, and `flash_attn_forward` is what transformers calls for ``attn_implementation``.
"""

from mmkernels.integrations.hub import layers
from mmkernels.integrations.hub.attention import flash_attn_forward, supports_flash_attn
from mmkernels.masks import SpanMask
from mmkernels.ops.attention.attention_received import attention_received
from mmkernels.ops.attention.attention_weights import attention_weights
from mmkernels.ops.attention.co_attention import co_attention
from mmkernels.ops.attention.cross_attention import cross_attention
from mmkernels.ops.attention.merge_attention import merge_attention
from mmkernels.ops.contrastive.info_nce import ContrastiveStats, info_nce
from mmkernels.ops.contrastive.max_sim import max_sim
from mmkernels.ops.contrastive.retrieval_ranks import retrieval_ranks
from mmkernels.ops.contrastive.sigmoid_contrastive import sigmoid_contrastive
from mmkernels.ops.linear.grouped_linear import grouped_linear
from mmkernels.ops.linear.linear_cross_entropy import linear_cross_entropy
from mmkernels.ops.linear.linear_logprobs import linear_logprobs
from mmkernels.ops.tokens.frame_difference import frame_difference
from mmkernels.ops.tokens.match_tokens import match_tokens
from mmkernels.ops.tokens.merge_patches import merge_patches
from mmkernels.ops.tokens.merge_tokens import merge_tokens
from mmkernels.ops.tokens.pool_tokens import pool_tokens
from mmkernels.ops.tokens.scatter_tokens import scatter_tokens
from mmkernels.ops.tokens.select_diverse import select_diverse
from mmkernels.ops.tokens.select_tokens import Selection, select_tokens
from mmkernels.ops.tokens.token_similarity import token_similarity
from mmkernels.ops.tokens.unmerge_tokens import unmerge_tokens
from mmkernels.runtime.dispatch import BackendError, use_backend
from mmkernels.runtime.group import GroupError

__all__ = [
    "BackendError",
    "ContrastiveStats",
    "GroupError",
    "Selection",
    "SpanMask",
    "attention_received",
    "attention_weights",
    "co_attention",
    "cross_attention",
    "flash_attn_forward",
    "frame_difference",
    "grouped_linear",
    "info_nce",
    "layers",
    "linear_cross_entropy",
    "linear_logprobs",
    "match_tokens",
    "max_sim",
    "merge_attention",
    "merge_patches",
    "merge_tokens",
    "pool_tokens",
    "retrieval_ranks",
    "scatter_tokens",
    "select_diverse",
    "select_tokens",
    "sigmoid_contrastive",
    "supports_flash_attn",
    "token_similarity",
    "unmerge_tokens",
    "use_backend",
]
