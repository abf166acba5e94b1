"""`LatentAttention`: attention whose keys and values are compressed to one small vector a token (DeepSeek-V2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mmkernels.masks import SpanMask
from mmkernels.nn.checks import check_dropout, check_features, check_positive
from mmkernels.nn.linear_layer import is_plain
from mmkernels.ops.attention.cross_attention import cross_attention
from mmkernels.runtime.checks import check_number, check_tensor, is_traced

Angles = tuple[Tensor, Tensor]
"""Cosine and sine ``[B, 1, L, rope_dim / 2]`` of the tokens' positions."""


class LatentSizes(NamedTuple):
    """The sizes of a `LatentAttention`; the comments give DeepSeek-V2-Lite's.

    Attributes:
        heads: the number of heads (16).
        kv_rank: the width of the vector that a token's keys and values are computed from (512).
        nope_dim: the channels of a query or key head without a position (128).
        rope_dim: the channels of a query head with a rotary position, and of the one key that all heads share (64).
        value_dim: the channels of a value head (128).
        query_rank: the width that queries are computed from; None: from the token itself.
    """

    heads: int
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    query_rank: int | None = None

    @property
    def cached(self) -> int:
        """The numbers that a layer keeps of a token."""
        return self.kv_rank + self.rope_dim


class LatentAttention(nn.Module):
    """Multi-head latent attention: a token's keys and values are computed from `kv_rank` numbers, which are cached.

    The cache holds ``kv_rank + rope_dim`` numbers a token, 576 instead of the 5,120 of 16 heads at DeepSeek-V2-Lite's
    sizes. Keys and values are expanded where many queries share that work (a prompt). Where few do (a new token), they
    never exist: a head's key projection is applied to its query and its value projection to its output, so that all
    heads attend to the cached vectors as to one key head (``[B, 1, Lk, kv_rank + rope_dim]``), whose first `kv_rank`
    channels are the values too. A layer in the place of `expand_proj`, such as LoRA's, or one with hooks is always
    called: then keys and values are expanded.

    Args:
        dim: the width of the input and of the output.
        sizes: of the heads.
        bias: whether the first projections and the last one add a bias.
        eps: of the RMS norms of the compressed vectors.
        scale: of the scores; None: ``(nope_dim + rope_dim)^-0.5``. A context stretched by YaRN has a larger one.
        dropout: the chance that an attention probability is dropped, in training mode.

    Raises:
        TypeError, ValueError: a size is not positive, or `rope_dim` is odd; in `forward`, an input has the wrong shape.

    Source: DeepSeek-AI, "DeepSeek-V2", 2024, section 2.1.2 and 2.1.3, equations 9 to 19; the absorbed projections:
    section 2.1.2.

    Example:
        >>> import torch
        >>> from mmkernels.nn import LatentAttention, LatentSizes
        >>> sizes = LatentSizes(heads=4, kv_rank=32, nope_dim=16, rope_dim=8, value_dim=16)
        >>> attention = LatentAttention(64, sizes)
        >>> angles = torch.ones(1, 1, 5, 4), torch.zeros(1, 1, 5, 4)  # of position 0
        >>> attention(torch.randn(2, 5, 64), angles).shape
        torch.Size([2, 5, 64])
    """

    def __init__(
        self,
        dim: int,
        sizes: LatentSizes,
        *,
        bias: bool = False,
        eps: float = 1e-6,
        scale: float | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_positive("dim", dim)
        if not isinstance(sizes, LatentSizes):
            raise TypeError(f"sizes must be LatentSizes, got {type(sizes).__name__}")
        for name, size in zip(sizes._fields, sizes, strict=True):
            if size is not None:
                check_positive(name, size)
        if sizes.rope_dim % 2:
            raise ValueError(f"rope_dim must be even, got {sizes.rope_dim}")
        check_dropout(dropout)
        s = sizes
        self.dim, self.sizes, self.dropout = dim, sizes, dropout
        usual = (s.nope_dim + s.rope_dim) ** -0.5
        self.scale = usual if scale is None else check_number("scale", scale, "a finite number")
        of_queries = s.heads * (s.nope_dim + s.rope_dim)
        if s.query_rank is None:
            self.q_proj: nn.Module = nn.Linear(dim, of_queries, bias=False)
        else:
            self.q_proj = nn.Sequential(
                nn.Linear(dim, s.query_rank, bias=bias),
                nn.RMSNorm(s.query_rank, eps=eps),
                nn.Linear(s.query_rank, of_queries, bias=False),
            )
        self.kv_proj = nn.Linear(dim, s.cached, bias=bias)
        self.kv_norm = nn.RMSNorm(s.kv_rank, eps=eps)
        self.expand_proj = nn.Linear(s.kv_rank, s.heads * (s.nope_dim + s.value_dim), bias=False)
        self.out_proj = nn.Linear(s.heads * s.value_dim, dim, bias=bias)

    def query(self, x: Tensor, angles: Angles) -> tuple[Tensor, Tensor]:
        """Returns the heads' queries without position ``[B, H, L, nope_dim]`` and with it ``[B, H, L, rope_dim]``."""
        s = self.sizes
        query = self.q_proj(x).unflatten(-1, (s.heads, -1)).transpose(1, 2)
        nope, rope = query.split([s.nope_dim, s.rope_dim], dim=-1)
        return nope, rotate_pairs(rope, angles)

    def compress(self, x: Tensor, angles: Angles) -> Tensor:
        """Returns what is cached of tokens ``[B, L, dim]``: ``[B, 1, L, kv_rank + rope_dim]``, as one key head."""
        s = self.sizes
        latent, rope = self.kv_proj(x)[:, None].split([s.kv_rank, s.rope_dim], dim=-1)
        return torch.cat([self.kv_norm(latent), rotate_pairs(rope, angles)], dim=-1)

    def attend(self, query: tuple[Tensor, Tensor], compressed: Tensor, mask: SpanMask | Tensor | None = None) -> Tensor:
        """Returns ``[B, L, H value_dim]``, before the last projection.

        Args:
            query: what `query` returned for the L tokens.
            compressed: what `compress` returned for all tokens that can be seen.
            mask: of the L queries over these.
        """
        s = self.sizes
        absorbs = is_plain(self.expand_proj) and self._absorbs(query[0].shape[2], compressed.shape[2])
        way = self._absorbed if absorbs else self._expanded
        latent = compressed[..., : s.kv_rank]
        return way(query, latent, compressed, mask).transpose(1, 2).flatten(2)

    def forward(
        self,
        x: Tensor,
        angles: Angles,
        mask: SpanMask | Tensor | None = None,
        keep: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Returns ``[B, L, dim]``.

        Args:
            x: ``[B, L, dim]``.
            angles: cosine and sine ``[B or 1, 1, L, rope_dim / 2]`` of the tokens' positions; channels 2i and 2i + 1
                are rotated by angle i.
            mask: of the L queries over all keys, those in the cache first; None: all see all.
            keep: appends what `compress` returns to a cache, and returns all that the cache holds.
        """
        check_features("x", x, self.dim)
        self._check_angles(x, angles)
        compressed = self.compress(x, angles)
        if keep is not None:
            compressed = keep(compressed)
        return self.out_proj(self.attend(self.query(x, angles), compressed, mask))

    def _check_angles(self, x: Tensor, angles: Angles) -> None:
        shape = (x.shape[1], self.sizes.rope_dim // 2)
        for part in angles:
            check_tensor("angles", part)
            if part.dim() != 4 or part.shape[1] != 1 or tuple(part.shape[2:]) != shape:
                must = f"two tensors [B or 1, 1, {shape[0]}, {shape[1]}]"
                raise ValueError(f"angles must be {must}, got shape {tuple(part.shape)}")

    def _absorbs(self, queries: int, keys: int) -> bool:
        """Whether attending to the compressed vectors takes fewer multiplications than expanding them first."""
        if is_traced():  # the program serves any number of keys
            return isinstance(queries, int) and queries == 1
        s = self.sizes
        a_pair = s.cached + s.kv_rank, s.nope_dim + s.rope_dim + s.value_dim  # absorbed, expanded
        a_row = s.kv_rank * (s.nope_dim + s.value_dim)  # of either: a query and an output, or a key and a value
        return queries * (keys * a_pair[0] + a_row) < keys * (queries * a_pair[1] + a_row)

    def _absorbed(
        self, query: tuple[Tensor, Tensor], latent: Tensor, compressed: Tensor, mask: SpanMask | Tensor | None
    ) -> Tensor:
        nope, rope = query
        s = self.sizes
        of_key, of_value = self.expand_proj.weight.unflatten(0, (s.heads, -1)).split([s.nope_dim, s.value_dim], dim=1)
        joined = torch.cat([_by_head(nope, of_key), rope], dim=-1)  # [B, H, L, cached]
        out = cross_attention(joined, compressed, latent, mask, scale=self.scale, dropout_p=self._dropout())
        return _by_head(out, of_value.transpose(1, 2))

    def _expanded(
        self, query: tuple[Tensor, Tensor], latent: Tensor, compressed: Tensor, mask: SpanMask | Tensor | None
    ) -> Tensor:
        s = self.sizes
        expanded = self.expand_proj(latent[:, 0]).unflatten(-1, (s.heads, -1)).transpose(1, 2)  # [B, H, Lk, ...]
        nope, value = expanded.split([s.nope_dim, s.value_dim], dim=-1)
        rope = compressed[..., s.kv_rank :].expand(-1, s.heads, -1, -1)
        key = torch.cat([nope.transpose(1, 2), rope.transpose(1, 2)], dim=-1).transpose(1, 2)
        joined = torch.cat([x.transpose(1, 2) for x in query], dim=-1).transpose(1, 2)
        return cross_attention(joined, key, value, mask, scale=self.scale, dropout_p=self._dropout())

    def _dropout(self) -> float:
        return self.dropout if self.training else 0.0


def rotate_pairs(x: Tensor, angles: Angles) -> Tensor:
    """Rotates each pair of channels (2i, 2i + 1) of ``x [B, H, L, D]`` by its angle; returns x's dtype.

    Source: Su et al., "RoFormer", 2021, equation 34.
    """
    cos, sin = angles
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1).flatten(-2).to(x.dtype)


def _by_head(x: Tensor, weight: Tensor) -> Tensor:
    """Returns each head of ``x [B, H, L, C]`` times its matrix of ``weight [H, C, O]``: ``[B, H, L, O]``."""
    batch, _, length, _ = x.shape
    rows = x.transpose(0, 1).flatten(1, 2)  # [H, B L, C]: each matrix is read once
    return torch.bmm(rows, weight).unflatten(1, (batch, length)).transpose(0, 1)
