"""`CrossAttention`: multi-head attention of one sequence to another, over `mmkernels.cross_attention`."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from mmkernels.masks import SpanMask
from mmkernels.nn.checks import check_dropout, check_features, check_positive
from mmkernels.nn.linear_layer import linear
from mmkernels.ops.attention.cross_attention import cross_attention

KeyValue = tuple[Tensor, Tensor]
"""Projected key and value, each ``[B or 1, Hkv, Lk, D]``."""


class CrossAttention(nn.Module):
    """Multi-head attention of ``x`` to a context, or to ``x`` if no context is given.

    The keys and values of a context can be computed once with `project` and used by many calls; `VisualCache` does this
    for images.

    Args:
        dim: width of the input and of the output.
        context_dim: width of the context; None: `dim`.
        num_heads: query heads.
        num_kv_heads: key and value heads (grouped-query attention), a divisor of `num_heads`; None: `num_heads`.
        head_dim: width of a head; None: ``dim / num_heads``.
        bias: whether the projections of query, key and value add a bias.
        out_bias: whether the last projection adds one; None: as `bias`.
        dropout: the chance that an attention probability is dropped, in training mode.
        qk_norm: makes the norm of each head of query and key from the head's width, as ``nn.RMSNorm`` does; None: no
            norm.

    Raises:
        ValueError: a size is not positive or does not divide; in `forward`, an input has the wrong shape.

    Source: Vaswani et al., "Attention Is All You Need", 2017, section 3.2.2; norms of query and key by Henry et al.,
    "Query-Key Normalization for Transformers", 2020.

    Example:
        >>> import torch
        >>> from mmkernels.nn import CrossAttention
        >>> attention = CrossAttention(64, context_dim=32, num_heads=4)
        >>> text, image = torch.randn(2, 5, 64), torch.randn(2, 9, 32)
        >>> attention(text, image).shape
        torch.Size([2, 5, 64])
        >>> key_value = attention.project(image)  # once
        >>> torch.equal(attention(text, key_value=key_value), attention(text, image))
        True
    """

    def __init__(
        self,
        dim: int,
        context_dim: int | None = None,
        num_heads: int = 8,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = False,
        out_bias: bool | None = None,
        dropout: float = 0.0,
        qk_norm: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.context_dim = dim if context_dim is None else context_dim
        self.num_heads = num_heads
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        for name in ("dim", "context_dim", "num_heads", "num_kv_heads"):
            check_positive(name, getattr(self, name))
        if head_dim is None and dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads = {num_heads} where head_dim is None, got {dim}")
        self.head_dim = dim // num_heads if head_dim is None else head_dim
        check_positive("head_dim", self.head_dim)
        if num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads must divide num_heads = {num_heads}, got {self.num_kv_heads}")
        check_dropout(dropout)
        self.dropout = dropout
        inner, kv_inner = num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(dim, inner, bias=bias)
        self.k_proj = nn.Linear(self.context_dim, kv_inner, bias=bias)
        self.v_proj = nn.Linear(self.context_dim, kv_inner, bias=bias)
        self.out_proj = nn.Linear(inner, dim, bias=bias if out_bias is None else out_bias)
        self.q_norm = qk_norm(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm = qk_norm(self.head_dim) if qk_norm else nn.Identity()

    def project(self, context: Tensor) -> KeyValue:
        """Returns key and value ``[B, Hkv, Lk, D]`` of a context ``[B, Lk, context_dim]``, its norm applied."""
        check_features("context", context, self.context_dim)
        key = self.k_norm(linear(self.k_proj, context).unflatten(-1, (self.num_kv_heads, self.head_dim)))
        value = linear(self.v_proj, context).unflatten(-1, (self.num_kv_heads, self.head_dim))
        return key.transpose(1, 2), value.transpose(1, 2)

    def query(self, x: Tensor) -> Tensor:
        """Returns the query ``[B, Hq, Lq, D]`` of ``x [B, Lq, dim]``, with its norm applied."""
        check_features("x", x, self.dim)
        return self.q_norm(linear(self.q_proj, x).unflatten(-1, (self.num_heads, self.head_dim))).transpose(1, 2)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: SpanMask | Tensor | None = None,
        *,
        bias: Tensor | None = None,
        gate: Tensor | None = None,
    ) -> Tensor:
        """Returns ``[B, Lq, dim]`` of projected query, key and value: the rest of `forward` after the projections."""
        dropout_p = self.dropout if self.training else 0.0
        out = cross_attention(query, key, value, mask, bias=bias, gate=gate, dropout_p=dropout_p)
        return linear(self.out_proj, out.transpose(1, 2).flatten(2))

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        key_value: KeyValue | None = None,
        mask: SpanMask | Tensor | None = None,
        bias: Tensor | None = None,
        gate: Tensor | None = None,
    ) -> Tensor:
        """Returns ``[B, Lq, dim]``, in the dtype of `x`, or under autocast in the autocast dtype.

        Args:
            x: ``[B, Lq, dim]``.
            context: ``[B or 1, Lk, context_dim]``; a batch of 1 is shared by all of ``x``, without a copy. None, with
                no `key_value`: ``x``.
            key_value: the result of `project` for the context; then no `context` is given.
            mask, bias, gate: as in `mmkernels.cross_attention`.
        """
        if key_value is not None and context is not None:
            raise ValueError("give context or key_value, not both")
        key, value = key_value if key_value is not None else self.project(x if context is None else context)
        return self.attend(self.query(x), key, value, mask, bias=bias, gate=gate)
