"""Sequences packed into one row: images, windows or recordings of a tower, described by where each of them ends."""

from __future__ import annotations

import threading
from collections.abc import MutableMapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from mmkernels.integrations.transformers.counts import count_conversion
from mmkernels.integrations.transformers.model_mask import Visible
from mmkernels.masks import SpanMask
from mmkernels.runtime.checks import can_look


class Packed(NamedTuple):
    """``cu_seq_lens_q`` and ``cu_seq_lens_k`` of a call: where each sequence begins, then where the last one ends."""

    q: Tensor  # int [N + 1]
    k: Tensor  # int [N + 1]


class _Cached(NamedTuple):
    k: Tensor | None  # None: the same tensor, of which the cache must hold no reference
    versions: tuple[int, int]
    sizes: tuple[int, int, bool]
    spans: SpanMask


_spans: MutableMapping[Tensor, _Cached] = WeakTensorKeyDictionary()
_lock = threading.Lock()


def read_packed(module: Any, key: Tensor, q: Any, k: Any) -> Packed | None:
    """Returns the lengths of a call's sequences; None: the call gives none, so that a row is one sequence.

    Raises:
        ValueError, TypeError: the arguments are not what a packed call gives.
        NotImplementedError: there is more than one row.
    """
    if q is None and k is None:
        return None
    for name, ends in (("cu_seq_lens_q", q), ("cu_seq_lens_k", k)):
        if not isinstance(ends, Tensor) or ends.dtype not in (torch.int32, torch.int64):
            got = ends.dtype if isinstance(ends, Tensor) else type(ends).__name__
            raise TypeError(f"{name} must be an int32 or int64 tensor, as its partner is given, got {got}")
        if ends.dim() != 1 or ends.shape[0] < 1:
            raise ValueError(f"{name} must be [sequences + 1], got shape {tuple(ends.shape)}")
    if q.shape != k.shape:
        raise ValueError(f"cu_seq_lens_k must have the shape of cu_seq_lens_q, {tuple(q.shape)}, got {tuple(k.shape)}")
    if key.shape[0] != 1:
        raise NotImplementedError(
            f'attn_implementation="mmkernels" takes packed sequences (cu_seq_lens_q) in one row, got {key.shape[0]} '
            f"rows from {type(module).__name__}"
        )
    return Packed(q, k)


def packed_spans(packed: Packed, q_len: int, k_len: int, causal: bool) -> SpanMask:
    """Returns the mask by which the queries of a sequence see its keys alone: once for all layers that share `packed`.

    The result is cached while the tensors live and are not written to. On a CPU the numbers are checked, once; on a
    device nothing waits for them.

    Args:
        causal: the last query of a sequence sees all of its keys, each query before it one key less.

    Raises:
        ValueError: the sequences do not fill the row.
    """
    q, k = packed
    if not (can_look(q) and can_look(k)):
        return _spans_of(packed, q_len, causal)
    sizes = (q_len, k_len, causal)
    cacheable = not any(x.is_inference() or torch._C._functorch.is_functorch_wrapped_tensor(x) for x in packed)
    if cacheable:
        with _lock:
            cached = _spans.get(q)
        if cached is not None and (q if cached.k is None else cached.k) is k:
            if cached[1:3] == ((q._version, k._version), sizes):
                return cached.spans
    if q.is_cpu:
        _check_ends("cu_seq_lens_q", q, q_len)
        _check_ends("cu_seq_lens_k", k, k_len)
    with torch.inference_mode(q.is_inference()):  # spans made for inference could not be used in training later
        spans = _spans_of(packed, q_len, causal)
    count_conversion()
    if cacheable:
        with _lock:
            _spans[q] = _Cached(None if k is q else k, (q._version, k._version), sizes, spans)
    return spans


def _spans_of(packed: Packed, q_len: int, causal: bool) -> SpanMask:
    spans = SpanMask.packed(packed.q.diff(), packed.k.diff(), q_len=q_len)
    if not causal:
        return spans
    place = torch.arange(q_len, device=packed.q.device)
    q_end = packed.q[torch.searchsorted(packed.q, place, right=True).clamp(max=packed.q.shape[0] - 1)]  # [Lq]
    return SpanMask(spans.start, (spans.end - (q_end - 1 - place)).to(torch.int32))


def _check_ends(name: str, ends: Tensor, length: int) -> None:
    if int(ends[0]) != 0 or int(ends[-1]) != length or bool((ends.diff() < 0).any()):
        raise ValueError(
            f"{name} must rise from 0 to the {length} tokens of the row, got {ends[:8].tolist()}"
            f"{' ...' if ends.shape[0] > 8 else ''} up to {int(ends[-1])}"
        )


def both(visible: Visible, spans: SpanMask, k_len: int) -> Visible:
    """Returns what is visible in a model's mask and within the sequence."""
    if visible is None:
        return spans
    if isinstance(visible, SpanMask):
        return visible & spans
    return visible & spans.to_dense(k_len)
