"""Counts the attention calls of a model by their mask, in one thread."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch


@dataclass(eq=False)
class Calls:
    """Attention calls by mask; see `counting`.

    Args:
        unmasked: every query sees every key.
        spans: the mask is a `SpanMask`: O(Lq + Lk) memory, hidden tiles skipped.
        dense: a bool matrix, because no span mask equals it; `reasons` lists why.
        bias: numbers added to the scores (relative positions, ALiBi).
        conversions: masks that were read or converted to spans: one a forward pass and mask, not one a layer.
        reasons: why masks became a matrix, and how many masks for each reason.
    """

    unmasked: int = 0
    spans: int = 0
    dense: int = 0
    bias: int = 0
    conversions: int = 0
    reasons: Counter[str] = field(default_factory=Counter)

    @property
    def total(self) -> int:
        """All attention calls; 0: no attention of the model runs on ``"mmkernels"``."""
        return self.unmasked + self.spans + self.dense + self.bias


_counters = threading.local()


@contextmanager
def counting() -> Iterator[Calls]:
    """Counts this thread's attention calls inside the ``with`` block, also in nested blocks.

    Calls inside a compiled graph are not counted.

    Example:
        >>> import torch, transformers
        >>> from mmkernels.integrations.transformers import counting, register
        >>> register()
        >>> config = transformers.LlamaConfig(
        ...     hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=100,
        ...     attn_implementation="mmkernels")
        >>> model = transformers.LlamaForCausalLM(config)
        >>> with counting() as calls:
        ...     _ = model(torch.ones(1, 8, dtype=torch.long))
        >>> calls.spans, calls.dense
        (2, 0)
    """
    calls = Calls()
    blocks = active()
    blocks.append(calls)
    try:
        yield calls
    finally:
        blocks.remove(calls)


def active() -> list[Calls]:
    """Returns the counters of this thread's open `counting` blocks."""
    blocks: list[Calls] | None = getattr(_counters, "blocks", None)
    if blocks is None:
        blocks = _counters.blocks = []
    return blocks


def count_conversion(reason: str = "") -> None:
    """Counts a mask that was read; `reason`: why it is dense."""
    if torch.compiler.is_compiling():
        return
    for calls in active():
        calls.conversions += 1
        if reason:
            calls.reasons[reason] += 1
