"""`VQ`: images as tokens of a codebook, and back: Janus' tokenizer of images that are generated."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkernels.nn.checks import described
from mmkernels.ops.attention.cross_attention import cross_attention
from mmkernels.runtime.checks import check_range

GROUPS = 32
"""Of the group norms; each layer's channels are a multiple."""
_STRIP = 2048
"""Codes that tokens are compared with at once."""
_EPS = 1e-6
_CODE_WEIGHT = 0.25
"""Of the part of the codebook's loss that moves the codes."""


class VQSizes(NamedTuple):
    """The sizes of a `VQ`.

    Attributes:
        codes, code_width: of the codebook.
        latent: the channels between the convolutions and the codebook.
        width: the channels at the image's resolution.
        multipliers: of `width`, for each resolution; between two of them the resolution is halved.
        blocks: residual blocks of the encoder at each resolution; the decoder has one more.
        side: rows and columns of an image's tokens.
        channels: of an image.
        directions: whether tokens are the codes nearest in direction, as the released codebook was trained, or in
            distance, as transformers computes them. The decoder reads directions in both cases.
    """

    codes: int
    code_width: int
    latent: int
    width: int
    multipliers: tuple[int, ...]
    blocks: int
    side: int
    channels: int = 3
    directions: bool = False

    @property
    def image_side(self) -> int:
        """The side of an image in pixels."""
        return self.side << (len(self.multipliers) - 1)


class VQOutput(NamedTuple):
    """The result of `VQ.forward`.

    Attributes:
        pixels: the images behind encoder and decoder ``[B, channels, S, S]``; their gradient passes the codebook as if
            the encoder's values had not been rounded to codes.
        loss: what draws the encoder's values and their codes together.
        tokens: int64 ``[B, side * side]``.
    """

    pixels: Tensor
    loss: Tensor
    tokens: Tensor


