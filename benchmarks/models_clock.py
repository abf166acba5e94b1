"""Times and counts the attention calls inside of a model's run, and the FLOP that their masks leave.

A call is one of `mmkernels.cross_attention`, whichever module makes it, or one of transformers' function of "sdpa". Of
a training step only the calls of its forward pass are seen.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AttentionInterface

from mmkernels import SpanMask, cross_attention
from mmkernels.meters import time_once

_SDPA = "sdpa"


class Call(NamedTuple):
    """What an attention call's FLOP and bytes depend on."""

    query: torch.Size  # [B, Hq, Lq, D]
    key: torch.Size
    value: torch.Size  # [B, Hkv, Lk, Dv]
    one: bool  # whether the value is a part of the key, and is read with it
    mask: SpanMask | Tensor | None
    size: int  # bytes of an element


class Clock:
    """The attention calls since `clear`.

    Args:
        device: on which they run.

    Attributes:
        seconds: of all calls together.
        calls: what each call of `mmkernels.cross_attention` was.
        sdpa_calls: how many calls of "sdpa" there were.
    """

    def __init__(self, device: torch.device | str) -> None:
        self._device = device
        self.clear()

    def clear(self) -> None:
        self.seconds = 0.0
        self.calls: list[Call] = []
        self.sdpa_calls = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Times the calls inside of the ``with`` block."""
        with ExitStack() as stack:
            original, name = cross_attention, cross_attention.__name__  # this module's is replaced too
            ours = self._timed(original, self._note)
            for module in list(sys.modules.values()):
                if vars(module).get(name) is original:
                    stack.callback(setattr, module, name, original)
                    setattr(module, name, ours)
            theirs = AttentionInterface()[_SDPA]
            stack.callback(AttentionInterface.register, _SDPA, theirs)
            AttentionInterface.register(_SDPA, self._timed(theirs, self._count))
            yield

    def _note(self, query: Tensor, key: Tensor, value: Tensor, mask: Any = None, **_: Any) -> None:
        one = value.data_ptr() == key.data_ptr() and value.stride() == key.stride()
        self.calls.append(Call(query.shape, key.shape, value.shape, one, mask, query.element_size()))

    def _count(self, *_: Any, **__: Any) -> None:
        self.sdpa_calls += 1

    def _timed(self, function: Callable[..., Any], then: Callable[..., None]) -> Callable[..., Any]:
        """Returns a function that is timed; `then` gets its arguments."""

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            results = []
            self.seconds += time_once(lambda: results.append(function(*args, **kwargs)), self._device)
            then(*args, **kwargs)
            return results[0]

        return timed

    def flops(self) -> float:
        """Returns the FLOP of the two matrix products of `calls`, of what their masks show alone."""
        return sum(
            2.0 * visible_pairs(call.mask, *call.query[:3], k_len=call.key[2]) * (call.query[3] + call.value[3])
            for call in self.calls
        )

    def bytes(self) -> int:
        """Returns the bytes of the tensors of `calls`: queries and outputs, keys and values, each moved once."""
        return sum(
            call.size * (prod(call.query) + prod(call.query[:3]) * call.value[3] + prod(call.key))
            + (0 if call.one else call.size * prod(call.value))
            for call in self.calls
        )


def visible_pairs(mask: SpanMask | Tensor | None, batch: int, heads: int, q_len: int, k_len: int) -> int:
    """Returns how many scores of ``[batch, heads, q_len, k_len]`` a mask shows."""
    if mask is None:
        return batch * heads * q_len * k_len
    if isinstance(mask, SpanMask) and mask.key_valid is None:
        seen = (mask.end.clamp(max=k_len).long() - mask.start.clamp(min=0)).clamp(min=0)  # [B or 1, Lq or 1]
        return heads * int(seen.expand(batch, q_len).sum())
    dense = mask.to_dense(k_len) if isinstance(mask, SpanMask) else mask
    return int(dense.expand(batch, heads, q_len, k_len).sum())
