"""`AudioEncoder`: the encoder of Whisper, which Qwen2-Audio has too: two convolutions over a log-mel spectrogram, then
a transformer over its frames."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkernels.masks import SpanMask
from mmkernels.models.blocks.activations import ACTIVATIONS
from mmkernels.models.blocks.encoder import Sizes
from mmkernels.nn import CrossAttention
from mmkernels.nn.checks import check_dropout, check_positive, described
from mmkernels.ops.tokens.pool_tokens import pool_tokens
from mmkernels.runtime.checks import check_floating, check_range, check_tensor

_FP16_LIMIT = torch.finfo(torch.float16).max - 1000


def sinusoids(length: int, width: int) -> Tensor:
    """Returns the positions ``[length, width]`` that Whisper's encoder starts with: sines, then cosines, float32.

    Source: Radford et al., "Robust Speech Recognition via Large-Scale Weak Supervision", 2022, section 2.2; the
    wavelengths, from 2 pi to 10,000 times 2 pi, as in the authors' code.
    """
    half = width // 2
    rate = torch.exp(-math.log(10_000) / max(half - 1, 1) * torch.arange(half))
    angles = torch.arange(length)[:, None] * rate
    return torch.cat([angles.sin(), angles.cos(), torch.zeros(length, width % 2)], dim=1)


class AudioAttention(CrossAttention):
    """`CrossAttention` whose projections add a bias, but for the keys': it would add the same to all scores of a query.

    Args:
        width, heads: the width, and the number of heads.
        dropout: the probability that an attention probability is dropped in training mode.

    Source: Radford et al., 2022, as in the authors' code.
    """

    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__(width, num_heads=heads, bias=True, dropout=dropout)
        self.k_proj = nn.Linear(width, width, bias=False)


class AudioBlock(nn.Module):
    """Self-attention, then a feed-forward, each after a layer norm and with a residual: `AudioAttention` inside.

    Args:
        sizes: of the transformer.
        residual_dropout: the probability that an element of a branch's result is dropped in training mode.
        activation_dropout: the probability that an element inside the feed-forward is.
    """

    def __init__(self, sizes: Sizes, *, residual_dropout: float = 0.0, activation_dropout: float = 0.0) -> None:
        super().__init__()
        width = sizes.width
        self.attention_norm = nn.LayerNorm(width, eps=sizes.eps)
        self.attention = AudioAttention(width, sizes.heads, sizes.dropout)
        self.mlp_norm = nn.LayerNorm(width, eps=sizes.eps)
        self.mlp = nn.Sequential(
            nn.Linear(width, sizes.mlp),
            ACTIVATIONS[sizes.activation](),
            nn.Dropout(activation_dropout),
            nn.Linear(sizes.mlp, width),
        )
        self.dropout = nn.Dropout(residual_dropout)

    def forward(self, x: Tensor, mask: SpanMask | None = None) -> Tensor:
        """Returns ``[B, L, width]`` after the block. `mask`: which frames each frame sees; None: all."""
        x = x + self.dropout(self.attention(self.attention_norm(x), mask=mask))
        x = x + self.dropout(self.mlp(self.mlp_norm(x)))
        # As in transformers: in float16 the sum of the branches may pass the largest number.
        return x.clamp(-_FP16_LIMIT, _FP16_LIMIT) if x.dtype == torch.float16 else x


class AudioEncoder(nn.Module):
    """Maps log-mel spectrograms ``[B, mel_bins, T]`` to one feature per two frames, ``[B, ceil(T / 2), width]``.

    A sound that is shorter than the spectrogram's T frames can be told by its length. What lies behind it then changes
    nothing: its features are those that it has alone.

    Args:
        sizes: of the transformer.
        mel_bins: the frequencies of a spectrogram.
        positions: the most features of a sound, before they are pooled: 1,500 are 30 seconds.
        pool: how many features are averaged before the last norm, 1 or more: 2 in Qwen2-Audio. What is left over at the
            end is dropped, as by ``F.avg_pool1d``.
        residual_dropout, activation_dropout: as of `AudioBlock`.
        layer_dropout: the probability that a layer is left out in training mode (LayerDrop).

    Attributes:
        positions: ``[positions, width]``, not trained: `sinusoids`, or what a checkpoint holds.

    Raises:
        TypeError, ValueError: in `forward`, an input has a wrong type or shape, a sound is too long, or a length is
            outside the spectrogram. (Lengths are looked at on the CPU only: elsewhere this would sync with the device.)

    Source: Radford et al., "Robust Speech Recognition via Large-Scale Weak Supervision", 2022, figure 1; pooling by
    Chu et al., "Qwen2-Audio Technical Report", 2024, section 2; LayerDrop by Fan et al., "Reducing Transformer Depth on
    Demand with Structured Dropout", 2019.

    Example:
        >>> import torch
        >>> from mmkernels.models.blocks.audio_encoder import AudioEncoder
        >>> from mmkernels.models.blocks.encoder import Sizes
        >>> encoder = AudioEncoder(Sizes(width=32, layers=2, heads=4, mlp=64), mel_bins=80, positions=50)
        >>> sounds, lengths = torch.randn(2, 80, 100), torch.tensor([100, 30])
        >>> features = encoder(sounds, lengths)
        >>> features.shape, encoder.output_lengths(lengths)
        (torch.Size([2, 50, 32]), tensor([50, 15]))
        >>> torch.allclose(features[1:, :15], encoder(sounds[1:, :, :30]), atol=1e-5)
        True
    """

    def __init__(
        self,
        sizes: Sizes,
        *,
        mel_bins: int = 80,
        positions: int = 1500,
        pool: int = 1,
        residual_dropout: float = 0.0,
        activation_dropout: float = 0.0,
        layer_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        for name, size in (("mel_bins", mel_bins), ("positions", positions), ("pool", pool)):
            check_positive(name, size)
        check_dropout(layer_dropout)
        width = sizes.width
        self.mel_bins, self.pool, self.layer_dropout = mel_bins, pool, layer_dropout
        self.conv1 = nn.Conv1d(mel_bins, width, kernel_size=3, padding=1)
        self.conv2 = nn.Conv1d(width, width, kernel_size=3, stride=2, padding=1)
        self.positions = nn.Parameter(torch.empty(positions, width), requires_grad=False)
        self.dropout = nn.Dropout(residual_dropout)
        options = {"residual_dropout": residual_dropout, "activation_dropout": activation_dropout}
        self.blocks = nn.ModuleList(AudioBlock(sizes, **options) for _ in range(sizes.layers))
        self.norm = nn.LayerNorm(width, eps=sizes.eps)
        self.set_positions()

    @property
    def most_frames(self) -> int:
        """The most frames of a spectrogram: two for each position."""
        return 2 * self.positions.shape[0]

    def set_positions(self) -> None:
        """Gives the positions the value that training starts with."""
        with torch.no_grad():
            self.positions.copy_(sinusoids(*self.positions.shape))

    def output_lengths(self, frame_lengths: Tensor) -> Tensor:
        """Returns how many features sounds of these lengths, integers in frames, have."""
        return (frame_lengths + 1) // 2 // self.pool

    def forward(
        self, input_features: Tensor, frame_lengths: Tensor | None = None, *, mask_convolutions: bool = True
    ) -> Tensor:
        """Returns ``[B, ceil(T / 2) // pool, width]``, after the last norm.

        Args:
            input_features: floating ``[B, mel_bins, T]``, T at most `most_frames`. Models are trained on sounds
                that are filled up to the most frames with silence; a shorter T saves time, at features that differ.
            frame_lengths: integers ``[B]``, 0 to T: the frames behind them are padding, which no frame sees; None:
                there is none. The features of padding are finite, if the numbers in it are, but mean nothing.
            mask_convolutions: whether the convolutions see zeros in the padding, as they do behind the last of T
                frames. False: they see what is there, and only the attention does not, as in Qwen2-Audio.
        """
        lengths = self._check(input_features, frame_lengths)
        x = input_features.to(self.conv1.weight.dtype)
        padding = None
        if lengths is not None and mask_convolutions:
            padding = torch.arange(x.shape[-1], device=x.device) >= lengths[:, None, None]  # [B, 1, T]
            x = x.masked_fill(padding, 0.0)
        x = F.gelu(self.conv1(x))
        if padding is not None:
            x = x.masked_fill(padding, 0.0)
        x = F.gelu(self.conv2(x)).transpose(1, 2)  # [B, ceil(T / 2), width]
        x = self.dropout(x + self.positions[: x.shape[1]])
        mask = None if lengths is None else SpanMask.key_padding((lengths + 1) // 2)
        for block in self.blocks:
            if self.training and self.layer_dropout and float(torch.rand(())) < self.layer_dropout:
                continue
            x = block(x, mask)
        if self.pool > 1:
            x = self._pooled(x)
        return self.norm(x)

    def _pooled(self, x: Tensor) -> Tensor:
        """Returns ``[B, L // pool, width]`` of ``x [B, L, width]``. All sounds are one grid: B may be symbolic."""
        batch, length = x.shape[0], x.shape[1]
        packed = x[:, : length - length % self.pool].flatten(0, 1)
        rows = packed.shape[0]
        if isinstance(rows, Tensor):  # in `torch.jit.trace`, whose program then serves this B alone
            rows = int(rows)
        pooled, _ = pool_tokens(packed, [(rows, 1, 1)], (self.pool, 1, 1))
        return pooled.unflatten(0, (batch, length // self.pool))

    def _check(self, input_features: Tensor, frame_lengths: Tensor | None) -> Tensor | None:
        """Returns the lengths on the spectrogram's device; raises where an input is wrong."""
        check_floating("input_features", input_features)
        shape, least, most = tuple(input_features.shape), 2 * self.pool - 1, self.most_frames
        if len(shape) != 3 or shape[1] != self.mel_bins or not least <= shape[2] <= most:
            must = f"input_features must be [B, {self.mel_bins}, T], T from {least} to {most} frames"
            hint = "; cut a longer sound in windows" if len(shape) == 3 and shape[2] > most else ""
            raise ValueError(f"{must}, got shape {shape}{hint}")
        if frame_lengths is None:
            return None
        if not isinstance(frame_lengths, Tensor) or frame_lengths.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"frame_lengths must be an int32 or int64 tensor, got {described(frame_lengths)}")
        check_tensor("frame_lengths", frame_lengths)
        if tuple(frame_lengths.shape) != shape[:1]:
            got = tuple(frame_lengths.shape)
            raise ValueError(f"frame_lengths must be [{shape[0]}] as input_features, got shape {got}")
        check_range("frame_lengths", frame_lengths, 0, shape[2])
        return frame_lengths.to(input_features.device)
