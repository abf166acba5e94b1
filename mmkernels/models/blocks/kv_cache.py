"""`KVCache`: keys and values of the text so far, for causal self-attention."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.masks import SpanMask
from mmkernels.nn import TokenBuffer


class KVCache:
    """Keys and values of every self-attention layer, and which of them are padding.

    A model announces the new tokens with `extend`, which answers their positions and the mask, and then appends each
    layer's keys and values.

    Args:
        num_layers: self-attention layers.
        reserve: tokens to allocate at once, where the final length is known.

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
        self._layers = [(TokenBuffer(reserve), TokenBuffer(reserve)) for _ in range(num_layers)]
        self._valid: Tensor | None = None  # bool [B, L]: False: padding
        self._padded = False  # so that unpadded text needs no mask but the causal one

    def __len__(self) -> int:
        """Tokens so far, padding included."""
        return 0 if self._valid is None else self._valid.shape[1]

    @property
    def batch_size(self) -> int | None:
        return None if self._valid is None else self._valid.shape[0]

    def extend(self, valid: Tensor, padded: bool = True) -> tuple[Tensor, SpanMask]:
        """Announce new tokens.

        Args:
            valid: bool ``[B, L]``, False: padding.
            padded: False promises that all are True, which saves a mask.

        Returns:
            Each token's position, int64 ``[B, L]`` (padding isn't counted), and what the L queries see of all keys.
        """
        length = valid.shape[1]
        self._padded = self._padded or padded
        self._valid = valid if self._valid is None else torch.cat([self._valid, valid], dim=1)
        positions = (self._valid.long().cumsum(1)[:, -length:] - 1).clamp(min=0)
        mask = SpanMask.causal(length, len(self), valid.device)
        return positions, mask & SpanMask.from_key_mask(self._valid) if self._padded else mask

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add the new tokens' keys and values ``[B, Hkv, L, D]`` of a layer; all of them, ``[B, Hkv, Lk, D]``."""
        key_buffer, value_buffer = self._layers[layer]
        key_buffer.append(key)
        value_buffer.append(value)
        return key_buffer.view(), value_buffer.view()
