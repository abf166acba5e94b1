"""InternViT: a vision transformer of square images, tiles of larger ones, with a scale for each branch."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkernels.models.blocks.activations import ACTIVATIONS
from mmkernels.models.blocks.encoder import Heads
from mmkernels.nn import CrossAttention

QK_EPS = 1e-6
"""Of the norms of query and key, whatever the other norms have."""


class TileSizes(NamedTuple):
    """The sizes of a `TileEncoder`.

    Attributes:
        width, layers, heads, mlp: the width, the number of layers and of heads, the width of the feed-forward.
        image_size, patch_size: the side of a tile that needs no interpolation of positions, and of a patch, in pixels.
        channels: of a tile.
        activation: of the feed-forward, a name in `ACTIVATIONS`.
        norm: "layer" or "rms".
        eps: of the norms.
        bias: whether the projections of query, key and value add a bias.
        qk_norm: whether query and key have an RMS norm, each over all heads.
        positions: whether there are learned positions.
        last_norm: whether a layer norm follows the last layer.
        dropout: the probability that an attention probability is dropped in training mode.
    """

    width: int
    layers: int
    heads: int
    mlp: int
    image_size: int
    patch_size: int
    channels: int = 3
    activation: str = "gelu"
    norm: str = "layer"
    eps: float = 1e-6
    bias: bool = False
    qk_norm: bool = False
    positions: bool = True
    last_norm: bool = False
    dropout: float = 0.0

    @classmethod
    def of(cls, config: Any, **others: Any) -> TileSizes:
        """Returns the sizes in the fields ``vision_<name>``, or ``<name>``, of a model's configuration.

        Args:
            others: the values of sizes that the configuration names otherwise.
        """
        names = {name: f"vision_{name}" if hasattr(config, f"vision_{name}") else name for name in cls._fields}
        return cls(**{ours: getattr(config, name) for ours, name in names.items() if ours not in others}, **others)


class TileBlock(nn.Module):
    """Self-attention, then a feed-forward, each after a norm, scaled channel by channel, and with a residual.

    Source: Touvron et al., "Going deeper with Image Transformers", 2021, equation 4 (LayerScale).
    """

    def __init__(self, sizes: TileSizes) -> None:
        super().__init__()
        s = sizes
        norm = nn.LayerNorm if s.norm == "layer" else nn.RMSNorm
        self.attention_norm = norm(s.width, eps=s.eps)
        self.attention = CrossAttention(s.width, num_heads=s.heads, bias=s.bias, out_bias=True, dropout=s.dropout)
        if s.qk_norm:  # over all heads at once: a norm of the projection's result
            for name in ("q_proj", "k_proj"):
                normed = nn.Sequential(getattr(self.attention, name), nn.RMSNorm(s.width, eps=QK_EPS))
                setattr(self.attention, name, normed)
        self.attention_scale = nn.Parameter(torch.ones(s.width))
        self.mlp_norm = norm(s.width, eps=s.eps)
        self.mlp = nn.Sequential(nn.Linear(s.width, s.mlp), ACTIVATIONS[s.activation](), nn.Linear(s.mlp, s.width))
        self.mlp_scale = nn.Parameter(torch.ones(s.width))

    def forward(self, x: Tensor) -> tuple[Tensor, Heads]:
        """Returns ``[T, L, width]`` after the block, and query and key ``[T, H, L, D]`` of its attention."""
        normed = self.attention_norm(x)
        query = self.attention.query(normed)
        key, value = self.attention.project(normed)
        x = torch.addcmul(x, self.attention_scale, self.attention.attend(query, key, value))
        x = torch.addcmul(x, self.mlp_scale, self.mlp(self.mlp_norm(x)))
        return x, Heads(query, key)


class TileEncoder(nn.Module):
    """Maps tiles ``[T, channels, S, S]`` to one feature per patch, after that of a class token.

    Args:
        sizes: of the transformer.

    Source: Chen et al., "InternVL", 2024, section 3.2; Dosovitskiy et al., "An Image is Worth 16x16 Words", 2021.

    Example:
        >>> import torch
        >>> sizes = TileSizes(width=32, layers=2, heads=4, mlp=64, image_size=32, patch_size=8)
        >>> encoder = TileEncoder(sizes)
        >>> encoder(torch.randn(3, 3, 32, 32))[0].shape, encoder(torch.randn(3, 3, 48, 48))[0].shape
        (torch.Size([3, 17, 32]), torch.Size([3, 37, 32]))
    """

    def __init__(self, sizes: TileSizes) -> None:
        super().__init__()
        s = sizes
        self.sizes = sizes
        self.patch = nn.Conv2d(s.channels, s.width, s.patch_size, stride=s.patch_size)
        self.class_token = nn.Parameter(torch.randn(s.width))
        patches = (s.image_size // s.patch_size) ** 2
        self.positions = nn.Parameter(torch.randn(patches + 1, s.width)) if s.positions else None
        self.blocks = nn.ModuleList(TileBlock(s) for _ in range(s.layers))
        self.norm = nn.LayerNorm(s.width, eps=s.eps) if s.last_norm else nn.Identity()

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Heads]:
        """Returns features ``[T, patches + 1, width]``, and query and key of the last layer's attention.

        Args:
            pixel_values: floating ``[T, channels, S, S]``, of any S that is a multiple of `patch_size`: positions are
                interpolated to it.
        """
        x = self.patch(pixel_values.to(self.patch.weight.dtype)).flatten(2).transpose(1, 2)  # [T, patches, width]
        x = torch.cat([self.class_token.expand(x.shape[0], 1, -1), x], dim=1)
        if self.positions is not None:
            x = x + self._positions(self.positions, pixel_values.shape[-1])
        for block in self.blocks:
            x, heads = block(x)
        return self.norm(x), heads

    def _positions(self, learned: Tensor, size: int) -> Tensor:
        """Returns the positions ``[patches + 1, width]`` of tiles of a size: bicubic, half a patch from the edges."""
        s = self.sizes
        if size == s.image_size:
            return learned
        grid = learned[1:].T.unflatten(1, (s.image_size // s.patch_size, -1))[None]  # [1, width, rows, columns]
        side = size // s.patch_size
        grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
        return torch.cat([learned[:1], grid[0].flatten(1).T])
