"""`OPTDecoder`: OPT's language model, with learned positions, layer norms and a plain feed-forward."""

from __future__ import annotations

from torch import Tensor, nn

from mmkernels.masks import SpanMask
from mmkernels.models.blocks.decoder import Decoder, DecoderSizes
from mmkernels.models.blocks.encoder import EncoderBlock, Sizes
from mmkernels.models.blocks.kv_cache import KVCache

_FIRST_POSITION = 2
"""The row of the table of positions for position 0: OPT's table begins with two that no token uses."""


class OPTDecoder(Decoder):
    """A `Decoder` as in OPT.

    Args:
        sizes: of the transformer; `kv_heads` and `head_dim` follow from `heads`, and nothing is rotary.
        length: the most tokens of a text.

    Source: Zhang et al., "OPT: Open Pre-trained Transformer Language Models", 2022, section 2.

    Example:
        >>> import torch
        >>> from mmkernels.masks import SpanMask
        >>> sizes = DecoderSizes(width=32, layers=2, heads=4, kv_heads=4, head_dim=8, mlp=64, vocab=100)
        >>> decoder = OPTDecoder(sizes, length=16)
        >>> x = decoder.embed(torch.tensor([[5, 6, 7]]))
        >>> decoder(x, torch.arange(3)[None], SpanMask.causal(3, 3)).shape
        torch.Size([1, 3, 32])
    """

    def __init__(self, sizes: DecoderSizes, *, length: int) -> None:
        super().__init__(sizes)
        self.positions = nn.Embedding(length + _FIRST_POSITION, sizes.width)

    def _make_block(self, layer: int) -> nn.Module:
        s = self.sizes
        sizes = Sizes(s.width, s.layers, s.heads, s.mlp, s.activation, s.eps, s.dropout)
        return OPTBlock(sizes, s.residual_dropout)

    def _make_norm(self) -> nn.Module:
        return nn.LayerNorm(self.sizes.width, eps=self.sizes.eps)

    def _placed(self, x: Tensor, positions: Tensor) -> tuple[Tensor, None]:
        return x + self.positions(positions + _FIRST_POSITION), None


class OPTBlock(EncoderBlock):
    """An `EncoderBlock` with a KV cache.

    Args:
        sizes: of the transformer.
        residual_dropout: the chance that an element of a branch's result is dropped, in training mode.
    """

    def __init__(self, sizes: Sizes, residual_dropout: float = 0.0) -> None:
        super().__init__(sizes)
        self.dropout = nn.Dropout(residual_dropout)

    def forward(  # type: ignore[override]
        self, x: Tensor, angles: None, mask: SpanMask, cache: KVCache | None = None, layer: int = 0
    ) -> Tensor:
        """Returns ``[B, L, width]`` after the block.

        Args:
            x: ``[B, L, width]``.
            angles: None: positions were added before the first layer.
            mask, cache, layer: as of `TextBlock`.
        """
        normed = self.attention_norm(x)
        key, value = self.attention.project(normed)
        if cache is not None:
            key, value = cache.append(layer, key, value)
        x = x + self.dropout(self.attention.attend(self.attention.query(normed), key, value, mask))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))
