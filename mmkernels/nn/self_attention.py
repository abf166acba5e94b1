"""`SelfAttention`: multi-head attention of a sequence to itself, with one product for query, key and value."""

from __future__ import annotations

from torch import Tensor, nn

from mmkernels.masks import SpanMask
from mmkernels.nn.checks import check_dropout, check_features, check_positive
from mmkernels.ops.attention.cross_attention import cross_attention


class SelfAttention(nn.Module):
    """Multi-head attention of `x` to itself: as `CrossAttention`, but one layer projects query, key and value.

    A mask says what sees what: over the tokens of two modalities, one after the other, it makes one call of both
    directions of a co-attention (see `CoAttention`).

    Args:
        dim: width of the input and of the output.
        num_heads: attention heads.
        head_dim: width of a head; None: ``dim / num_heads``.
        bias: whether the projections add a bias.
        dropout: the chance that an attention probability is dropped, in training mode.

    Raises:
        ValueError: a size is not positive or does not divide; in `forward`, an input has the wrong shape.

    Source: Vaswani et al., "Attention Is All You Need", 2017, section 3.2.2.

    Example:
        >>> import torch
        >>> from mmkernels import SpanMask
        >>> from mmkernels.nn import SelfAttention
        >>> x = torch.randn(2, 5, 64)
        >>> SelfAttention(64, num_heads=4)(x, SpanMask.key_padding([5, 3])).shape
        torch.Size([2, 5, 64])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        head_dim: int | None = None,
        bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        for name, size in (("dim", dim), ("num_heads", num_heads)):
            check_positive(name, size)
        if head_dim is None and dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads = {num_heads} where head_dim is None, got {dim}")
        self.dim, self.num_heads = dim, num_heads
        self.head_dim = dim // num_heads if head_dim is None else head_dim
        check_positive("head_dim", self.head_dim)
        check_dropout(dropout)
        self.dropout = dropout
        inner = num_heads * self.head_dim
        self.qkv_proj = nn.Linear(dim, 3 * inner, bias=bias)
        self.out_proj = nn.Linear(inner, dim, bias=bias)

    def project(self, x: Tensor) -> Tensor:
        """Returns query, key and value side by side, ``[B, L, 3 H D]``, of ``x [B, L, dim]``."""
        check_features("x", x, self.dim)
        return self.qkv_proj(x)

    def attend(self, projected: Tensor, mask: SpanMask | Tensor | None = None) -> Tensor:
        """Returns ``[B, L, H D]`` of what `project` returned, before the last projection."""
        query, key, value = projected.unflatten(-1, (3, self.num_heads, self.head_dim)).transpose(1, 3).unbind(2)
        out = cross_attention(query, key, value, mask, dropout_p=self.dropout if self.training else 0.0)
        return out.transpose(1, 2).flatten(2)

    def forward(self, x: Tensor, mask: SpanMask | Tensor | None = None) -> Tensor:
        """Returns ``[B, L, dim]``, in the dtype of `x`, or under autocast in the autocast dtype.

        Args:
            x: ``[B, L, dim]``.
            mask: which tokens each token sees, as in `mmkernels.cross_attention`; None: all.
        """
        return self.out_proj(self.attend(self.project(x), mask))