class VQ(nn.Module):
    """Turns images into tokens and tokens into images.

    Args:
        sizes: of encoder, codebook and decoder.

    Source: Esser et al., "Taming Transformers for High-Resolution Image Synthesis", 2021, section 3.1; the codebook of
    Janus is that of Sun et al., "Autoregressive Model Beats Diffusion: Llama for Scalable Image Generation" (LlamaGen),
    2024, section 2.1.

    Example:
        >>> import torch
        >>> sizes = VQSizes(codes=16, code_width=4, latent=8, width=32, multipliers=(1, 1), blocks=1, side=4)
        >>> vq = VQ(sizes)
        >>> tokens = vq.encode(torch.randn(2, 3, 8, 8))
        >>> tokens.shape, vq.decode(tokens).shape
        (torch.Size([2, 16]), torch.Size([2, 3, 8, 8]))
    """

    def __init__(self, sizes: VQSizes) -> None:
        super().__init__()
        s = sizes
        self.sizes = sizes
        self.encoder = _Encoder(s)
        self.quant_conv = nn.Linear(s.latent, s.code_width)  # a convolution of single pixels
        self.quantize = nn.ModuleDict({"embedding": nn.Embedding(s.codes, s.code_width)})
        self.post_quant_conv = nn.Linear(s.code_width, s.latent)
        self.decoder = _Decoder(s)

    @property
    def _codes(self) -> nn.Embedding:
        codes = self.quantize["embedding"]
        assert isinstance(codes, nn.Embedding)
        return codes

    @property
    def codebook(self) -> Tensor:
        """The codes ``[codes, code_width]``."""
        weight = self._codes.weight
        return F.normalize(weight, dim=-1) if self.sizes.directions else weight

    def encode(self, pixels: Tensor, directions: bool | None = None) -> Tensor:
        """Returns the tokens of images, int64 ``[B, side * side]``, row after row.

        Args:
            pixels: floating ``[B, channels, S, S]`` from -1 to 1.
            directions: as `VQSizes.directions`; None: as there.
        """
        latents, codes = self._projected(pixels), self._codes.weight
        if self.sizes.directions if directions is None else directions:
            latents, codes = F.normalize(latents, dim=-1), F.normalize(codes, dim=-1)
        return self._nearest(latents, codes)

    def decode(self, tokens: Tensor) -> Tensor:
        """Returns the images of tokens, ``[B, channels, S, S]``, about from -1 to 1.

        Args:
            tokens: integers ``[B, side * side]``, row after row.
        """
        check_image_tokens("tokens", tokens, self.sizes)
        return self._pixels(self._codes(tokens))

    def forward(self, pixels: Tensor) -> VQOutput:
        """Returns images behind encoder and decoder, and the codebook's loss: what training needs.

        Args:
            pixels: floating ``[B, channels, S, S]`` from -1 to 1.

        Source: van den Oord et al., "Neural Discrete Representation Learning", 2017, equation 3; the weights of its
        two parts are those of transformers.
        """
        latents = self.latents(pixels)
        tokens = self._nearest(latents, self.codebook)
        codes = F.embedding(tokens, self.codebook)
        loss = F.mse_loss(latents, codes.detach()) + _CODE_WEIGHT * F.mse_loss(codes, latents.detach())
        return VQOutput(self._pixels(latents + (codes - latents).detach()), loss, tokens)

    def latents(self, pixels: Tensor) -> Tensor:
        """Returns what is compared with the codes, ``[B, side * side, code_width]``, row after row.

        Args:
            pixels: floating ``[B, channels, S, S]`` from -1 to 1.
        """
        projected = self._projected(pixels)
        return F.normalize(projected, dim=-1) if self.sizes.directions else projected

    def _projected(self, pixels: Tensor) -> Tensor:
        s = self.sizes
        if not isinstance(pixels, Tensor) or not pixels.is_floating_point():
            raise TypeError(f"pixels must be a floating tensor, got {described(pixels)}")
        if tuple(pixels.shape[1:]) != (s.channels, s.image_side, s.image_side):
            must = f"[B, {s.channels}, {s.image_side}, {s.image_side}]"
            raise ValueError(f"pixels must be {must}, got shape {tuple(pixels.shape)}")
        features = self.encoder(pixels.to(self.quant_conv.weight.dtype))  # [B, latent, side, side]
        latents: Tensor = self.quant_conv(_tokens(features))
        return latents

    def _nearest(self, latents: Tensor, codes: Tensor) -> Tensor:
        """Returns the number of the nearest code, of several the first, int64 ``[B, L]``.

        Distances to a strip of the codes exist at a time.
        """
        wide = torch.promote_types(latents.dtype, torch.float32)  # in 16 bits one code of twenty is another one's
        flat, codebook = latents.detach().flatten(0, 1).to(wide), codes.detach().to(wide)
        best, found = None, None
        for start in range(0, codebook.shape[0], _STRIP):
            strip = codebook[start : start + _STRIP]
            least, index = torch.addmm((strip * strip).sum(1), flat, strip.T, alpha=-2.0).min(1)  # less |latents|^2
            index = index + start
            if best is None or found is None:
                best, found = least, index
            else:
                best, found = torch.where(least < best, least, best), torch.where(least < best, index, found)
        assert found is not None
        return found.view(latents.shape[:2])

    def _pixels(self, codes: Tensor) -> Tensor:
        """Returns the images of codes ``[B, side * side, code_width]``, of which only the directions count."""
        s = self.sizes
        x = self.post_quant_conv(F.normalize(codes, dim=-1))
        pixels: Tensor = self.decoder(x.transpose(1, 2).unflatten(2, (s.side, s.side)))
        return pixels


def check_image_tokens(name: str, tokens: Tensor, sizes: VQSizes) -> None:
    """Raises unless tokens are integers ``[B, side * side]`` of the codebook; values are looked at on a CPU only."""
    if not isinstance(tokens, Tensor) or tokens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be an int32 or int64 tensor, got {described(tokens)}")
    count = sizes.side**2
    if tokens.dim() != 2 or tokens.shape[1] != count:
        raise ValueError(f"{name} must be [B, {count}], got shape {tuple(tokens.shape)}")
    check_range(name, tokens, 0, sizes.codes - 1)


def _tokens(x: Tensor) -> Tensor:
    """Returns ``[B, H * W, C]`` of ``[B, C, H, W]``."""
    return x.flatten(2).transpose(1, 2)


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(GROUPS, channels, eps=_EPS)


