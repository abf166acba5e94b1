"""What LXMERT and ViLBERT share: the transformers of a text and of an image's regions, which attend to each other."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from mmkernels.masks import SpanMask
from mmkernels.models.blocks.activations import ACTIVATIONS
from mmkernels.models.blocks.kv_cache import KVCache
from mmkernels.models.blocks.text import check_tokens
from mmkernels.nn import PostNormMLP, SelfAttention, co_attention_mask
from mmkernels.runtime.checks import broadcasts, can_look, check_floating, check_range, check_tensor

EPS = 1e-12
"""Of all layer norms, in both models."""


class StreamSizes(NamedTuple):
    """The sizes of the transformer of one modality.

    Attributes:
        width, heads, mlp: the width, the number of heads, and the width of the feed-forward.
        activation: of the feed-forward, a name in `ACTIVATIONS`.
        dropout: the probability that an attention probability is dropped in training mode.
        residual_dropout: the probability that an element of a branch's result, or of the embeddings, is.
    """

    width: int
    heads: int
    mlp: int
    activation: str = "gelu"
    dropout: float = 0.0
    residual_dropout: float = 0.0


class StreamBlock(nn.Module):
    """Self-attention and a feed-forward, each with a residual and a layer norm behind it (BERT's layer).

    Source: Devlin et al., "BERT", 2019, section 3.
    """

    def __init__(self, sizes: StreamSizes) -> None:
        super().__init__()
        s = sizes
        self.attention = SelfAttention(s.width, s.heads, dropout=s.dropout)
        self.norm = nn.LayerNorm(s.width, eps=EPS)
        self.dropout = nn.Dropout(s.residual_dropout)
        self.mlp = stream_mlp(s)

    def forward(self, x: Tensor, mask: SpanMask | None) -> Tensor:
        """Returns ``[B, L, width]``. `mask`: which tokens each token sees; None: all."""
        return self.mlp(self.norm(x + self.dropout(self.attention(x, mask))))


def stream_mlp(sizes: StreamSizes) -> PostNormMLP:
    """Returns the feed-forward of a layer."""
    s = sizes
    return PostNormMLP(
        s.width, s.mlp, activation=ACTIVATIONS[s.activation], eps=EPS, residual_dropout=s.residual_dropout
    )


def transform(width: int, activation: str) -> nn.Sequential:
    """Returns what precedes the last layer of a head that predicts regions."""
    return nn.Sequential(nn.Linear(width, width), ACTIVATIONS[activation](), nn.LayerNorm(width, eps=EPS))


def classifier(width: int, hidden: int, classes: int) -> nn.Sequential:
    """Returns a head that chooses one of many answers."""
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.LayerNorm(hidden, eps=EPS), nn.Linear(hidden, classes))


class TextEmbeddings(nn.Module):
    """Embeddings of tokens, of their positions and of their types, summed, with a norm.

    Args:
        width: of the embeddings.
        vocab, length, types: the numbers of different tokens, of positions and of token types.
        dropout: the probability that an element is dropped in training mode.
        untrained_first: whether position 0 and type 0 get no gradient, as token 0 does (in LXMERT's code).
    """

    def __init__(
        self, width: int, *, vocab: int, length: int, types: int, dropout: float, untrained_first: bool
    ) -> None:
        super().__init__()
        padding = 0 if untrained_first else None
        self.embed = nn.Embedding(vocab, width, padding_idx=0)
        self.positions = nn.Embedding(length, width, padding_idx=padding)
        self.types = nn.Embedding(types, width, padding_idx=padding)
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.dropout = nn.Dropout(dropout)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor | None) -> Tensor:
        """Returns ``[B, L, width]`` of tokens ``[B, L]``; types: ``[B, L]``, or None: all 0."""
        return self.dropout(self.norm(self.sum(input_ids, token_type_ids)))

    def sum(self, input_ids: Tensor, token_type_ids: Tensor | None) -> Tensor:
        """Returns ``[B, L, width]`` before the norm."""
        positions = self.positions(torch.arange(input_ids.shape[1], device=input_ids.device))
        types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        return self.embed(input_ids) + positions + self.types(types)


class Masks(NamedTuple):
    """Which tokens see which; None: all.

    Attributes:
        text, vision: within a modality.
        both: from each modality to the other, over the tokens of both, the text's first or the image's, see `of`.
    """

    text: SpanMask | None
    vision: SpanMask | None
    both: SpanMask

    @classmethod
    def of(cls, text: Tensor, vision: Tensor, valid: Tensor | None, seen: Tensor | None, *, text_first: bool) -> Masks:
        """Returns the masks of both modalities.

        Args:
            text, vision: tensors ``[B, L, ...]`` and ``[B, R, ...]``, of which only the sizes count.
            valid, seen: bool ``[B, L]`` and ``[B, R]``, False: padding; None: there is none.
            text_first: whether the text's tokens precede the image's in `both`.
        """
        sides = ((text.shape[1], valid), (vision.shape[1], seen))
        (len_a, valid_a), (len_b, valid_b) = sides if text_first else sides[::-1]
        own = [None if x is None else SpanMask.from_key_mask(x) for x in (valid, seen)]
        return cls(own[0], own[1], co_attention_mask(len_a, len_b, valid_a, valid_b, device=text.device))


class Inputs(NamedTuple):
    """Checked inputs.

    Attributes:
        valid, seen: which tokens, ``[B, L]``, and which regions, ``[B, R]``, are no padding, bool; None: all.
    """

    valid: Tensor | None
    seen: Tensor | None


def check_inputs(
    input_ids: Tensor,
    token_type_ids: Tensor | None,
    attention_mask: Tensor | None,
    features: tuple[str, Tensor, int],
    boxes: tuple[str, Tensor, int],
    region_mask: tuple[str, Tensor | None],
    *,
    embeddings: TextEmbeddings,
    labels: Tensor | None = None,
    one_for_all: bool = False,
) -> Inputs:
    """Raises unless a text and an image's regions fit each other and the model; returns what is padding.

    Args:
        features, boxes: the argument's name, its value, and the width that it must have.
        region_mask: the argument's name and its value.
        one_for_all: whether one text may come with many images, or one image with many texts.
    """
    vocab, length = embeddings.embed.num_embeddings, embeddings.positions.num_embeddings
    valid, padded = check_tokens(input_ids, attention_mask, labels, vocab, KVCache(0))
    if not 1 <= input_ids.shape[1] <= length:
        raise ValueError(f"input_ids must have 1 to {length} tokens, got {input_ids.shape[1]}")
    if token_type_ids is not None:
        check_tensor("token_type_ids", token_type_ids)
        if token_type_ids.dtype not in (torch.int32, torch.int64) or token_type_ids.shape != input_ids.shape:
            got = f"{token_type_ids.dtype} {tuple(token_type_ids.shape)}"
            raise ValueError(f"token_type_ids must be integers {list(input_ids.shape)} as input_ids, got {got}")
        check_range("token_type_ids", token_type_ids, 0, embeddings.types.num_embeddings - 1)
    rows = input_ids.shape[0]
    name, x, width = features
    check_floating(name, x)
    fits = x.dim() == 3 and (x.shape[0] == rows or (one_for_all and (broadcasts(x.shape[0], rows) or rows == 1)))
    if not fits or x.shape[2] != width:
        batch = str(rows) if not one_for_all else "B" if rows == 1 else f"{rows} or 1"
        raise ValueError(f"{name} must be [{batch}, R, {width}], got shape {tuple(x.shape)}")
    must = (x.shape[0], x.shape[1], boxes[2])
    check_floating(boxes[0], boxes[1])
    if boxes[1].shape != must:
        raise ValueError(f"{boxes[0]} must be {list(must)} as {name}, got shape {tuple(boxes[1].shape)}")
    return Inputs(valid if padded else None, _seen(*region_mask, must[0], must[1]))


def _seen(name: str, mask: Tensor | None, batch: int, regions: int) -> Tensor | None:
    """Returns which regions are no padding, bool ``[B, R]``; None: all."""
    if mask is None:
        return None
    check_tensor(name, mask)
    if tuple(mask.shape) != (batch, regions):
        raise ValueError(f"{name} must be [{batch}, {regions}], got shape {tuple(mask.shape)}")
    seen = mask.bool()
    return None if seen.device.type == "cpu" and can_look(seen) and bool(seen.all()) else seen
