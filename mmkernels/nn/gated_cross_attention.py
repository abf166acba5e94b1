"""`GatedCrossAttention`: the block of Flamingo through which a frozen language model attends to images."""

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

    The gates a and b are initialised to 0: a block that is inserted into a trained language model changes nothing
    before it is trained.

    Args:
        dim: width of the text.
        context_dim: width of the visual tokens; None: `dim`.
        num_heads, num_kv_heads, head_dim, qk_norm: as in `CrossAttention`. Its projections have no bias, so that a
            token that sees no image gets exactly 0 from the attention.
        norm: makes the two norms from `dim`.
        feed_forward: the feed-forward module, ``[..., dim]`` to ``[..., dim]``, without its norm; None: two linear
            layers with GELU between them, four times as wide.
        gate: "scalar": one number a gate, as in the paper; "vector": one number a channel. The op applies a scalar gate
            of the attention. A vector gate is applied after the output projection, with which it does not commute.
        gate_init: the initial value of every gate.
        dropout: the probability that an attention probability, or an element of the results of both branches, is
            dropped in training mode.

    Raises:
        ValueError: a size does not divide, or `gate` is unknown; in `forward`, an input has the wrong shape.

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
        """Returns key and value ``[B, Hkv, Lk, D]`` of visual tokens ``[B, Lk, context_dim]``, for `key_value`."""
        return self.attention.project(context)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        key_value: KeyValue | None = None,
        mask: SpanMask | Tensor | None = None,
    ) -> Tensor:
        """Returns the text ``[B, L, dim]`` after it has attended to the images.

        Args:
            x: text, ``[B, L, dim]``.
            context: visual tokens, ``[B or 1, Lk, context_dim]``; or
            key_value: the result of `project` for them. Neither: there is no image, and only the feed-forward is
                applied.
            mask: which visual tokens each text token sees, as in `mmkernels.cross_attention`; None: all.
        """
        if context is not None or key_value is not None:
            scalar = self.attention_gate.dim() == 0
            attended = self.attention(
                self.attention_norm(x),
                context,
                key_value=key_value,
                mask=mask,
                gate=self.attention_gate if scalar else None,
            )
            x = x + self.dropout(attended if scalar else attended * self.attention_gate.tanh())
        return x + self.feed_forward_gate.tanh() * self.dropout(self.feed_forward(self.feed_forward_norm(x)))
