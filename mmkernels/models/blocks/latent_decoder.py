"""`LatentDecoder`: DeepSeek-V2's language model, with latent attention and mixtures of experts."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

from torch import Tensor, nn

from mmkernels.masks import SpanMask
from mmkernels.models.blocks.decoder import Decoder, DecoderSizes
from mmkernels.models.blocks.kv_cache import KVCache
from mmkernels.models.blocks.text import SwiGLU
from mmkernels.nn import Experts, LatentAttention, LatentSizes, TopKRouter


class ExpertSizes(NamedTuple):
    """The sizes of a mixture of experts, and which layers have one; the comments give DeepSeek-VL2-small's.

    Attributes:
        experts: of how many experts each token goes to a few (64).
        used: how many it goes to (6).
        mlp: the width of an expert's feed-forward (1408).
        shared: how many further experts each token goes to, which are computed as one (2).
        dense_layers: how many layers, the first ones, have a feed-forward in place of the mixture (1).
        scoring, groups, top_groups, method, scale, normalise: as of `TopKRouter`.
    """

    experts: int
    used: int
    mlp: int
    shared: int = 0
    dense_layers: int = 0
    scoring: str = "softmax"
    groups: int = 1
    top_groups: int = 1
    method: str = "greedy"
    scale: float = 1.0
    normalise: bool = False


class Mixture(nn.Module):
    """The feed-forward of a layer with experts: the few that a router chooses for a token, and those of all tokens.

    Args:
        dim: the width of the tokens.
        sizes: of the experts.
        activation: of the feed-forwards, a name that `Experts` and `ACTIVATIONS` have.

    Source: Dai et al., "DeepSeekMoE", 2024, section 3, equations 9 to 11.

    Example:
        >>> import torch
        >>> Mixture(16, ExpertSizes(experts=8, used=2, mlp=12, shared=1))(torch.randn(3, 5, 16)).shape
        torch.Size([3, 5, 16])
    """

    def __init__(self, dim: int, sizes: ExpertSizes, activation: str = "silu") -> None:
        super().__init__()
        s = sizes
        self.router = TopKRouter(
            dim,
            s.experts,
            s.used,
            s.scoring,
            groups=s.groups,
            top_groups=s.top_groups,
            method=s.method,
            scale=s.scale,
            normalise=s.normalise,
        )
        self.experts = Experts(dim, s.mlp, s.experts, activation)
        self.shared = SwiGLU(dim, s.shared * s.mlp, activation) if s.shared else None

    def forward(self, x: Tensor) -> Tensor:
        """Returns ``[..., dim]`` of ``x [..., dim]``."""
        rows = x.flatten(0, -2)
        weight, index, _ = self.router(rows)
        mixed = self.experts(rows, index, weight).view(x.shape)
        return mixed if self.shared is None else mixed + self.shared(x)


class LatentBlock(nn.Module):
    """Causal latent attention, then a feed-forward or a mixture, each after an RMS norm and with a residual.

    Args:
        sizes: of the decoder.
        latent: of the attention.

    Attributes:
        mlp: a `SwiGLU`, or what is put in its place.

    Source: DeepSeek-AI, "DeepSeek-V2", 2024, section 2, figure 2.
    """

    def __init__(self, sizes: DecoderSizes, latent: LatentSizes, mlp: nn.Module) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(sizes.width, eps=sizes.eps)
        self.attention = LatentAttention(sizes.width, latent, bias=sizes.bias, dropout=sizes.dropout)
        self.mlp_norm = nn.RMSNorm(sizes.width, eps=sizes.eps)
        self.mlp = mlp

    def forward(
        self,
        x: Tensor,
        angles: tuple[Tensor, Tensor],
        mask: SpanMask,
        cache: KVCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        """Returns ``[B, L, width]`` after the block; the arguments are those of `TextBlock`.

        Of each token, `cache` holds the vector that its keys and values are computed from, and nothing else.
        """
        keep = None
        if cache is not None:
            keep = partial(cache.append_compressed, layer, value_dim=self.attention.sizes.kv_rank)
        x = x + self.attention(self.attention_norm(x), angles, mask, keep)
        return x + self.mlp(self.mlp_norm(x))


class LatentDecoder(Decoder):
    """Embeds tokens and maps them, or other embeddings, to hidden states, as DeepSeek-V2 does.

    Args:
        sizes: of the transformer. With latent attention `head_dim` is the number of channels with a position, and
            `kv_heads` counts for nothing.
        experts: of the mixtures.
        latent: of the attention; None: it has keys and values, as in DeepSeekMoE and DeepSeek-VL2-tiny.

    Raises:
        ValueError: `head_dim` is not the latent attention's `rope_dim`, or `heads` differs.

    Source: DeepSeek-AI, "DeepSeek-V2", 2024, section 2.

    Example:
        >>> import torch
        >>> from mmkernels.masks import SpanMask
        >>> sizes = DecoderSizes(width=32, layers=2, heads=4, kv_heads=4, head_dim=8, mlp=64, vocab=100)
        >>> latent = LatentSizes(heads=4, kv_rank=16, nope_dim=8, rope_dim=8, value_dim=8)
        >>> decoder = LatentDecoder(sizes, ExpertSizes(experts=8, used=2, mlp=16, shared=1, dense_layers=1), latent)
        >>> x = decoder.embed(torch.tensor([[5, 6, 7]]))
        >>> decoder(x, torch.arange(3)[None], SpanMask.causal(3, 3)).shape
        torch.Size([1, 3, 32])
    """

    def __init__(self, sizes: DecoderSizes, experts: ExpertSizes, latent: LatentSizes | None = None) -> None:
        if latent is not None and (latent.rope_dim, latent.heads) != (sizes.head_dim, sizes.heads):
            must = f"rope_dim = {sizes.head_dim} and heads = {sizes.heads} as sizes"
            raise ValueError(f"latent must have {must}, got {latent.rope_dim} and {latent.heads}")
        self.experts, self.latent = experts, latent  # before the layers are made
        super().__init__(sizes)

    def _make_block(self, layer: int) -> nn.Module:
        s = self.sizes
        if self.latent is not None:
            return LatentBlock(s, self.latent, self._make_mlp(layer))
        block = super()._make_block(layer)
        if layer >= self.experts.dense_layers:
            block.register_module("mlp", self._make_mlp(layer))
        return block

    def _make_mlp(self, layer: int) -> nn.Module:
        s = self.sizes
        dense = layer < self.experts.dense_layers
        return SwiGLU(s.width, s.mlp, s.activation) if dense else Mixture(s.width, self.experts, s.activation)
