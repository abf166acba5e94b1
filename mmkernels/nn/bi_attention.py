"""`BiAttention`: two sequences attend to each other by one score matrix, as in GLIP and GroundingDINO."""

from __future__ import annotations

from torch import Tensor, nn

from mmkernels.masks import SpanMask
from mmkernels.nn.checks import check_dropout, check_features, check_positive
from mmkernels.ops.attention.co_attention import co_attention


class BiAttention(nn.Module):
    """Two sequences attend to each other, over `mmkernels.co_attention`: one score matrix serves both directions.

    Each score is computed once, where `CoAttention`, with a query and a key of each side, has two matrices. What a
    score is made of and the value of a side are one product.

    Args:
        dim_a: width of the first sequence, `a`, such as an image's features.
        dim_b: width of the second one, `b`, such as a text's; None: `dim_a`.
        num_heads: attention heads.
        head_dim: width of a head; None: ``dim_a / num_heads``.
        bias: whether the projections add a bias.
        dropout: the chance that an attention probability is dropped, in training mode.
        clamp: as in `mmkernels.co_attention`: how far below the largest score another one may be (50,000 in
            GroundingDINO); None: any distance.

    Raises:
        ValueError: a size is not positive or does not divide; in `forward`, an input has the wrong shape.

    Source: Li et al., "Grounded Language-Image Pre-training" (GLIP), 2022, equation 4; Liu et al., "Grounding DINO",
    2023, section 3.1.

    Example:
        >>> import torch
        >>> from mmkernels.nn import BiAttention
        >>> attention = BiAttention(64, 32, num_heads=4)
        >>> image, text = torch.randn(2, 100, 64), torch.randn(2, 9, 32)
        >>> words = torch.arange(9) < torch.tensor([[9], [4]])  # the second text has 4 words
        >>> [x.shape for x in attention(image, text, valid_b=words)]
        [torch.Size([2, 100, 64]), torch.Size([2, 9, 32])]
    """

    def __init__(
        self,
        dim_a: int,
        dim_b: int | None = None,
        num_heads: int = 8,
        *,
        head_dim: int | None = None,
        bias: bool = True,
        dropout: float = 0.0,
        clamp: float | None = None,
    ) -> None:
        super().__init__()
        self.dim_a, self.dim_b = dim_a, dim_a if dim_b is None else dim_b
        for name, size in (("dim_a", dim_a), ("dim_b", self.dim_b), ("num_heads", num_heads)):
            check_positive(name, size)
        if head_dim is None and dim_a % num_heads:
            raise ValueError(f"dim_a must be a multiple of num_heads = {num_heads} where head_dim is None, got {dim_a}")
        self.num_heads = num_heads
        self.head_dim = dim_a // num_heads if head_dim is None else head_dim
        check_positive("head_dim", self.head_dim)
        check_dropout(dropout)
        self.dropout, self.clamp = dropout, clamp
        inner = num_heads * self.head_dim
        self.a_proj, self.b_proj = (nn.Linear(dim, 2 * inner, bias=bias) for dim in (self.dim_a, self.dim_b))
        self.a_out_proj, self.b_out_proj = (nn.Linear(inner, dim, bias=bias) for dim in (self.dim_a, self.dim_b))

    def forward(
        self,
        a: Tensor,
        b: Tensor,
        *,
        valid_a: Tensor | None = None,
        valid_b: Tensor | None = None,
        mask: SpanMask | Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Returns what `a` got from `b`, ``[B, La, dim_a]``, and `b` from `a`, ``[B, Lb, dim_b]``.

        Args:
            a, b: ``[B, La, dim_a]`` and ``[B, Lb, dim_b]``.
            valid_a, valid_b: bool ``[B or 1, La]`` and ``[B or 1, Lb]``, False: padding, which the other sequence does
                not see; None: there is none.
            mask: which pairs exist, as in `mmkernels.co_attention`; None: all.
        """
        check_features("a", a, self.dim_a)
        check_features("b", b, self.dim_b)
        key_a, value_a = self._heads(self.a_proj(a))
        key_b, value_b = self._heads(self.b_proj(b))
        to_a, to_b = co_attention(
            key_a,
            key_b,
            value_a,
            value_b,
            mask,
            valid_a=valid_a,
            valid_b=valid_b,
            dropout_p=self.dropout if self.training else 0.0,
            clamp=self.clamp,
        )
        return self.a_out_proj(to_a.transpose(1, 2).flatten(2)), self.b_out_proj(to_b.transpose(1, 2).flatten(2))

    def _heads(self, projected: Tensor) -> tuple[Tensor, ...]:
        """Returns what the scores are made of, and the value, ``[B, H, L, D]`` each."""
        return projected.unflatten(-1, (2, self.num_heads, self.head_dim)).transpose(1, 3).unbind(2)
