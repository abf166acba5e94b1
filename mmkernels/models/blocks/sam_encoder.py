"""SAM's image encoder: attention within windows, in a few layers to the whole image, with relative positions."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkernels.masks import SpanMask
from mmkernels.models.blocks.encoder import MLP
from mmkernels.models.blocks.relative_positions import with_relative_positions
from mmkernels.nn import SelfAttention
from mmkernels.nn.checks import described
from mmkernels.nn.linear_layer import linear
from mmkernels.ops.attention.cross_attention import cross_attention

NECK_EPS = 1e-6
"""Of the neck's norms, whatever the other norms have."""


class SamSizes(NamedTuple):
    """The sizes of a `SamEncoder`.

    Attributes:
        width, layers, heads, mlp: the width, the number of layers and of heads, the width of the feed-forward.
        image_size, patch_size: the side of an image and of a patch, in pixels.
        in_channels: of an image.
        window: the side of a window, in patches.
        global_layers: the layers, from 0 on, that attend to the whole image.
        channels: of the result.
        activation: of the feed-forward, a name in `ACTIVATIONS`.
        eps: of the layers' norms.
        dropout: the probability that an attention probability is dropped in training mode.
        bias: whether the projections of query, key and value add a bias.
        positions: whether learned positions are added to the patches.
        relative: whether the attention has learned relative positions.
    """

    width: int
    layers: int
    heads: int
    mlp: int
    image_size: int
    patch_size: int
    window: int
    global_layers: tuple[int, ...]
    channels: int
    in_channels: int = 3
    activation: str = "gelu"
    eps: float = 1e-6
    dropout: float = 0.0
    bias: bool = True
    positions: bool = True
    relative: bool = True

    @property
    def side(self) -> int:
        """The patches along a side of an image."""
        return self.image_size // self.patch_size


class RelativeAttention(SelfAttention):
    """Self-attention of square windows whose scores also depend on how far apart query and key are.

    By `with_relative_positions`, query and key grow by two sides of the window, and `mmkernels.cross_attention`
    computes the whole, without a table, and its gradients. (On a CPU, tables for a few rows of queries at a time were
    15 % faster for 64 x 64 patches; a gradient would keep them.)

    Args:
        dim: width of the input and of the output.
        num_heads: attention heads.
        side: of a window, in patches.
        bias: whether the projections of query, key and value add a bias.
        relative: whether there are relative positions.
        dropout: the chance that an attention probability is dropped, in training mode.

    Source: Li et al., "MViTv2", 2022, equation 4; Kirillov et al., "Segment Anything", 2023, section 3.

    Example:
        >>> import torch
        >>> attention = RelativeAttention(32, num_heads=2, side=4)
        >>> attention(torch.randn(3, 16, 32)).shape  # three windows of 4 x 4 patches
        torch.Size([3, 16, 32])
    """

    def __init__(
        self, dim: int, num_heads: int, side: int, *, bias: bool = True, relative: bool = True, dropout: float = 0.0
    ) -> None:
        super().__init__(dim, num_heads, bias=bias, dropout=dropout)
        if not bias:
            self.out_proj = nn.Linear(dim, dim)
        self.side, self.relative = side, relative
        if relative:
            self.row_positions = nn.Parameter(torch.randn(2 * side - 1, self.head_dim))
            self.column_positions = nn.Parameter(torch.randn(2 * side - 1, self.head_dim))

    def attend(self, projected: Tensor, mask: SpanMask | Tensor | None = None) -> Tensor:
        """Returns ``[W, side * side, H D]`` of what `project` returned, before the last projection."""
        if not self.relative:
            return super().attend(projected, mask)
        query, key, value = projected.unflatten(-1, (3, self.num_heads, self.head_dim)).transpose(1, 3).unbind(2)
        step = torch.arange(self.side, device=query.device)
        apart = step[:, None] - step + self.side - 1  # [query's place, key's place]
        rows, columns = self.row_positions[apart], self.column_positions[apart]  # [side, side, D]
        query, key = with_relative_positions(query, key, rows, columns, self.head_dim**-0.5)  # [W, H, L, D + 2 side]
        out = cross_attention(query, key, value, mask, scale=1.0, dropout_p=self.dropout if self.training else 0.0)
        return out.transpose(1, 2).flatten(2)


