"""`AttentionPool`: learned queries attend to all tokens of an image."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from mmkernels.masks import SpanMask
from mmkernels.nn.checks import check_positive, check_width
from mmkernels.nn.cross_attention import CrossAttention
from mmkernels.ops.tokens.inputs import check_integers
from mmkernels.runtime.checks import can_look, check_range, check_tensor


class AttentionPool(nn.Module):
    """A fixed number of features of each image: learned queries attend to its tokens.

    With `mlp`, a feed-forward follows after a layer norm, with a residual: then one query is SigLIP's head. With
    `pre_norm` many queries are CoCa's attentional pooler.

    Args:
        dim: width of the queries and of the result.
        num_queries: learned queries, each of which gives one feature.
        num_heads: attention heads, a divisor of `dim`.
        context_dim: width of the tokens; None: `dim`.
        mlp: the width of the feed-forward; None: there is none.
        activation: makes the activation of the feed-forward.
        bias: whether the attention's projections add a bias.
        pre_norm: whether queries and tokens go through layer norms first.
        eps: of the layer norms.

    Raises:
        TypeError, ValueError: a size is not positive or does not divide; in `forward`, an input has the wrong shape, or
            lengths do not match it.

    Source: Zhai et al., "Scaling Vision Transformers", 2022, section 2.3 (multihead attention pooling); Yu et al.,
    "CoCa: Contrastive Captioners are Image-Text Foundation Models", 2022, section 3.2 (attentional poolers).

    Example:
        >>> import torch
        >>> from mmkernels.nn import AttentionPool
        >>> AttentionPool(32, num_heads=4, mlp=64)(torch.randn(3, 16, 32)).shape  # SigLIP's head
        torch.Size([3, 1, 32])
        >>> pool = AttentionPool(32, 8, num_heads=4, context_dim=24, pre_norm=True)
        >>> pool(torch.randn(300, 24), (200, 100)).shape  # two packed images
        torch.Size([2, 8, 32])
    """

    def __init__(
        self,
        dim: int,
        num_queries: int = 1,
        *,
        num_heads: int = 8,
        context_dim: int | None = None,
        mlp: int | None = None,
        activation: Callable[[], nn.Module] = nn.GELU,
        bias: bool = True,
        pre_norm: bool = False,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        check_positive("dim", dim)
        check_positive("num_queries", num_queries)
        self.attention = CrossAttention(dim, context_dim, num_heads, bias=bias)
        self.queries = nn.Parameter(torch.randn(num_queries, dim))
        self.query_norm = nn.LayerNorm(dim, eps=eps) if pre_norm else nn.Identity()
        self.context_norm = nn.LayerNorm(self.attention.context_dim, eps=eps) if pre_norm else nn.Identity()
        self.norm: nn.Module | None = None
        self.mlp: nn.Module | None = None
        if mlp is not None:
            check_positive("mlp", mlp)
            self.norm = nn.LayerNorm(dim, eps=eps)
            self.mlp = nn.Sequential(nn.Linear(dim, mlp), activation(), nn.Linear(mlp, dim))

    def forward(self, x: Tensor, lengths: Tensor | Sequence[int] | None = None) -> Tensor:
        """Returns the features ``[images, num_queries, dim]``.

        Args:
            x: ``[images, tokens, context_dim]``; or ``[tokens, context_dim]``, the images' tokens one after the other.
            lengths: integers ``[images]``. Of batched x, how many of its tokens are an image's: the rest is padding,
                which no query sees; None: all. Of packed x, the tokens of each image. On a GPU they are not read, and
                must be right. An image of 0 tokens gets what the output projection makes of zeros.
        """
        check_width(x, self.attention.context_dim)
        batched, images, mask = x.dim() == 3, x.shape[0], None
        if lengths is not None or not batched:
            lengths = _check_lengths(lengths, x)
            images, mask = lengths.shape[0], self._mask(lengths, packed=not batched).to(x.device)
        query = self.attention.query(self.query_norm(self.queries)[None])  # [1, H, Q, D], shared by all images
        query = query.expand(images, -1, -1, -1) if batched else query.repeat(1, 1, images, 1)
        key, value = self.attention.project(self.context_norm(x if batched else x[None]))
        pooled = self.attention.attend(query, key, value, mask).reshape(images, *self.queries.shape)
        if self.norm is None or self.mlp is None:
            return pooled
        fed: Tensor = self.mlp(self.norm(pooled))
        return pooled + fed

    def _mask(self, lengths: Tensor, packed: bool) -> SpanMask:
        """Returns which tokens the queries see: of packed images, those of all images one after the other."""
        if not packed:
            return SpanMask.key_padding(lengths)
        queries = len(self.queries)
        return SpanMask.packed(torch.full_like(lengths, queries), lengths, q_len=queries * lengths.shape[0])


def _check_lengths(lengths: Tensor | Sequence[int] | None, x: Tensor) -> Tensor:
    """Returns the lengths as a tensor ``[images]``; raises where they don't match x, if that can be seen."""
    if lengths is None:
        raise ValueError(f"lengths must be given for packed x, got x of shape {tuple(x.shape)} without them")
    if not isinstance(lengths, Tensor):
        lengths = torch.tensor(check_integers("lengths", lengths, "the tokens of each image", 0), dtype=torch.int64)
    check_tensor("lengths", lengths)
    if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise TypeError(f"lengths must be integers, the tokens of each image, got {lengths.dtype}")
    if x.dim() == 3:
        if lengths.shape != x.shape[:1]:
            raise ValueError(f"lengths must be [{x.shape[0]}] beside x, got shape {tuple(lengths.shape)}")
        check_range("lengths", lengths, 0, x.shape[1])
        return lengths
    if lengths.dim() != 1:
        raise ValueError(f"lengths must be [images], got shape {tuple(lengths.shape)}")
    check_range("lengths", lengths, 0)
    if lengths.is_cpu and can_look(lengths) and int(lengths.sum()) != x.shape[0]:
        got = f"{int(lengths.sum())} in {len(lengths)} images"
        raise ValueError(f"lengths must match x's {x.shape[0]} tokens, got {got}")
    return lengths
