"""The vision transformer of CLIP and SigLIP."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmkernels.models.blocks.encoder import EncoderBlock
from mmkernels.nn.checks import described


class VisionTransformer(nn.Module):
    """Maps pixels ``[B, channels, S, S]`` to one feature per patch, after that of the class token if there is one.

    Args:
        width, layers, heads, mlp: of the transformer; `mlp` is the width of the feed-forward.
        image_size, patch_size: the side of an image and of a patch, in pixels.
        activation: of the feed-forward, a name in `ACTIVATIONS`.
        eps: of the layer norms.
        dropout: the probability that an attention probability is dropped in training mode.
        class_token: True, as in CLIP: there is a class token before the patches, and a norm before the first layer.
            False, as in SigLIP: there is neither, and the projection of the patches adds a bias.

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
        class_token: bool = True,
    ) -> None:
        super().__init__()
        self.pixels = (channels, image_size, image_size)
        self.patch = nn.Conv2d(channels, width, patch_size, stride=patch_size, bias=not class_token)
        self.class_token = nn.Parameter(torch.randn(width)) if class_token else None
        self.positions = nn.Parameter(torch.randn((image_size // patch_size) ** 2 + class_token, width))
        self.norm = nn.LayerNorm(width, eps=eps) if class_token else nn.Identity()
        self.blocks = nn.ModuleList(EncoderBlock(width, heads, mlp, activation, eps, dropout) for _ in range(layers))

    @classmethod
    def of(cls, config: Any, *, eps: float, class_token: bool = True) -> VisionTransformer:
        """Makes one of the sizes ``vision_*``, `image_size`, `patch_size` and `channels` of a model's configuration."""
        return cls(
            config.vision_width,
            layers=config.vision_layers,
            heads=config.vision_heads,
            mlp=config.vision_mlp,
            image_size=config.image_size,
            patch_size=config.patch_size,
            channels=config.channels,
            activation=config.vision_activation,
            eps=eps,
            dropout=config.vision_dropout,
            class_token=class_token,
        )

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Returns ``[B, patches + 1, width]``, or ``[B, patches, width]`` without a class token. No norm comes last."""
        if not isinstance(pixel_values, Tensor) or not pixel_values.is_floating_point():
            raise TypeError(f"pixel_values must be a floating tensor, got {described(pixel_values)}")
        if tuple(pixel_values.shape[1:]) != self.pixels:
            shape = ", ".join(map(str, self.pixels))
            raise ValueError(f"pixel_values must be [B, {shape}], got shape {tuple(pixel_values.shape)}")
        x = self.patch(pixel_values.to(self.patch.weight.dtype)).flatten(2).transpose(1, 2)  # [B, patches, width]
        if self.class_token is not None:
            x = torch.cat([self.class_token.expand(len(x), 1, -1), x], dim=1)
        x = self.norm(x + self.positions)
        for block in self.blocks:
            x = block(x)
        return x
