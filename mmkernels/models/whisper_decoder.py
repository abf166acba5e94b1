"""The decoder of a `Whisper`: a causal text that attends to the features of a sound, and its cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mmkernels.masks import SpanMask
from mmkernels.models.blocks.audio_encoder import AudioAttention, AudioBlock
from mmkernels.models.blocks.encoder import Sizes
from mmkernels.models.blocks.kv_cache import KVCache
from mmkernels.nn.cross_attention import KeyValue


class Sound(NamedTuple):
    """The features of sounds.

    Attributes:
        features: ``[B, n, width]``, of the encoder.
        lengths: how many features each sound has, integers ``[B]``: nothing sees those behind them; None: all n.
    """

    features: Tensor
    lengths: Tensor | None

    @property
    def mask(self) -> SpanMask | None:
        """Which features a token sees."""
        return None if self.lengths is None else SpanMask.key_padding(self.lengths)


class SoundKeys(NamedTuple):
    """What every layer of the decoder sees of sounds, computed once.

    Attributes:
        layers: key and value of each layer, ``[B, H, n, D]``.
        mask: which of the n features a token sees; None: all.
    """

    layers: Sequence[KeyValue]
    mask: SpanMask | None

    @property
    def batch(self) -> int:
        return self.layers[0][0].shape[0]


class WhisperCache(KVCache):
    """A `KVCache` that also holds the keys and values of the sounds.

    There may be several rows of text for each sound, one behind the other, as the beams of a search are: the keys and
    values of a sound serve them all and are read once for all of them.

    Attributes:
        sound: what `Whisper.project` returned; None: there is none yet.
        heads: layer -> the heads, int64 ``[h]``, whose queries to the sound are kept; empty: none are.
        queries: layer -> of each call of the decoder while heads are set, the queries ``[R, h, L, D]``.
    """

    def __init__(self, num_layers: int, *, reserve: int = 0) -> None:
        super().__init__(num_layers, reserve=reserve)
        self.sound: SoundKeys | None = None
        self.heads: Mapping[int, Tensor] = {}
        self.queries: dict[int, list[Tensor]] = {}

    def keep(self, layer: int, query: Tensor, rows: int) -> None:
        """Keeps the queries of the layer's heads.

        Args:
            layer: the number of the layer.
            query: ``[B, H, rows / B * L, D]``: those of a sound's rows lie one behind the other.
            rows: R, the rows of text.
        """
        if layer in self.heads:
            chosen = query.index_select(1, self.heads[layer])
            per_sound = rows // chosen.shape[0]
            split = chosen.unflatten(2, (per_sound, -1)).transpose(1, 2).flatten(0, 1)  # [R, h, L, D]
            self.queries.setdefault(layer, []).append(split)


class WhisperBlock(AudioBlock):
    """Self-attention, attention to the sound, and a feed-forward, each after a layer norm and with a residual.

    Args:
        sizes, residual_dropout, activation_dropout: as of `AudioBlock`.
    """

    def __init__(self, sizes: Sizes, *, residual_dropout: float = 0.0, activation_dropout: float = 0.0) -> None:
        super().__init__(sizes, residual_dropout=residual_dropout, activation_dropout=activation_dropout)
        self.cross_norm = nn.LayerNorm(sizes.width, eps=sizes.eps)
        self.cross = AudioAttention(sizes.width, sizes.heads, sizes.dropout)

    def decode(self, x: Tensor, mask: SpanMask, sound: SoundKeys, cache: WhisperCache, layer: int) -> Tensor:
        """Returns ``[R, L, width]`` after the block.

        Args:
            x: ``[R, L, width]``, R a multiple of the number of sounds.
            mask: of the L queries over all keys, those in the cache first.
            sound: of all layers.
            cache: holds the earlier keys and values; the new ones are appended.
            layer: the number of this layer.
        """
        normed = self.attention_norm(x)
        key, value = cache.append(layer, *self.attention.project(normed))
        x = x + self.dropout(self.attention.attend(self.attention.query(normed), key, value, mask))
        x = x + self.dropout(self._listen(self.cross_norm(x), sound, cache, layer))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))

    def _listen(self, x: Tensor, sound: SoundKeys, cache: WhisperCache, layer: int) -> Tensor:
        """Returns what ``x [R, L, width]`` hears: all rows of a sound are queries of one call over its keys."""
        rows, length, batch = x.shape[0], x.shape[1], sound.batch
        query = self.cross.query(x.reshape(batch, rows // batch * length, x.shape[2]))
        cache.keep(layer, query, rows)
        return self.cross.attend(query, *sound.layers[layer], sound.mask).reshape(x.shape)


class WhisperDecoder(nn.Module):
    """Maps tokens ``[R, L]`` and sounds to one feature per token, from which the next token is predicted.

    Args:
        sizes: of the transformer.
        vocab_size: the number of different tokens.
        length: the most tokens of a text.
        pad: the token whose embedding gets no gradient.
        residual_dropout, activation_dropout, layer_dropout: as of `AudioEncoder`.

    Source: Radford et al., "Robust Speech Recognition via Large-Scale Weak Supervision", 2022, figure 1.

    Example:
        >>> import torch
        >>> from mmkernels.models.blocks.encoder import Sizes
        >>> decoder = WhisperDecoder(Sizes(32, 2, 4, 64), vocab_size=100, length=16, pad=0)
        >>> sound = decoder.project(Sound(torch.randn(2, 50, 32), None))
        >>> ids = torch.randint(100, (6, 5))  # three texts for each sound
        >>> decoder(ids, torch.ones_like(ids).bool(), False, sound=sound, cache=WhisperCache(2)).shape
        torch.Size([6, 5, 32])
    """

    def __init__(
        self,
        sizes: Sizes,
        *,
        vocab_size: int,
        length: int,
        pad: int,
        residual_dropout: float = 0.0,
        activation_dropout: float = 0.0,
        layer_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.layer_dropout = layer_dropout
        self.embed = nn.Embedding(vocab_size, sizes.width, padding_idx=pad)
        self.positions = nn.Embedding(length, sizes.width)
        self.dropout = nn.Dropout(residual_dropout)
        options = {"residual_dropout": residual_dropout, "activation_dropout": activation_dropout}
        self.blocks = nn.ModuleList(WhisperBlock(sizes, **options) for _ in range(sizes.layers))
        self.norm = nn.LayerNorm(sizes.width, eps=sizes.eps)

    @property
    def layers(self) -> list[WhisperBlock]:
        return [block for block in self.blocks if isinstance(block, WhisperBlock)]

    def project(self, sound: Sound) -> SoundKeys:
        """Returns each layer's key and value of sounds.

        Where no gradient is needed each head's lie together in memory: every token that is written reads all of them,
        which is several times faster than from rows in which the heads take turns.
        """
        pairs = [block.cross.project(sound.features) for block in self.layers]
        together = lambda x: x if x.requires_grad else x.contiguous()
        return SoundKeys([(together(key), together(value)) for key, value in pairs], sound.mask)

    def forward(
        self,
        input_ids: Tensor,
        valid: Tensor,
        padded: bool,
        *,
        sound: SoundKeys,
        cache: WhisperCache,
        drop_layers: bool = False,
    ) -> Tensor:
        """Returns ``[R, L, width]``, after the last norm.

        Args:
            input_ids: the new tokens, integers ``[R, L]``, within the vocabulary; R is a multiple of the number of
                sounds, and the rows of a sound lie one behind the other.
            valid: bool ``[R, L]``, False: padding, which nothing sees.
            padded: False promises that there is none.
            sound: as `project` returns it.
            cache: of the earlier tokens.
            drop_layers: whether layers are left out in training (LayerDrop). What a later call reads of such a layer is
                still put into the cache.
        """
        positions, mask = cache.extend(valid, padded)
        x = self.dropout(self.embed(input_ids) + self.positions(positions))
        for layer, block in enumerate(self.layers):
            dropped = drop_layers and self.training and self.layer_dropout > 0
            if dropped and float(torch.rand(())) < self.layer_dropout:
                cache.append(layer, *block.attention.project(block.attention_norm(x)))
                continue
            x = block.decode(x, mask, sound, cache, layer)
        return self.norm(x)