def _conv(channels: int, out: int) -> nn.Conv2d:
    return nn.Conv2d(channels, out, 3, padding=1)


class _Residual(nn.Module):
    """Two convolutions, each behind a group norm and SiLU, and a residual."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = _norm(channels), _conv(channels, out)
        self.norm2, self.conv2 = _norm(out), _conv(out, out)
        self.nin_shortcut = nn.Identity() if channels == out else nn.Conv2d(channels, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(y)))


class _Attention(nn.Module):
    """Attention of one head between all pixels, behind a group norm, and a residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Linear(channels, channels) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        tokens = _tokens(self.norm(x)).contiguous()  # [B, H * W, C]
        query, key, value = (project(tokens)[:, None] for project in (self.q, self.k, self.v))
        attended = self.proj_out(cross_attention(query, key, value)[:, 0])
        return x + attended.transpose(1, 2).view_as(x)


class _Middle(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1, self.block_2 = _Residual(channels, channels), _Residual(channels, channels)
        self.attn_1 = _Attention(channels)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.block_2(self.attn_1(self.block_1(x)))
        return y


class _Half(nn.Module):
    """Halves the resolution. Zeros are added below and on the right only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return y


class _Double(nn.Module):
    """Doubles the resolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = _conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return y


class _Level(nn.Module):
    """Residual blocks at one resolution, each with attention behind it if it is the lowest; then another resolution.

    Args:
        channels, out: of the input, and of the output.
        blocks: the number of residual blocks.
        attention: whether attention follows each of them.
        resample: the name and the module that changes the resolution; None: it stays.
    """

    def __init__(
        self, channels: int, out: int, blocks: int, attention: bool, resample: tuple[str, nn.Module] | None
    ) -> None:
        super().__init__()
        widths = [channels, *[out] * blocks]
        self.block = nn.ModuleList(_Residual(a, b) for a, b in pairwise(widths))
        self.attn = nn.ModuleList(_Attention(out) for _ in range(blocks if attention else 0))
        self._resample = None if resample is None else resample[0]
        if resample is not None:
            self.add_module(*resample)

    def forward(self, x: Tensor) -> Tensor:
        for number, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[number](x)
        return x if self._resample is None else self.get_submodule(self._resample)(x)


class _Encoder(nn.Module):
    """Maps ``[B, channels, S, S]`` to ``[B, latent, side, side]``."""

    def __init__(self, sizes: VQSizes) -> None:
        super().__init__()
        s, last = sizes, len(sizes.multipliers) - 1
        widths = [s.width, *(s.width * m for m in s.multipliers)]
        self.conv_in = _conv(s.channels, s.width)
        self.down = nn.ModuleList(
            _Level(a, b, s.blocks, level == last, None if level == last else ("downsample", _Half(b)))
            for level, (a, b) in enumerate(pairwise(widths))
        )
        self.mid = _Middle(widths[-1])
        self.norm_out, self.conv_out = _norm(widths[-1]), _conv(widths[-1], s.latent)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        y: Tensor = self.conv_out(F.silu(self.norm_out(self.mid(x))))
        return y


class _Decoder(nn.Module):
    """Maps ``[B, latent, side, side]`` to ``[B, channels, S, S]``."""

    def __init__(self, sizes: VQSizes) -> None:
        super().__init__()
        s = sizes
        widths = [s.width * m for m in reversed(s.multipliers)]
        widths, last = [widths[0], *widths], len(widths) - 1
        self.conv_in = _conv(s.latent, widths[0])
        self.mid = _Middle(widths[0])
        self.up = nn.ModuleList(
            _Level(a, b, s.blocks + 1, not level, None if level == last else ("upsample", _Double(b)))
            for level, (a, b) in enumerate(pairwise(widths))
        )
        self.norm_out, self.conv_out = _norm(widths[-1]), _conv(widths[-1], s.channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.conv_in(x))
        for level in self.up:
            x = level(x)
        y: Tensor = self.conv_out(F.silu(self.norm_out(x)))
        return y
