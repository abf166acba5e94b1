"""Blocks of a Llama-style language model: rotary self-attention with a KV cache, and SwiGLU."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from mmkernels.masks import SpanMask
from mmkernels.models.blocks.activations import ACTIVATIONS
from mmkernels.models.blocks.gated import gated_down
from mmkernels.models.blocks.kv_cache import KVCache
from mmkernels.nn import CrossAttention
from mmkernels.nn.linear_layer import linear
from mmkernels.runtime.checks import can_look, check_range


class SwiGLU(nn.Module):
    """``down(act(gate(x)) * up(x))``. Source: Shazeer, "GLU Variants Improve Transformer", 2020, eq. 6."""

    def __init__(self, dim: int, hidden: int, activation: str = "silu") -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden, bias=False)
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)
        self.activation = ACTIVATIONS[activation]()

    def forward(self, x: Tensor) -> Tensor:
        return gated_down(linear(self.gate_proj, x), linear(self.up_proj, x), self.activation, self.down_proj)


def rotary_angles(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns cosine and sine ``[B, 1, L, head_dim / 2]`` of positions ``[B, L]``, computed in float32.

    Source: Su et al., "RoFormer", 2021, section 3.4.2.
    """
    power = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    angles = positions[:, None, :, None].float() * (1.0 / theta**power)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Rotates each pair of channels (i, i + D/2) of ``x [B, H, L, D]`` by its angle."""
    cos, sin = angles
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def check_ids(input_ids: Tensor) -> None:
    """Raises unless tokens are integers ``[B, L]``."""
    if not isinstance(input_ids, Tensor):
        raise TypeError(f"input_ids must be integers [B, L], got {type(input_ids).__name__}")
    if input_ids.dim() != 2 or input_ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"input_ids must be integers [B, L], got {input_ids.dtype} {tuple(input_ids.shape)}")


def check_tokens(
    input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor | None, vocab_size: int, cache: KVCache
) -> tuple[Tensor, bool]:
    """Checks new tokens ``[B, L]``; returns which are valid, bool ``[B, L]``, and whether any may be padding."""
    check_ids(input_ids)
    for name, x in (("attention_mask", attention_mask), ("labels", labels)):
        if x is not None and x.shape != input_ids.shape:
            raise ValueError(f"{name} must be {list(input_ids.shape)} as input_ids, got shape {tuple(x.shape)}")
    if cache.batch_size not in (None, input_ids.shape[0]):
        raise ValueError(f"input_ids must be for kv_cache's batch {cache.batch_size}, got {input_ids.shape[0]}")
    check_range("input_ids", input_ids, 0, vocab_size - 1)
    if labels is not None:
        if labels.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"labels must be integers, got {labels.dtype}")
        check_range("labels other than -100", labels.masked_fill(labels == -100, 0), 0, vocab_size - 1)
    if attention_mask is None:
        return torch.ones_like(input_ids, dtype=torch.bool), False
    valid = attention_mask.bool()
    return valid, valid.device.type != "cpu" or not can_look(valid) or not bool(valid.all())


class TextBlock(nn.Module):
    """Causal self-attention, then SwiGLU, each after an RMS norm and with a residual.

    Args:
        dim, heads, mlp: the width, the number of heads, and the width of the feed-forward.
        kv_heads: the number of key and value heads; None: `heads`.
        head_dim: the width of a head; None: ``dim / heads``.
        bias: whether the projections of query, key and value add a bias.
        qk_norm: whether each head of query and key has an RMS norm.
        activation: of the feed-forward, a name in `ACTIVATIONS`.
        eps: of the norms.
        dropout: the probability that an attention probability is dropped in training mode.
        residual_dropout: the probability that an element of the results of both branches is; None: `dropout`.

    Source: Touvron et al., "LLaMA: Open and Efficient Foundation Language Models", 2023, section 2.2.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        mlp: int,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = False,
        qk_norm: bool = False,
        activation: str = "silu",
        eps: float = 1e-6,
        dropout: float = 0.0,
        residual_dropout: float | None = None,
    ) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(dim, eps=eps)
        self.attention = CrossAttention(
            dim,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            bias=bias,
            out_bias=False,
            dropout=dropout,
            qk_norm=partial(nn.RMSNorm, eps=eps) if qk_norm else None,
        )
        self.mlp_norm = nn.RMSNorm(dim, eps=eps)
        self.mlp = SwiGLU(dim, mlp, activation)
        self.dropout = nn.Dropout(dropout if residual_dropout is None else residual_dropout)

    def forward(
        self,
        x: Tensor,
        angles: tuple[Tensor, Tensor],
        mask: SpanMask,
        cache: KVCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        """Returns ``[B, L, dim]`` after the block.

        Args:
            x: ``[B, L, dim]``.
            angles: `rotary_angles` of the tokens' positions.
            mask: of the L queries over all keys, those in the cache first.
            cache: holds the earlier keys and values of this layer; the new ones are appended.
            layer: the number of this layer in `cache`.
        """
        normed = self.attention_norm(x)
        key, value = self.attention.project(normed)
        key = rotate(key, angles)
        if cache is not None:
            key, value = cache.append(layer, key, value)
        attended = self.attention.attend(rotate(self.attention.query(normed), angles), key, value, mask)
        x = x + self.dropout(attended)
        return x + self.dropout(self.mlp(self.mlp_norm(x)))
