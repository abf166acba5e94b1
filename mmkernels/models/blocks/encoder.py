"""Encoder blocks that the towers of CLIP and SigLIP share: pre-norm layers, a text encoder."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmkernels.masks import SpanMask
from mmkernels.models.blocks.activations import ACTIVATIONS
from mmkernels.nn import CrossAttention
from mmkernels.nn.checks import described
from mmkernels.nn.linear_layer import linear
from mmkernels.runtime.checks import can_look, check_range


class Sizes(NamedTuple):
    """The sizes of a transformer.

    Attributes:
        width, layers, heads: the width, the number of layers, and the number of heads.
        mlp: the width of the feed-forward.
        activation: of the feed-forward, a name in `ACTIVATIONS`.
        eps: of the layer norms.
        dropout: the probability that an attention probability is dropped in training mode.
    """

    width: int
    layers: int
    heads: int
    mlp: int
    activation: str = "gelu"
    eps: float = 1e-5
    dropout: float = 0.0

    @classmethod
    def of(cls, config: Any, tower: str, **others: Any) -> Sizes:
        """Returns the sizes of a tower, from the fields ``<tower>_width`` etc. of a model's configuration.

        Args:
            tower: "vision" or "text".
            others: the values of sizes that the configuration names otherwise.
        """
        names = [name for name in cls._fields if name not in others]
        return cls(**{name: getattr(config, f"{tower}_{name}") for name in names}, **others)


class Heads(NamedTuple):
    """Query and key of one layer's attention, from which its probabilities follow.

    Attributes:
        query, key: ``[B, H, L, D]``, with their norms applied.
    """

    query: Tensor
    key: Tensor


class MLP(nn.Sequential):
    """A linear layer, an activation and a linear layer.

    Args:
        width, hidden: of the input and the output, and between the layers.
        activation: a name in `ACTIVATIONS`.

    Example:
        >>> import torch
        >>> MLP(32, 64, "gelu")(torch.randn(2, 9, 32)).shape
        torch.Size([2, 9, 32])
    """

    def __init__(self, width: int, hidden: int, activation: str) -> None:
        super().__init__(nn.Linear(width, hidden), ACTIVATIONS[activation](), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        """Returns ``[..., width]`` of ``x [..., width]``."""
        for layer in self:
            x = linear(layer, x)
        return x


class EncoderBlock(nn.Module):
    """Self-attention, then a feed-forward, each after a layer norm and with a residual.

    Source: Dosovitskiy et al., "An Image is Worth 16x16 Words", 2021, eq. 2 and 3.
    """

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(sizes.width, eps=sizes.eps)
        self.attention = CrossAttention(sizes.width, num_heads=sizes.heads, bias=True, dropout=sizes.dropout)
        self.mlp_norm = nn.LayerNorm(sizes.width, eps=sizes.eps)
        self.mlp = MLP(sizes.width, sizes.mlp, sizes.activation)

    def forward(self, x: Tensor, mask: SpanMask | None = None) -> Tensor:
        """Returns ``[B, L, width]`` after the block. `mask`: which tokens each token sees; None: all."""
        x = x + self.attention(self.attention_norm(x), mask=mask)
        return x + self.mlp(self.mlp_norm(x))

    def with_heads(self, x: Tensor) -> tuple[Tensor, Heads]:
        """Returns what `forward` returns, and the query and key of the attention, which `forward` does not keep."""
        normed = self.attention_norm(x)
        query = self.attention.query(normed)
        key, value = self.attention.project(normed)
        x = x + self.attention.attend(query, key, value)
        return x + self.mlp(self.mlp_norm(x)), Heads(query, key)


class TextEncoder(nn.Module):
    """Maps tokens ``[B, L]`` to one feature per token, with learned positions.

    Args:
        sizes: of the transformer.
        vocab_size: the number of different tokens.
        length: the largest length of a text, in tokens.
        causal: whether a token sees only the tokens up to its position.

    Raises:
        TypeError, ValueError: in `forward`, tokens or mask have another type or shape, a text is too long, or a token
            is outside the vocabulary. (Values are checked on the CPU only: elsewhere this would sync with the device.)

    Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021, section 2.4.

    Example:
        >>> import torch
        >>> from mmkernels.models.blocks.encoder import Sizes, TextEncoder
        >>> sizes = Sizes(width=32, layers=2, heads=4, mlp=64)
        >>> encoder = TextEncoder(sizes, vocab_size=100, length=16, causal=True)
        >>> encoder(torch.randint(100, (3, 7))).shape
        torch.Size([3, 7, 32])
    """

    def __init__(self, sizes: Sizes, *, vocab_size: int, length: int, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.embed = nn.Embedding(vocab_size, sizes.width)
        self.positions = nn.Parameter(torch.randn(length, sizes.width))
        self.blocks = nn.ModuleList(EncoderBlock(sizes) for _ in range(sizes.layers))
        self.norm = nn.LayerNorm(sizes.width, eps=sizes.eps)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Returns ``[B, L, width]``, after the last norm.

        Args:
            input_ids: integers ``[B, L]``.
            attention_mask: integers or bool ``[B, L]``, 0: padding, which no token sees. None: no padding.
        """
        self._check(input_ids, attention_mask)
        mask = self._mask(input_ids, attention_mask)
        x = self.embed(input_ids) + self.positions[: input_ids.shape[1]]
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x)

    def _mask(self, input_ids: Tensor, attention_mask: Tensor | None) -> SpanMask | None:
        length = input_ids.shape[1]
        mask = SpanMask.causal(length, length, input_ids.device) if self.causal else None
        if attention_mask is None:
            return mask
        valid = attention_mask.bool()
        if valid.device.type == "cpu" and can_look(valid) and bool(valid.all()):
            return mask
        padding = SpanMask.from_key_mask(valid)
        return padding if mask is None else mask & padding

    def _check(self, input_ids: Tensor, attention_mask: Tensor | None) -> None:
        vocab_size, most = self.embed.num_embeddings, len(self.positions)
        if not isinstance(input_ids, Tensor) or input_ids.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"input_ids must be an int32 or int64 tensor, got {described(input_ids)}")
        if input_ids.dim() != 2 or not 1 <= input_ids.shape[1] <= most:
            raise ValueError(f"input_ids must be [B, L], L from 1 to {most}, got shape {tuple(input_ids.shape)}")
        check_range("input_ids", input_ids, 0, vocab_size - 1)
        if attention_mask is None:
            return
        if not isinstance(attention_mask, Tensor) or attention_mask.is_floating_point():
            raise TypeError(f"attention_mask must be a bool or integer tensor, got {described(attention_mask)}")
        if attention_mask.shape != input_ids.shape:
            got = tuple(attention_mask.shape)
            raise ValueError(f"attention_mask must be {list(input_ids.shape)} as input_ids, got shape {got}")
