"""The random numbers of dropout, the same in every backend: Philox-4x32-10, counted by (b, h, i, j)."""

from __future__ import annotations

import torch
from torch import Tensor

_ROUNDS = 10
_MULTIPLY = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


def keep_mask(seed: Tensor, dropout_p: float, b: Tensor, h: Tensor, i: Tensor, keys: range) -> Tensor:
    """Returns which probabilities (b, h, i, j) are kept, each with probability ``1 - dropout_p``; j runs over `keys`.

    The four words of Philox counter ``(j // 4, i, h, b)`` under key `seed` (low word, high word) serve keys
    ``j // 4 * 4`` to ``+ 3``; an element is kept where its word is at least ``dropout_p * 2^32``.
    Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.

    Args:
        seed: int64, one element.
        b, h, i: int64 index tensors that broadcast against each other, their last dim of size 1.

    Returns:
        bool, the broadcast shape with the last dim ``len(keys)``.
    """
    first = keys.start // 4
    quad = torch.arange(first, -(-keys.stop // 4), device=seed.device)
    words = torch.stack(torch.broadcast_tensors(*_philox((quad, i, h, b), seed.reshape(()))), -1).flatten(-2)
    return words[..., keys.start - 4 * first : keys.stop - 4 * first] >= round(dropout_p * 2**32)


def keep_scale(dropout_p: float) -> float:
    """Returns the factor for the probabilities that are kept."""
    return 0.0 if dropout_p == 1.0 else 1.0 / (1.0 - dropout_p)


def _philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLY[0])
        high1, low1 = _multiply(c2, _MULTIPLY[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def _multiply(x: Tensor, by: int) -> tuple[Tensor, Tensor]:
    """Returns the high and the low word of a 32 x 32 bit product, by halves: int64 does not hold 64 unsigned bits."""
    low, high = (x & 0xFFFF) * by, (x >> 16) * by
    return (high + (low >> 16)) >> 16, (low + ((high & 0xFFFF) << 16)) & _WORD
