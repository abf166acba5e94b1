"""BERT as BLIP has it: a text encoder whose layers can also attend to an image, or continue a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from mmkernels.masks import SpanMask
from mmkernels.models.blocks.activations import ACTIVATIONS
from mmkernels.models.blocks.kv_cache import KVCache
from mmkernels.nn import PostNormAttention, PostNormMLP
from mmkernels.nn.cross_attention import KeyValue


class BertSizes(NamedTuple):
    """The sizes of a `Bert`.

    Attributes:
        width, layers, heads, mlp: the width, the number of layers and of heads, and the width of the feed-forward.
        vocab, length: the number of different tokens, and the most tokens of a text.
        context: the width of an image's features.
        activation: of the feed-forward, a name in `ACTIVATIONS`.
        eps: of the layer norms.
        dropout: the probability that an attention probability is dropped in training mode.
        residual_dropout: the probability that an element of a branch's result, or of the embeddings, is.
    """

    width: int
    layers: int
    heads: int
    mlp: int
    vocab: int
    length: int
    context: int
    activation: str = "gelu"
    eps: float = 1e-12
    dropout: float = 0.0
    residual_dropout: float = 0.0

    @property
    def norms(self) -> dict[str, float]:
        """What the parts of a layer have in common."""
        return {"eps": self.eps, "residual_dropout": self.residual_dropout}


class BertBlock(nn.Module):
    """Self-attention, attention to an image if one is given, and a feed-forward; a layer norm follows each.

    Args:
        sizes: of the transformer.
        decoder_attention: whether causal texts have a self-attention of their own, the rest being shared.
    """

    def __init__(self, sizes: BertSizes, *, decoder_attention: bool) -> None:
        super().__init__()
        s = sizes
        attention: dict[str, Any] = {"num_heads": s.heads, "dropout": s.dropout, **s.norms}
        self.attention = PostNormAttention(s.width, **attention)
        self.causal_attention = PostNormAttention(s.width, **attention) if decoder_attention else None
        self.cross = PostNormAttention(s.width, s.context, **attention)
        self.mlp = PostNormMLP(s.width, s.mlp, activation=ACTIVATIONS[s.activation], **s.norms)

    def forward(
        self,
        x: Tensor,
        mask: SpanMask | None,
        key_value: KeyValue | None,
        *,
        causal: bool,
        cache: KVCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        """Returns ``[B, L, width]`` after the block.

        Args:
            x: ``[B, L, width]``.
            mask: of the L queries over all keys, those in the cache first.
            key_value: the image's, of `project` of `cross`; None: the text alone.
            causal: which self-attention is used.
            cache: holds the earlier keys and values; the new ones are appended.
            layer: the number of this layer in `cache`.
        """
        attention = self.causal_attention if causal and self.causal_attention is not None else self.attention
        own = attention.project(x)
        if cache is not None:
            own = cache.append(layer, *own)
        x = attention(x, key_value=own, mask=mask)
        if key_value is not None:
            x = self.cross(x, key_value=key_value)
        return self.mlp(x)


class Bert(nn.Module):
    """Maps tokens ``[B, L]`` to one feature per token, alone or looking at an image.

    Args:
        sizes: of the transformer.
        decoder_attention: as of `BertBlock`.

    Source: Devlin et al., "BERT", 2019; with attention to images: Li et al., "BLIP", 2022, section 3.1, figure 2.

    Example:
        >>> import torch
        >>> sizes = BertSizes(width=32, layers=2, heads=4, mlp=64, vocab=100, length=16, context=48)
        >>> bert, ids = Bert(sizes), torch.randint(100, (2, 7))
        >>> image = bert.project(torch.randn(2, 50, 48))
        >>> bert(ids, torch.ones_like(ids).bool(), False, key_values=image).shape
        torch.Size([2, 7, 32])
    """

    def __init__(self, sizes: BertSizes, *, decoder_attention: bool = False) -> None:
        super().__init__()
        s = sizes
        self.sizes = sizes
        self.embed = nn.Embedding(s.vocab, s.width)
        self.positions = nn.Embedding(s.length, s.width)
        self.norm = nn.LayerNorm(s.width, eps=s.eps)
        self.dropout = nn.Dropout(s.residual_dropout)
        self.blocks = nn.ModuleList(BertBlock(s, decoder_attention=decoder_attention) for _ in range(s.layers))

    def project(self, context: Tensor) -> list[KeyValue]:
        """Returns each layer's key and value ``[B, H, P, D]`` of an image's features ``[B, P, context]``."""
        return [cast(BertBlock, block).cross.project(context) for block in self.blocks]

    def forward(
        self,
        input_ids: Tensor,
        valid: Tensor,
        padded: bool,
        *,
        key_values: Sequence[KeyValue] | None = None,
        causal: bool = False,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Returns ``[B, L, width]``.

        Args:
            input_ids: the new tokens, integers ``[B, L]``, within the vocabulary.
            valid: bool ``[B, L]``, False: padding, which nothing sees.
            padded: False promises that there is none.
            key_values: of the image, as `project` returns them, of batch B or 1; None: the text alone.
            causal: whether a token sees only the tokens up to its own.
            cache: of the earlier tokens, for a causal text; None: there are none.
        """
        mask: SpanMask | None
        if causal:
            positions, mask = (KVCache(0) if cache is None else cache).extend(valid, padded)
        else:
            positions = (valid.long().cumsum(1) - 1).clamp(min=0)
            mask = SpanMask.from_key_mask(valid) if padded else None
        x = self.dropout(self.norm(self.embed(input_ids) + self.positions(positions)))
        for layer, block in enumerate(self.blocks):
            key_value = None if key_values is None else key_values[layer]
            x = block(x, mask, key_value, causal=causal, cache=cache, layer=layer)
        return x


class BertHead(nn.Module):
    """What precedes a language model's last layer, and that layer, which shares its weight with the embeddings.

    Args:
        embed: the embeddings of the tokens that are predicted, ``[vocab, width]``.
        activation, eps: of the layer before the last one.

    Source: Devlin et al., "BERT", 2019; the layer before the last one as in the authors' code.
    """

    def __init__(self, embed: nn.Embedding, activation: str = "gelu", eps: float = 1e-12) -> None:
        super().__init__()
        vocab, width = embed.weight.shape
        self.transform = nn.Sequential(nn.Linear(width, width), ACTIVATIONS[activation](), nn.LayerNorm(width, eps=eps))
        self.last = nn.Linear(width, vocab)
        self.last.weight = embed.weight

    def forward(self, x: Tensor) -> Tensor:
        """Returns the logits ``[..., vocab]`` of ``x [..., width]``."""
        return self.last(self.transform(x))
