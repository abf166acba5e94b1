"""`GatedCrossAttention`: Flamingo's block, which lets a frozen language model see."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from mmkernels.masks import SpanMask
from mmkernels.nn.checks import check_positive
from mmkernels.nn.cross_attention import CrossAttention, KeyValue


class GatedCrossAttention(nn.Module):
    """``x + tanh(a) * attention(x, media)``, then ``x + tanh(b) * feed_forward(x)``, each after a norm.

    The gates a and b start at 0, so that a block put between the layers of a trained language model changes nothing at
    first.

    Args:
        dim: width of the text.
        context_dim: width of the visual tokens; None: `dim`.
        num_heads, num_kv_heads, head_dim, qk_norm: as in `CrossAttention`. Its projections have no bias, so that a
            token that sees no image gets exactly 0 from the attention.
        norm: makes the two norms from `dim`.
        feed_forward: the feed-forward module, ``[..., dim]`` to ``[..., dim]``, without its norm; None: two linear maps
            with GELU between, four times as wide.
        gate: "scalar": one number a gate, as in the paper; "vector": one a channel. A scalar gate of the attention is
            passed on to the op; a vector's is applied after the output projection, where it doesn't commute with it.
        gate_init: first value of every gate.
        dropout: of attention probabilities and of both branches' results, in training mode.

    Raises:
        ValueError: sizes that don't divide, an unknown `gate`; in `forward`, an input of the wrong shape.

    Source: Alayrac et al., "Flamingo: a Visual Language Model for Few-Shot Learning", 2022, section 2.2, figure 4.

    Example:
        >>> import torch
        >>> from mmkernels import SpanMask
        >>> from mmkernels.nn import GatedCrossAttention
        >>> block = GatedCrossAttention(64, context_dim=32, num_heads=4)
        >>> text, images = torch.randn(2, 5, 64), torch.randn(2, 12, 32)  # 3 images of 4 tokens
        >>> sees = torch.tensor([[-1, 0, 0, 1, 1], [0, 0, 1, 1, 2]])  # which image each token sees; -1: none
        >>> block(text, images, mask=SpanMask.media(sees, tokens_per_media=4)).shape
        torch.Size([2, 5, 64])
    """

    def __init__(
        self,
        dim: int,
        context_dim: int | None = None,
        num_heads: int = 8,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        qk_norm: Callable[[int], nn.Module] | None = None,
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
        feed_forward: nn.Module | None = None,
        gate: Literal["scalar", "vector"] = "scalar",
        gate_init: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_positive("dim", dim)
        if gate not in ("scalar", "vector"):
            raise ValueError(f'gate must be "scalar" or "vector", got {gate!r}')
        self.attention = CrossAttention(
            dim,
            context_dim,
            num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            dropout=dropout,
            qk_norm=qk_norm,
        )
        self.attention_norm = norm(dim)
        self.feed_forward = feed_forward or nn.Sequential(
            nn.Linear(dim, 4 * dim, bias=False), nn.GELU(), nn.Linear(4 * dim, dim, bias=False)
        )
        self.feed_forward_norm = norm(dim)
        shape = () if gate == "scalar" else (dim,)
        self.attention_gate = nn.Parameter(torch.full(shape, gate_init))
        self.feed_forward_gate = nn.Parameter(torch.full(shape, gate_init))
        self.dropout = nn.Dropout(dropout)

    def project(self, context: Tensor) -> KeyValue:
        """Key and value ``[B, Hkv, Lk, D]`` of visual tokens ``[B, Lk, context_dim]``, to be given as `key_value`."""
        return self.attention.project(context)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        key_value: KeyValue | None = None,
        mask: SpanMask | Tensor | None = None,
    ) -> Tensor:
        """The text ``[B, L, dim]`` after seeing the images.

        Args:
            x: text, ``[B, L, dim]``.
            context: visual tokens, ``[B or 1, Lk, context_dim]``; or
            key_value: what `project` made of them. Neither: there is no image, so only the feed-forward is left.
            mask: which visual tokens each text token sees, as in `mmkernels.cross_attention`; None: all.
        """
        if context is not None or key_value is not None:
            scalar = self.attention_gate.dim() == 0
            seen = self.attention(
                self.attention_norm(x),
                context,
                key_value=key_value,
                mask=mask,
                gate=self.attention_gate if scalar else None,
            )
            x = x + self.dropout(seen if scalar else seen * self.attention_gate.tanh())
        return x + self.feed_forward_gate.tanh() * self.dropout(self.feed_forward(self.feed_forward_norm(x)))
