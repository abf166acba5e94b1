"""What the attention methods of this package share: heads, dropout, keys of a cache, and the call of our attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from mmkernels.integrations.transformers.attention import attention
from mmkernels.runtime.checks import can_look

KeyValue = tuple[Tensor, Tensor]

CACHE = ("cache", "past_key_values")
"""What transformers calls a cache among a method's arguments: since 5.24, and before."""


def split_heads(x: Tensor, size: int) -> Tensor:
    """Returns ``x [B, L, H * size]`` as ``[B, H, L, size]``. (Where a model is spread by heads, H is not its own.)"""
    return x.view(x.shape[0], x.shape[1], -1, size).transpose(1, 2)


def chance(dropout: Any) -> float:
    """Returns the chance that a dropout layer drops an element now: 0 in evaluation mode, or of another layer."""
    return float(getattr(dropout, "p", 0.0)) if dropout.training else 0.0


_hides: MutableMapping[Tensor, tuple[int, bool]] = WeakTensorKeyDictionary()


def hides_a_row(mask: Any) -> bool:
    """Returns whether a model's mask hides all keys from a query, which reads 0 of ours and the mean of all of theirs.

    Values are read once for a mask, which waits for its device; not in a graph.
    """
    if not isinstance(mask, Tensor) or not mask.is_floating_point() or mask.numel() == 0 or not can_look(mask):
        return False
    version = -1 if mask.is_inference() else mask._version
    known = _hides.get(mask)
    if known is None or known[0] != version or version == -1:
        hides = bool((mask.detach().amax(-1) <= torch.finfo(mask.dtype).min / 2).any())
        known = _hides[mask] = (version, hides)
    return known[1]


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Returns what the heads read, ``[B, Lq, Hq * Dv]``.

    Args:
        module: the model's attention.
        query, key, value: ``[B, H, L, D]``, as `mmkernels.cross_attention` takes them.
        mask: what the model adds to the scores, ``[B or 1, H or 1, Lq or 1, Lk]``; very negative: to hide keys.
        bias: the same, of numbers that hide nothing and have a gradient.
        scale: of the scores; None: ``1 / sqrt(D)``.
        dropout: the chance that a probability is dropped.
    """
    out, _ = attention(
        module,
        query,
        key,
        value,
        mask,
        dropout=dropout,
        scaling=scale,
        is_causal=False,
        position_bias=bias,
        output_attentions=False,
    )
    return out.flatten(2)  # of [B, Lq, Hq, Dv]


def attend_recorded(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float | None = None,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor | None]:
    """Returns what `attend` does, and the probabilities ``[B, Hq, Lq, Lk]`` where transformers records them now."""
    out, weights = attention(module, query, key, value, mask, dropout=dropout, scaling=scale, is_causal=False)
    return out.flatten(2), weights


def keys_and_values(
    module: Any,
    states: Tensor,
    is_cross: bool,
    cache: Any,
    project: Callable[[Tensor], KeyValue],
    update: Mapping[str, Any],
) -> KeyValue:
    """Returns keys and values ``[B, H, L, D]``, by way of a cache of transformers if there is one.

    Args:
        module: the model's attention; its ``layer_idx`` says which layer of the cache is its own.
        states: of which they are made, if the cache does not have them.
        is_cross: whether they are another model's: then the cache takes them once.
        cache: a ``Cache``, a pair of them (``EncoderDecoderCache``), or None.
        project: makes keys and values of states.
        update: further arguments of the cache's ``update``.
    """
    layer, is_pair = module.layer_idx, hasattr(cache, "cross_attention_cache")
    part = (cache.cross_attention_cache if is_cross else cache.self_attention_cache) if is_pair else cache
    if is_cross and is_pair and cache.is_updated.get(layer):
        return part.layers[layer].keys, part.layers[layer].values
    key, value = project(states)
    if cache is not None:
        key, value = part.update(key, value, layer, **update)
        if is_cross and is_pair:
            cache.is_updated[layer] = True
    return key, value
