"""Layers that ``kernels.kernelize`` puts into models: each lends its `forward` to a layer of the model.

As the Hub requires, a layer has no constructor, no state and no method but `forward`: weights are the model's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmkernels.integrations.hub.attention import flash_attn_forward

__all__ = ["CLIPAttention", "RMSNorm"]


class CLIPAttention(nn.Module):
    """The attention of CLIP's towers, and of others that are written as it is (SigLIP, SigLIP 2, MetaCLIP 2).

    For ``kernels.replace_kernel_forward_from_hub(transformers' CLIPAttention, "CLIPAttention")``.
    """

    can_torch_compile: bool = True

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    out_proj: nn.Module
    num_heads: int
    scale: float
    dropout: float

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Returns ``[B, L, C]``, and None: the weights are not there.

        Args:
            hidden_states: ``[B, L, C]``.
            attention_mask: broadcastable to ``[B, H, L, L]``, bool or numbers that are added to the scores; or None.
            kwargs: as transformers passes them on; see `flash_attn_forward`.
        """
        query, key, value = (
            project(hidden_states).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        dropout = self.dropout if self.training else 0.0
        out, _ = flash_attn_forward(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scale, **kwargs
        )
        return self.out_proj(out.flatten(2)), None


class RMSNorm(nn.Module):
    """Root mean square normalisation as in Llama and Qwen: transformers' slot "RMSNorm".

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.
    """

    can_torch_compile: bool = True

    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Returns ``weight * x / sqrt(mean(x^2) + eps)`` of each row of ``[..., C]``, computed in float32."""
        wide = hidden_states.float()
        normed = torch.nn.functional.rms_norm(wide, wide.shape[-1:], eps=self.variance_epsilon)
        return self.weight * normed.to(hidden_states.dtype)
