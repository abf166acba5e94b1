"""The mask function of the integration: converts the masks that transformers describes by functions to spans."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils

from mmkernels.integrations.transformers.counts import count_conversion
from mmkernels.integrations.transformers.model_mask import ModelMask
from mmkernels.integrations.transformers.own_attention import check_config
from mmkernels.integrations.transformers.solving import UnreadableError
from mmkernels.integrations.transformers.stand_in import mask_dtype
from mmkernels.integrations.transformers.symbols import read
from mmkernels.masks import SpanMask
from mmkernels.runtime.checks import can_look
from mmkernels.runtime.eager import transform_active


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: Tensor | ModelMask | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> ModelMask:
    """The function for ``AttentionMaskInterface``: called once a forward pass and kind of mask, for all layers.

    The arguments are those of ``transformers.masking_utils.sdpa_mask``. On an accelerator, masks that depend on data
    (image blocks, packed sequences) wait for the device once.

    Returns:
        a mask of spans; of a matrix if the function can't be read or no span mask equals it, and the reason is counted.
        Never None, not even where nothing is hidden: a model with an attention of its own would not apply it, and a
        module that does not say whether it is causal would be taken for one that is.

    Raises:
        NotImplementedError: the model does not use transformers' attention interface, and would misread the mask.
        ValueError: `attention_mask` is not ``[B, Lk]``.
    """
    if isinstance(attention_mask, ModelMask):  # a model may request a mask twice
        return attention_mask
    before = mask_dtype(kwargs.get("config"), kwargs.get("dtype"))
    if before is None and not torch.compiler.is_compiling():
        check_config(kwargs.get("config"))
    causal = mask_function is masking_utils.causal_mask_function
    bidirectional = mask_function is masking_utils.bidirectional_mask_function
    keys = _visible_keys(attention_mask, kv_length, kv_offset)
    shape = (batch_size, 1, q_length, kv_length)
    if keys is None:
        newest = q_length == 1 and isinstance(q_offset, int) and q_offset + 1 >= kv_offset + kv_length
        if bidirectional and allow_is_bidirectional_skip:
            return ModelMask(None, shape, device, omitted=True, before=before)
        if causal and newest and allow_is_causal_skip:
            return ModelMask(None, shape, device, before=before)
    first = q_offset - kv_offset  # the key at the first query's position
    spans: SpanMask | None
    if causal:
        spans = causal_from(first, q_length, device)
    elif bidirectional:
        zero = torch.zeros((1, 1), dtype=torch.int32, device=device)
        spans = SpanMask(zero, zero + kv_length)  # in a trace, torch.tensor would fix the example's length
    elif torch.compiler.is_compiling():
        spans, reason = _window(q_length, first, device, local_size, allow_is_causal_skip, **kwargs), ""
    else:
        query, key = (torch.arange(n, device=device) for n in (q_length, kv_length))
        spans, reason = _read(mask_function, batch_size, query + q_offset, key + kv_offset)
    if spans is None:
        count_conversion(reason)
        matrix = masking_utils.sdpa_mask(
            batch_size,
            q_length,
            kv_length,
            q_offset,  # type: ignore[arg-type]  # a static cache passes a tensor, against the annotation
            kv_offset,
            mask_function,
            attention_mask,
            allow_is_causal_skip=False,
            use_vmap=use_vmap,
            device=device,
        )
        assert matrix is not None  # neither way to leave it out is allowed
        return ModelMask(matrix, matrix.shape, matrix.device, before=before)
    if keys is not None:
        spans = _hide(spans, keys)
    count_conversion()
    return ModelMask(spans, shape, spans.device, before=before)


def _visible_keys(attention_mask: Tensor | None, kv_length: int, kv_offset: int) -> Tensor | None:
    """Returns a tokenizer's mask for the keys of this call, bool [B, Lk]; keys that it lacks are hidden.

    None: no key is hidden, as far as is known without waiting for a device.
    """
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2:
        raise ValueError(f"attention_mask must be [B, Lk] or [B, 1, Lq, Lk], got shape {tuple(attention_mask.shape)}")
    keys = attention_mask[:, kv_offset : kv_offset + kv_length].to(torch.bool)
    missing = kv_length - keys.shape[1]
    if missing > 0:
        return torch.nn.functional.pad(keys, (0, missing))
    if keys.is_cpu and can_look(keys) and bool(keys.all()):
        return None
    return keys


def causal_from(first: int | Tensor, q_len: int, device: torch.device | str) -> SpanMask:
    """Returns the mask by which query i sees the keys up to ``first + i``."""
    if (
        torch.compiler.is_compiling()
        or not isinstance(first, int)
        or torch._C._get_tracing_state() is not None
        or transform_active()
    ):
        end = torch.arange(1, q_len + 1, device=device) + first  # no wait for a static cache's `first`
        return SpanMask(end.new_zeros(1, 1, dtype=torch.int32), end.to(torch.int32)[None])
    return _cached_causal(first, q_len, torch.device(device))


@lru_cache(maxsize=64)
def _cached_causal(first: int, q_len: int, device: torch.device) -> SpanMask:
    with torch.inference_mode(False):  # the cached mask may be used in training
        end = torch.arange(first + 1, first + 1 + q_len, dtype=torch.int32, device=device)[None]
        return SpanMask(end.new_zeros(1, 1), end)


def _window(
    q_len: int,
    first: int | Tensor,
    device: torch.device | str,
    size: int | None,
    may_be_causal: bool,
    config: Any = None,
    **kwargs: Any,
) -> SpanMask | None:
    """Returns a causal sliding window if the arguments beside the function prove that the mask is one."""
    if size is None or not may_be_causal or getattr(config, "attention_chunk_size", None) is not None:
        return None
    causal = causal_from(first, q_len, device)
    return SpanMask(causal.end - size, causal.end)


def _hide(spans: SpanMask, keys: Tensor) -> SpanMask:
    """Hides padding: at the ends of the keys by moving the spans' ends, else by a mask of single keys."""
    if not keys.is_cpu or not can_look(keys):
        return spans & SpanMask.from_key_mask(keys)
    places = keys.view(torch.uint8)  # [B, Lk]
    start, count = places.argmax(-1, keepdim=True), places.sum(-1, keepdim=True)
    end = start + count
    if not bool((end == keys.shape[1]).all()):  # else all padding is on the left
        last = keys.shape[1] - places.flip(-1).argmax(-1, keepdim=True)
        if not bool(((end == last) | (count == 0)).all()):
            return spans & SpanMask.from_key_mask(keys)
    return spans & SpanMask(start.to(torch.int32), end.to(torch.int32))


def _read(function: Callable[..., Any], batch_size: int, query: Tensor, key: Tensor) -> tuple[SpanMask | None, str]:
    """Returns the function's spans; or None and the reason why it has none."""
    try:
        start, end, key_valid, exact = read(function, torch.arange(batch_size, device=key.device), query, key).spans()
    except UnreadableError as reason:
        return None, str(reason)
    if exact and not exact[0].is_meta:
        all_exact = torch.stack(exact).all()
        if not can_look(all_exact):
            return None, "a graph is traced, which must not depend on values"
        if not bool(all_exact):
            return None, "the mask shows a query more than one run of keys"
    spans = SpanMask(*(x.to(key.device, torch.int32) for x in (start, end)))
    return (spans if key_valid is None else _hide(spans, key_valid)), ""
