"""`QFormer`: learned queries look at an image, alone or together with a text (BLIP-2, InstructBLIP)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from mmkernels.masks import SpanMask
from mmkernels.nn.checks import check_dropout, check_features, check_positive, described
from mmkernels.nn.cross_attention import KeyValue
from mmkernels.nn.post_norm import PostNormAttention, PostNormMLP
from mmkernels.runtime.checks import broadcasts, can_look, check_range


class QFormerOutput(NamedTuple):
    """The result of `QFormer.forward`.

    Attributes:
        queries: ``[B, Q, dim]``; None without an image.
        text: ``[B, L, dim]``; None without a text.
    """

    queries: Tensor | None
    text: Tensor | None


class QFormer(nn.Module):
    """BERT with learned queries, which attend to an image in every `cross_every`-th layer.

    The queries, and a text's tokens if there is one, share the self-attention; each has its own feed-forward. Only the
    queries attend to the image.

    Args:
        dim: width of queries and text.
        context_dim: width of the image's features.
        num_queries: learned queries, the visual tokens of an image.
        depth, num_heads, hidden: layers, attention heads, and the width of the feed-forwards; None: ``4 * dim``.
        cross_every: every so many layers, from the first on, attend to the image.
        vocab_size: of the text; None: there is none, and no weights for it.
        text_length: the most tokens of a text.
        activation: makes the feed-forwards' activation.
        eps: of the layer norms.
        dropout: the chance that an attention probability is dropped, in training mode.
        residual_dropout: the chance that an element of a branch's result, or of the embeddings, is; in training mode.

    Raises:
        ValueError: a size is not positive or does not divide; in `forward`, an input has the wrong shape or a text is
            too long. TypeError: an input has the wrong type.

    Source: Li et al., "BLIP-2", 2023, section 3.1, figure 2; with an instruction as text: Dai et al., "InstructBLIP",
    2023, section 2.3.

    Example:
        >>> import torch
        >>> from mmkernels.nn import QFormer
        >>> qformer = QFormer(32, 48, num_queries=8, depth=2, num_heads=4, vocab_size=100)
        >>> image, question = torch.randn(2, 50, 48), torch.randint(100, (2, 6))
        >>> qformer(image).queries.shape
        torch.Size([2, 8, 32])
        >>> qformer(image, question).text.shape
        torch.Size([2, 6, 32])
    """

    def __init__(
        self,
        dim: int = 768,
        context_dim: int = 1408,
        *,
        num_queries: int = 32,
        depth: int = 12,
        num_heads: int = 12,
        hidden: int | None = None,
        cross_every: int = 2,
        vocab_size: int | None = None,
        text_length: int = 512,
        activation: Callable[[], nn.Module] = nn.GELU,
        eps: float = 1e-12,
        dropout: float = 0.0,
        residual_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        hidden = 4 * dim if hidden is None else hidden
        sizes = {"dim": dim, "context_dim": context_dim, "num_queries": num_queries, "depth": depth}
        sizes |= {"hidden": hidden, "cross_every": cross_every, "text_length": text_length}
        for name, size in sizes.items():
            check_positive(name, size)
        check_dropout(residual_dropout)
        self.dim, self.context_dim = dim, context_dim
        self.queries = nn.Parameter(torch.randn(num_queries, dim))
        self.embed = self.positions = None
        if vocab_size is not None:
            check_positive("vocab_size", vocab_size)
            self.embed, self.positions = nn.Embedding(vocab_size, dim), nn.Embedding(text_length, dim)
        self.norm = nn.LayerNorm(dim, eps=eps)
        self.dropout = nn.Dropout(residual_dropout)
        shared: dict[str, Any] = {"eps": eps, "residual_dropout": residual_dropout}
        self.blocks = nn.ModuleList(
            _Block(
                attention=PostNormAttention(dim, num_heads=num_heads, dropout=dropout, **shared),
                cross=PostNormAttention(dim, context_dim, num_heads=num_heads, dropout=dropout, **shared)
                if layer % cross_every == 0
                else None,
                query_mlp=PostNormMLP(dim, hidden, activation=activation, **shared),
                text_mlp=None if vocab_size is None else PostNormMLP(dim, hidden, activation=activation, **shared),
            )
            for layer in range(depth)
        )

    @property
    def num_queries(self) -> int:
        return self.queries.shape[0]

    def project(self, context: Tensor) -> list[KeyValue]:
        """Returns key and value ``[B, H, P, D]`` of an image's features ``[B, P, context_dim]`` for each layer that
        attends to it: computed once, they serve any number of texts."""
        check_features("context", context, self.context_dim)
        return [block.cross.project(context) for block in self._blocks if block.cross is not None]

    def forward(
        self,
        context: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        key_values: Sequence[KeyValue] | None = None,
        context_mask: SpanMask | Tensor | None = None,
        causal: bool = False,
    ) -> QFormerOutput:
        """Returns the queries' features, the text's features, or both.

        Args:
            context: features of images ``[B or 1, P, context_dim]``; None, with no `key_values`: the text alone.
            input_ids: a text, integers ``[B, L]``; None: the image alone.
            attention_mask: bool or integers ``[B, L]``, 0: padding, which nothing sees; None: no padding. As in
                transformers positions count padding: on the left it moves those of the text, on the right it does not.
            key_values: what `project` returned, instead of `context`.
            context_mask: which features each query sees, as in `mmkernels.cross_attention`, ``[B or 1, H or 1, Q, P]``
                if dense; None: all.
            causal: False: queries and text see each other (matching; instructions). True: the queries see only each
                other, as if there were no text; a token sees the queries and the tokens up to its own (generation). A
                text alone is then causal.
        """
        if context is not None and key_values is not None:
            raise ValueError("context must be None with key_values, got both")
        if context is not None:
            key_values = self.project(context)
        if key_values is None and input_ids is None:
            raise ValueError("context or input_ids must be given, got neither")
        if key_values is None and context_mask is not None:
            raise ValueError("context_mask must be None without context and key_values, got one")
        length = self.check_text(input_ids, attention_mask)
        batch = self._batch(input_ids, key_values)
        count = 0 if key_values is None else self.num_queries
        parts = [] if key_values is None else [self.queries.expand(batch, -1, -1)]
        if input_ids is not None:
            assert self.embed is not None and self.positions is not None
            parts.append(self.embed(input_ids) + self.positions.weight[:length])
        x = self.dropout(self.norm(torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]))  # [B, Q + L, dim]
        mask = _mask(count, length, attention_mask, causal, x.device)
        caches = iter(() if key_values is None else key_values)
        for block in self._blocks:
            key_value = next(caches) if block.cross is not None and key_values is not None else None
            x = block(x, count, mask, key_value, context_mask)
        return QFormerOutput(x[:, :count] if count else None, x[:, count:] if length else None)

    @property
    def _blocks(self) -> list[_Block]:
        return [cast(_Block, block) for block in self.blocks]

    def check_text(self, input_ids: Tensor | None, attention_mask: Tensor | None, prefix: str = "") -> int:
        """Raises unless `forward` takes this text; returns its length, 0 without one.

        Args:
            input_ids, attention_mask: as in `forward`.
            prefix: of the arguments' names in errors.
        """
        ids, mask = f"{prefix}input_ids", f"{prefix}attention_mask"
        if input_ids is None:
            if attention_mask is not None:
                raise ValueError(f"{mask} must be None without {ids}, got both")
            return 0
        if self.embed is None or self.positions is None:
            raise ValueError(f"{ids} must be None: this Q-Former was made without vocab_size")
        if not isinstance(input_ids, Tensor) or input_ids.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{ids} must be an int32 or int64 tensor, got {described(input_ids)}")
        most = self.positions.num_embeddings
        if input_ids.dim() != 2 or not 1 <= input_ids.shape[1] <= most:
            raise ValueError(f"{ids} must be [B, L], L from 1 to {most}, got shape {tuple(input_ids.shape)}")
        check_range(ids, input_ids, 0, self.embed.num_embeddings - 1)
        if attention_mask is not None:
            if not isinstance(attention_mask, Tensor) or attention_mask.is_floating_point():
                raise TypeError(f"{mask} must be a bool or integer tensor, got {described(attention_mask)}")
            if attention_mask.shape != input_ids.shape:
                got = tuple(attention_mask.shape)
                raise ValueError(f"{mask} must be {list(input_ids.shape)} as {ids}, got shape {got}")
        return input_ids.shape[1]

    def _batch(self, input_ids: Tensor | None, key_values: Sequence[KeyValue] | None) -> int:
        """Returns the number of rows."""
        if key_values is None:
            assert input_ids is not None
            return input_ids.shape[0]
        layers = sum(block.cross is not None for block in self._blocks)
        if len(key_values) != layers:
            raise ValueError(f"key_values must be of {layers} layers, as project returns, got {len(key_values)}")
        images = key_values[0][0].shape[0]
        if input_ids is None:
            return images
        if not broadcasts(images, input_ids.shape[0]):
            raise ValueError(f"context must have batch 1 or input_ids' {input_ids.shape[0]}, got {images}")
        return input_ids.shape[0]


class _Block(nn.Module):
    """A layer: shared self-attention, the queries' attention to the image, and a feed-forward for each."""

    def __init__(
        self,
        *,
        attention: PostNormAttention,
        cross: PostNormAttention | None,
        query_mlp: PostNormMLP,
        text_mlp: PostNormMLP | None,
    ) -> None:
        super().__init__()
        self.attention = attention
        self.cross = cross
        self.query_mlp = query_mlp
        self.text_mlp = text_mlp

    def forward(
        self,
        x: Tensor,
        count: int,
        mask: SpanMask | None,
        key_value: KeyValue | None,
        context_mask: SpanMask | Tensor | None,
    ) -> Tensor:
        """Returns ``[B, Q + L, dim]``, of which the first `count` are queries."""
        x = self.attention(x, mask=mask)
        queries, text = x[:, :count], x[:, count:]
        parts = []
        if count:
            if self.cross is not None:
                queries = self.cross(queries, key_value=key_value, mask=context_mask)
            parts.append(self.query_mlp(queries))
        if text.shape[1]:
            assert self.text_mlp is not None
            parts.append(self.text_mlp(text))
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


def _mask(
    count: int, length: int, attention_mask: Tensor | None, causal: bool, device: torch.device
) -> SpanMask | None:
    """Returns what queries and tokens see of each other; None: everything."""
    total, mask = count + length, None
    if causal and length:
        mask = SpanMask.prefix_lm(torch.full((1,), count, device=device), total, total)
    if attention_mask is None:
        return mask
    valid = attention_mask.bool()
    if valid.is_cpu and can_look(valid) and bool(valid.all()):
        return mask
    padding = SpanMask.from_key_mask(torch.cat([valid.new_ones(valid.shape[0], count), valid], dim=1))
    return padding if mask is None else mask & padding
