"""A vision transformer, as CLIP's."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmkernels.models.blocks.activations import ACTIVATIONS
from mmkernels.nn import CrossAttention


class VisionTransformer(nn.Module):
    """Pixels ``[B, channels, S, S]`` to one feature per patch, and before them one for the class token.

    Args:
        width, layers, heads, mlp: of the transformer; `mlp` is the feed-forward's width.
        image_size, patch_size: pixels a side.
        activation: the feed-forward's, a name in `ACTIVATIONS`.
        eps: of the layer norms.
        dropout: of attention probabilities, in training mode.

    Source: Dosovitskiy et al., "An Image is Worth 16x16 Words", 2021; the norm before the first layer as in Radford et
    al., "Learning Transferable Visual Models From Natural Language Supervision", 2021.

    Example:
        >>> import torch
        >>> encoder = VisionTransformer(32, layers=2, heads=4, mlp=64, image_size=32, patch_size=8)
        >>> encoder(torch.randn(3, 3, 32, 32)).shape
        torch.Size([3, 17, 32])
    """

    def __init__(
        self,
        width: int,
        *,
        layers: int,
        heads: int,
        mlp: int,
        image_size: int,
        patch_size: int,
        channels: int = 3,
        activation: str = "gelu",
        eps: float = 1e-5,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.pixels = (channels, image_size, image_size)
        self.patch = nn.Conv2d(channels, width, patch_size, stride=patch_size, bias=False)
        self.class_token = nn.Parameter(torch.randn(width))
        self.positions = nn.Parameter(torch.randn((image_size // patch_size) ** 2 + 1, width))
        self.norm = nn.LayerNorm(width, eps=eps)
        self.blocks = nn.ModuleList(_Block(width, heads, mlp, activation, eps, dropout) for _ in range(layers))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """``[B, patches + 1, width]``, before any last norm."""
        if tuple(pixel_values.shape[1:]) != self.pixels:
            raise ValueError(
                f"pixel_values must be [B, {', '.join(map(str, self.pixels))}], got {tuple(pixel_values.shape)}"
            )
        patches = self.patch(pixel_values.to(self.patch.weight.dtype)).flatten(2).transpose(1, 2)  # [B, patches, width]
        x = torch.cat([self.class_token.expand(len(patches), 1, -1), patches], dim=1)
        x = self.norm(x + self.positions)
        for block in self.blocks:
            x = block(x)
        return x


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, mlp: int, activation: str, eps: float, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, eps=eps)
        self.attention = CrossAttention(width, num_heads=heads, bias=True, dropout=dropout)
        self.mlp_norm = nn.LayerNorm(width, eps=eps)
        self.mlp = nn.Sequential(nn.Linear(width, mlp), ACTIVATIONS[activation](), nn.Linear(mlp, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))
