"""The vision transformer of CLIP and SigLIP."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from mmkernels.models.blocks.encoder import EncoderBlock, Heads, Sizes
from mmkernels.nn.checks import described


class VisionTransformer(nn.Module):
    """Maps pixels ``[B, channels, S, S]`` to one feature per patch, after that of the class token if there is one.

    Args:
        sizes: of the transformer.
        image_size, patch_size: the side of an image and of a patch, in pixels.
        channels: of an image.
        class_token: whether there is a class token before the patches, as in CLIP and BLIP.
        first_norm: whether there is a norm before the first layer, as in CLIP; None: if there is a class token.
        patch_bias: whether the projection of the patches adds a bias, as in SigLIP and BLIP; None: if there is no such
            norm.

    Source: Dosovitskiy et al., "An Image is Worth 16x16 Words", 2021; the norm before the first layer as in Radford et
    al., "Learning Transferable Visual Models From Natural Language Supervision", 2021.

    Example:
        >>> import torch
        >>> sizes = Sizes(width=32, layers=2, heads=4, mlp=64)
        >>> encoder = VisionTransformer(sizes, image_size=32, patch_size=8)
        >>> encoder(torch.randn(3, 3, 32, 32)).shape
        torch.Size([3, 17, 32])
    """

    def __init__(
        self,
        sizes: Sizes,
        *,
        image_size: int,
        patch_size: int,
        channels: int = 3,
        class_token: bool = True,
        first_norm: bool | None = None,
        patch_bias: bool | None = None,
    ) -> None:
        super().__init__()
        width = sizes.width
        first_norm = class_token if first_norm is None else first_norm
        patch_bias = not first_norm if patch_bias is None else patch_bias
        self.pixels = (channels, image_size, image_size)
        self.patch = nn.Conv2d(channels, width, patch_size, stride=patch_size, bias=patch_bias)
        self.class_token = nn.Parameter(torch.randn(width)) if class_token else None
        self.positions = nn.Parameter(torch.randn((image_size // patch_size) ** 2 + class_token, width))
        self.norm = nn.LayerNorm(width, eps=sizes.eps) if first_norm else nn.Identity()
        self.blocks = nn.ModuleList(EncoderBlock(sizes) for _ in range(sizes.layers))

    @classmethod
    def of(cls, config: Any, sizes: Sizes, **options: bool) -> VisionTransformer:
        """Returns one for the images that a model's configuration describes. `options`: as of the class."""
        image = {name: getattr(config, name) for name in ("image_size", "patch_size", "channels")}
        return cls(sizes, **image, **options)

    @property
    def grid(self) -> tuple[int, int, int]:
        """The patches of an image as (1, rows, columns)."""
        _, height, width = self.pixels
        size = self.patch.kernel_size
        return 1, height // size[0], width // size[1]

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Returns ``[B, patches + 1, width]``, or ``[B, patches, width]`` without a class token. No norm comes last."""
        x = self._embed(pixel_values)
        for block in self.blocks:
            x = block(x)
        return x

    def with_heads(self, pixel_values: Tensor) -> tuple[Tensor, Heads]:
        """Returns what `forward` returns, and query and key of the last layer's attention."""
        x = self._embed(pixel_values)
        *before, last = self.blocks
        for block in before:
            x = block(x)
        return cast(EncoderBlock, last).with_heads(x)

    def check(self, pixel_values: Tensor) -> None:
        """Raises unless pixels are floats ``[B, channels, S, S]`` of the encoder's size."""
        if not isinstance(pixel_values, Tensor) or not pixel_values.is_floating_point():
            raise TypeError(f"pixel_values must be a floating tensor, got {described(pixel_values)}")
        if tuple(pixel_values.shape[1:]) != self.pixels:
            shape = ", ".join(map(str, self.pixels))
            raise ValueError(f"pixel_values must be [B, {shape}], got shape {tuple(pixel_values.shape)}")

    def _embed(self, pixel_values: Tensor) -> Tensor:
        """Returns what the first layer gets."""
        self.check(pixel_values)
        x = self.patch(pixel_values.to(self.patch.weight.dtype)).flatten(2).transpose(1, 2)  # [B, patches, width]
        if self.class_token is not None:
            x = torch.cat([self.class_token.expand(x.shape[0], 1, -1), x], dim=1)
        return self.norm(x + self.positions)
