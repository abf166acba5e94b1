"""`Decoder`: the language model of models whose images are tokens of the text, with rotary positions of 1 or 3 axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmkernels.masks import SpanMask
from mmkernels.models.blocks.kv_cache import KVCache
from mmkernels.models.blocks.text import TextBlock
from mmkernels.ops.tokens.scatter_tokens import scatter_tokens


class DecoderSizes(NamedTuple):
    """The sizes of a `Decoder`.

    Attributes:
        width, layers, heads, kv_heads, head_dim, mlp: the width, the number of layers, of query heads and of key and
            value heads, the width of a head and of the feed-forward.
        vocab: the number of different tokens.
        activation: of the feed-forward, a name in `ACTIVATIONS`.
        eps: of the RMS norms.
        rope_theta: the base of the rotary angles.
        bias: whether the projections of query, key and value add a bias (Qwen2).
        qk_norm: whether each head of query and key has an RMS norm (Qwen3).
        sections: how many rotary frequencies follow the positions t, h and w (M-RoPE); they add up to ``head_dim / 2``.
            None: positions have one axis.
        interleaved: how the frequencies of the three axes lie: t h w t h w ... (Qwen3-VL), or one axis after the other.
        dropout: the probability that an attention probability is dropped in training mode.
        residual_dropout: the probability that an element of a branch's result is dropped in training mode.
    """

    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab: int
    activation: str = "silu"
    eps: float = 1e-6
    rope_theta: float = 1e6
    bias: bool = False
    qk_norm: bool = False
    sections: tuple[int, int, int] | None = None
    interleaved: bool = False
    dropout: float = 0.0
    residual_dropout: float = 0.0


class Deep(NamedTuple):
    """Visual features that are added to the tokens behind the first layers (DeepStack).

    Attributes:
        features: for each of the first layers the features ``[V, C]`` of the visual tokens.
        markers: where the visual tokens stand, bool ``[B, L]``.

    Source: Meng et al., "DeepStack", 2024, equation 4.
    """

    features: tuple[Tensor, ...]
    markers: Tensor


class Decoder(nn.Module):
    """Embeds tokens and maps them, or other embeddings, to hidden states: a causal transformer.

    Args:
        sizes: of the transformer.

    Source: Touvron et al., "LLaMA", 2023; M-RoPE by Wang et al., "Qwen2-VL", 2024, section 2.1.

    Example:
        >>> import torch
        >>> from mmkernels.masks import SpanMask
        >>> sizes = DecoderSizes(width=32, layers=2, heads=4, kv_heads=2, head_dim=8, mlp=64, vocab=100)
        >>> decoder = Decoder(sizes)
        >>> x = decoder.embed(torch.tensor([[5, 6, 7]]))
        >>> decoder(x, torch.arange(3)[None], SpanMask.causal(3, 3)).shape
        torch.Size([1, 3, 32])
    """

    def __init__(self, sizes: DecoderSizes) -> None:
        super().__init__()
        s = sizes
        self.sizes = sizes
        self.embed = nn.Embedding(s.vocab, s.width)
        self.blocks = nn.ModuleList(self._make_block(layer) for layer in range(s.layers))
        self.norm = self._make_norm()

    def _make_block(self, layer: int) -> nn.Module:
        """Returns a layer, of which there may be several kinds."""
        s = self.sizes
        return TextBlock(
            s.width,
            heads=s.heads,
            kv_heads=s.kv_heads,
            head_dim=s.head_dim,
            mlp=s.mlp,
            activation=s.activation,
            eps=s.eps,
            dropout=s.dropout,
            residual_dropout=s.residual_dropout,
            bias=s.bias,
            qk_norm=s.qk_norm,
        )

    def _make_norm(self) -> nn.Module:
        return nn.RMSNorm(self.sizes.width, eps=self.sizes.eps)

    def _placed(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Any]:
        """Returns what the first layer gets, and what every layer gets beside it: the rotary angles."""
        return x, self.angles(positions, x.dtype)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        mask: SpanMask,
        cache: KVCache | None = None,
        deep: Sequence[Deep] = (),
    ) -> Tensor:
        """Returns the hidden states ``[B, L, width]``, before the last norm.

        Args:
            x: embeddings ``[B, L, width]``.
            positions: int64 ``[B, L]``, or (t, h, w) ``[3, B, L]`` where the sizes have sections.
            mask: of the L queries over all keys, those in the cache first.
            cache: holds the earlier keys and values; the new ones are appended.
            deep: features that are added behind the first layers.
        """
        x, angles = self._placed(x, positions)
        for layer, block in enumerate(self.blocks):
            x = block(x, angles, mask, cache, layer)
            for features, markers in deep:
                if layer < len(features):
                    x = scatter_tokens(x, features[layer].to(x.dtype), markers, mode="add")
        return x

    def angles(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Returns cosine and sine ``[B, 1, L, head_dim / 2]`` of positions, computed in float32."""
        s = self.sizes
        power = torch.arange(0, s.head_dim, 2, dtype=torch.float32, device=positions.device) / s.head_dim
        frequencies = 1.0 / s.rope_theta**power  # [head_dim / 2]
        if s.sections is None:
            angles = positions[..., None].float() * frequencies
        else:
            axes = axes_of(s.sections, s.interleaved).to(positions.device, non_blocking=True)
            angles = positions[axes].permute(1, 2, 0).float() * frequencies
        return angles.cos().to(dtype)[:, None], angles.sin().to(dtype)[:, None]


def axes_of(sections: tuple[int, int, int], interleaved: bool) -> Tensor:
    """Returns the axis (0: t, 1: h, 2: w) of each rotary frequency, int64 ``[head_dim / 2]``."""
    if not interleaved:
        return torch.arange(3).repeat_interleave(torch.tensor(sections))
    axes = torch.zeros(sum(sections), dtype=torch.long)
    for axis in (1, 2):
        axes[axis : 3 * sections[axis] : 3] = axis
    return axes


def decoder_sizes(config: Any, **others: Any) -> DecoderSizes:
    """Returns the sizes in the fields ``text_<name>`` of a model's configuration.

    Args:
        others: the values of sizes that the configuration names otherwise.
    """
    fields = {name: f"text_{name}" for name in DecoderSizes._fields if name not in others}
    given = {name: getattr(config, field) for name, field in fields.items() if hasattr(config, field)}
    return DecoderSizes(**given, **others)
