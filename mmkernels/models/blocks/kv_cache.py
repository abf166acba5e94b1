"""`KVCache`: the keys and values of previous text tokens, for causal self-attention."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.masks import SpanMask
from mmkernels.nn import TokenBuffer


class KVCache:
    """The keys and values of every self-attention layer, and which tokens are padding.

    A model first calls `extend`, which returns the positions of the new tokens and the mask, and then `append` in each
    layer.

    Args:
        num_layers: the number of self-attention layers.
        reserve: how many tokens to allocate at once, if the final length is known.

    Example:
        >>> import torch
        >>> cache = KVCache(num_layers=1)
        >>> positions, mask = cache.extend(torch.tensor([[False, True, True]]))  # left padding
        >>> positions
        tensor([[0, 0, 1]])
        >>> key, value = cache.append(0, torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8))
        >>> cache.extend(torch.tensor([[True]]))[0]
        tensor([[2]])
    """

    def __init__(self, num_layers: int, *, reserve: int = 0) -> None:
        # Keys and values of each layer, or alone what both are computed from.
        self._layers: list[tuple[TokenBuffer, ...]] = [
            (TokenBuffer(reserve), TokenBuffer(reserve)) for _ in range(num_layers)
        ]
        self._value_dim: int | None = None  # the first channels of a value that describe its token; None: all
        self._valid: Tensor | None = None  # bool [B, L]: False: padding
        self.pending: tuple[Tensor, Tensor] | None = None  # token generated last and its validity, [B, 1]
        self._padded = False  # False: the causal mask suffices

    def __len__(self) -> int:
        return self.num_tokens

    @property
    def num_tokens(self) -> int:
        """The number of tokens, padding included; symbolic where a graph is traced, unlike ``len``."""
        return 0 if self._valid is None else self._valid.shape[1]

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    @property
    def batch_size(self) -> int | None:
        return None if self._valid is None else self._valid.shape[0]

    def extend(self, valid: Tensor, padded: bool = True) -> tuple[Tensor, SpanMask]:
        """Adds new tokens.

        Args:
            valid: bool ``[B, L]``, False: padding.
            padded: False promises that `valid` is True everywhere, which saves a mask.

        Returns:
            The position of each new token, int64 ``[B, L]``, in which padding does not count, and the mask of the L
            queries over all keys.
        """
        length = valid.shape[1]
        self._padded = self._padded or padded
        self._valid = valid if self._valid is None else torch.cat([self._valid, valid], dim=1)
        positions = (self._valid.long().cumsum(1)[:, -length:] - 1).clamp(min=0)
        mask = SpanMask.causal(length, self.num_tokens, valid.device)
        return positions, mask & SpanMask.from_key_mask(self._valid) if self._padded else mask

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Adds the new keys and values ``[B, Hkv, L, D]`` of a layer, and returns all of them, ``[B, Hkv, Lk, D]``."""
        if len(self._layers[layer]) == 1:
            raise ValueError("kv_cache must be of a model that caches keys and values, got one of compressed tokens")
        key_buffer, value_buffer = self._layers[layer]
        key_buffer.append(key)
        value_buffer.append(value)
        return key_buffer.view(), value_buffer.view()

    def append_compressed(self, layer: int, tokens: Tensor, value_dim: int) -> Tensor:
        """Adds what a layer's keys and values are computed from, ``[B, 1, L, C]``; returns all, ``[B, 1, Lk, C]``.

        Args:
            layer: one that `append` is not called for.
            tokens: as `LatentAttention.compress` returns them.
            value_dim: how many of their channels, the first ones, values are computed from.
        """
        if any(buffer.is_filled for buffer in self._layers[layer][1:]):
            raise ValueError("kv_cache must be of a model that caches compressed tokens, got one of keys and values")
        self._layers[layer], self._value_dim = self._layers[layer][:1], value_dim
        (buffer,) = self._layers[layer]
        buffer.append(tokens)
        return buffer.view()

    def take(self, rows: Tensor) -> None:
        """Keeps these rows of the batch, int64 ``[n]``, in this order; a row may be taken more than once (beams)."""
        if self._valid is None:
            return
        self._valid = self._valid[rows]
        if self.pending is not None:
            self.pending = self.pending[0][rows], self.pending[1][rows]
        for buffers in self._layers:
            for buffer in buffers:
                buffer.take(rows)