class SamBlock(nn.Module):
    """Self-attention within windows or to the whole image, then a feed-forward, each after a norm and with a residual.

    Args:
        sizes: of the encoder.
        window: the side of its windows, in patches; None: the whole image is one.
    """

    def __init__(self, sizes: SamSizes, window: int | None) -> None:
        super().__init__()
        s = sizes
        self.window = window
        self.attention_norm = nn.LayerNorm(s.width, eps=s.eps)
        side = s.side if window is None else window
        self.attention = RelativeAttention(s.width, s.heads, side, bias=s.bias, relative=s.relative, dropout=s.dropout)
        self.mlp_norm = nn.LayerNorm(s.width, eps=s.eps)
        self.mlp = MLP(s.width, s.mlp, s.activation)

    def forward(self, x: Tensor) -> Tensor:
        """Returns ``[B, side, side, width]`` after the block."""
        x = x + linear(self.attention.out_proj, self._attend(self.attention_norm(x)))
        return x + self.mlp(self.mlp_norm(x))

    def _attend(self, x: Tensor) -> Tensor:
        """Returns what the heads read, ``[B, side, side, width]``.

        Patches of zeros fill the last windows, and are seen as the image's own: their keys and values are the biases.
        They are added behind the projection, which needs not compute them.
        """
        side, layer = x.shape[1], self.attention.qkv_proj
        projected = linear(layer, x)  # [B, side, side, 3 H D]
        if self.window is None:
            return self.attention.attend(projected.flatten(1, 2)).unflatten(1, (side, side))
        window = self.window
        count = -(-side // window)
        more = count * window - side
        if more:
            projected = _filled(projected, layer.bias, more)
        windows = projected.unflatten(2, (count, window)).unflatten(1, (count, window)).transpose(2, 3)
        out = self.attention.attend(windows.flatten(3, 4).flatten(0, 2))  # [B count count, window window, C]
        out = out.view(-1, count, count, window, window, out.shape[-1]).transpose(2, 3)
        return out.flatten(3, 4).flatten(1, 2)[:, :side, :side]


def _filled(x: Tensor, filler: Tensor | None, more: int) -> Tensor:
    """Returns ``x [B, H, W, C]`` with further rows and columns of a value ``[C]``; None: of zeros."""
    if filler is None:
        return F.pad(x, (0, 0, 0, more, 0, more))
    batch, height, width, _ = x.shape
    filler = filler.to(x.dtype)
    x = torch.cat([x, filler.expand(batch, height, more, -1)], dim=2)
    return torch.cat([x, filler.expand(batch, more, width + more, -1)], dim=1)


class ChannelNorm(nn.Module):
    """A layer norm over the channels of ``[B, C, H, W]``."""

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """Returns ``[B, C, H, W]``, with the channels last in memory."""
        y: Tensor = self.norm(x.permute(0, 2, 3, 1))
        return y.permute(0, 3, 1, 2)


def make_neck(width: int, channels: int) -> nn.Sequential:
    """Returns the layers that map features ``[B, width, H, W]`` to ``[B, channels, H, W]``."""
    return nn.Sequential(
        nn.Conv2d(width, channels, 1, bias=False),
        ChannelNorm(channels, NECK_EPS),
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        ChannelNorm(channels, NECK_EPS),
    )


class SamEncoder(nn.Module):
    """Maps pixels ``[B, in_channels, S, S]`` to features ``[B, channels, side, side]``.

    Args:
        sizes: of the transformer.

    Source: Kirillov et al., "Segment Anything", 2023, section 3 and appendix A; Li et al., "Exploring Plain Vision
    Transformer Backbones for Object Detection" (ViTDet), 2022.

    Example:
        >>> import torch
        >>> sizes = SamSizes(32, 2, 4, 64, image_size=32, patch_size=4, window=3, global_layers=(1,), channels=8)
        >>> encoder = SamEncoder(sizes)
        >>> features, between = encoder(torch.randn(2, 3, 32, 32), tapped=0)
        >>> features.shape, between.shape
        (torch.Size([2, 8, 8, 8]), torch.Size([2, 8, 8, 32]))
    """

    def __init__(self, sizes: SamSizes) -> None:
        super().__init__()
        s = sizes
        self.sizes = sizes
        self.patch = nn.Conv2d(s.in_channels, s.width, s.patch_size, stride=s.patch_size)
        self.positions = nn.Parameter(torch.randn(s.side, s.side, s.width)) if s.positions else None
        windows = (None if layer in s.global_layers else s.window for layer in range(s.layers))
        self.blocks = nn.ModuleList(SamBlock(s, window) for window in windows)
        self.neck = make_neck(s.width, s.channels)

    def forward(self, pixel_values: Tensor, tapped: int) -> tuple[Tensor, Tensor]:
        """Returns features ``[B, channels, side, side]``, and what a layer returned, ``[B, side, side, width]``.

        Args:
            pixel_values: floating ``[B, in_channels, image_size, image_size]``.
            tapped: the layer, from 0 on.
        """
        x = self.patch(pixel_values.to(self.patch.weight.dtype)).permute(0, 2, 3, 1)  # [B, side, side, width]
        if self.positions is not None:
            x = x + self.positions
        between = x
        for layer, block in enumerate(self.blocks):
            x = block(x)
            if layer == tapped:
                between = x
        return self.neck(x.permute(0, 3, 1, 2)), between

    def check(self, name: str, pixel_values: Tensor) -> None:
        """Raises unless pixels are floats ``[B, in_channels, image_size, image_size]``."""
        if not isinstance(pixel_values, Tensor) or not pixel_values.is_floating_point():
            raise TypeError(f"{name} must be a floating tensor, got {described(pixel_values)}")
        s = self.sizes
        if pixel_values.dim() != 4 or tuple(pixel_values.shape[1:]) != (s.in_channels, s.image_size, s.image_size):
            must = f"[B, {s.in_channels}, {s.image_size}, {s.image_size}]"
            raise ValueError(f"{name} must be {must}, got shape {tuple(pixel_values.shape)}")
