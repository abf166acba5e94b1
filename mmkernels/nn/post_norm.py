"""BERT's layer in parts: attention and feed-forward, each with a residual and a layer norm behind it."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from mmkernels.masks import SpanMask
from mmkernels.nn.checks import check_dropout, check_positive
from mmkernels.nn.cross_attention import CrossAttention, KeyValue


class PostNormAttention(nn.Module):
    """``norm(x + attention(x))``, of `x` to itself or to a context.

    Args:
        dim: width of the input and of the output.
        context_dim: width of the context; None: `dim`.
        num_heads: attention heads, a divisor of `dim`.
        eps: of the layer norm.
        dropout: the chance that an attention probability is dropped, in training mode.
        residual_dropout: the chance that an element of the attention's result is dropped, in training mode.

    Source: Devlin et al., "BERT", 2019, section 3; Vaswani et al., "Attention Is All You Need", 2017, section 3.1.

    Example:
        >>> import torch
        >>> attention = PostNormAttention(32, 48, num_heads=4)
        >>> text, image = torch.randn(2, 5, 32), torch.randn(2, 9, 48)
        >>> attention(text, key_value=attention.project(image)).shape
        torch.Size([2, 5, 32])
    """

    def __init__(
        self,
        dim: int,
        context_dim: int | None = None,
        *,
        num_heads: int,
        eps: float = 1e-12,
        dropout: float = 0.0,
        residual_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_dropout(residual_dropout)
        self.attention = CrossAttention(dim, context_dim, num_heads, bias=True, dropout=dropout)
        self.norm = nn.LayerNorm(dim, eps=eps)
        self.dropout = nn.Dropout(residual_dropout)

    def project(self, context: Tensor) -> KeyValue:
        """Returns key and value ``[B, H, Lk, D]`` of a context ``[B, Lk, context_dim]``."""
        return self.attention.project(context)

    def forward(self, x: Tensor, *, key_value: KeyValue | None = None, mask: SpanMask | Tensor | None = None) -> Tensor:
        """Returns ``[B, L, dim]``.

        Args:
            x: ``[B, L, dim]``.
            key_value: what `project` returned for the context, of batch B or 1; None: `x` is the context.
            mask: as in `mmkernels.cross_attention`.
        """
        return self.norm(x + self.dropout(self.attention(x, key_value=key_value, mask=mask)))


class PostNormMLP(nn.Module):
    """``norm(x + W2 act(W1 x))``.

    Args:
        dim, hidden: the width, and that between the two layers.
        activation: makes what stands between them.
        eps: of the layer norm.
        residual_dropout: the chance that an element of the result before the residual is dropped, in training mode.

    Source: Devlin et al., "BERT", 2019, section 3.

    Example:
        >>> import torch
        >>> PostNormMLP(32, 64)(torch.randn(2, 5, 32)).shape
        torch.Size([2, 5, 32])
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        *,
        activation: Callable[[], nn.Module] = nn.GELU,
        eps: float = 1e-12,
        residual_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_positive("dim", dim)
        check_positive("hidden", hidden)
        check_dropout(residual_dropout)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), activation(), nn.Linear(hidden, dim))
        self.norm = nn.LayerNorm(dim, eps=eps)
        self.dropout = nn.Dropout(residual_dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Returns ``[..., dim]`` of ``x [..., dim]``."""
        return self.norm(x + self.dropout(self.mlp(x)))
