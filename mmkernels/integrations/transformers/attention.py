"""The attention function, which transformers calls in each layer."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mmkernels.integrations.transformers.counts import active
from mmkernels.integrations.transformers.keywords import DECIDED_BY_NAME, check_keywords
from mmkernels.integrations.transformers.masks import causal_from
from mmkernels.integrations.transformers.matrices import read_matrix
from mmkernels.integrations.transformers.model_mask import NAME, USE_ANOTHER, ModelMask, Visible
from mmkernels.integrations.transformers.packed import Packed, both, packed_spans, read_packed
from mmkernels.integrations.transformers.stand_in import earlier_attention, stand_in
from mmkernels.masks import SpanMask
from mmkernels.ops.attention.attention_weights import attention_weights
from mmkernels.ops.attention.cross_attention import cross_attention
from mmkernels.ops.attention.formula import probabilities
from mmkernels.runtime.checks import broadcasts

_KINDS = ("attentions", "cross_attentions")


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: ModelMask | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    *,
    position_bias: Tensor | None = None,
    s_aux: Tensor | None = None,
    output_attentions: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention for ``AttentionInterface``.

    Under torch.func or in forward mode, as `mmkernels.cross_attention`.

    Args:
        module: the model's attention; if there is no mask and `is_causal` is None, its attribute ``is_causal`` must be
            False.
        query: ``[B or 1, Hq, Lq, D]``. key: ``[B or 1, Hkv, Lk, D]``. value: ``[B or 1, Hkv, Lk, Dv]``.
        attention_mask: the result of `make_mask`; or a matrix that the model built, bool (True = visible) or numbers to
            add to the scores; or None: with `is_causal` and more than one query, query i sees the keys 0 to i.
        dropout: the probability of dropping a weight. scaling: of the scores; None: ``1 / sqrt(D)``.
        position_bias: added to the scores, broadcastable to ``[B, Hq, Lq, Lk]``.
        s_aux: ``[Hq]`` attention sinks: one more score for each query, whose value is 0.
        output_attentions: also return the probabilities, before dropout: ``[B, Hq, Lq, Lk]`` in query's dtype.
        cu_seq_lens_q, cu_seq_lens_k: int32 or int64 ``[N + 1]``: N sequences are packed into the one row, and sequence
            n is the tokens ``cu_seq_lens[n]`` to ``cu_seq_lens[n + 1]``. A query sees what its sequence and the mask
            show; without a mask and with `is_causal`, its last query sees all keys, each one before it one key less.
        kwargs: those of `keywords.WITHOUT_EFFECT`; others must be None.

    Returns:
        ``[B, Lq, Hq, Dv]`` contiguous, and the probabilities or None.

    Raises:
        NotImplementedError: the model needs something that `cross_attention` lacks, such as ``softcap``, or passes a
            keyword argument that would be ignored; or its mask was made for other sizes; or there is no mask and the
            call does not say whether it is causal.
        TypeError, ValueError: as `mmkernels.cross_attention`; or the packed sequences do not fill the row.
    """
    packed = read_packed(module, key, cu_seq_lens_q, cu_seq_lens_k)
    if query.shape[0] < key.shape[0] and query.shape[0] == 1:  # learned queries
        query = query.expand(key.shape[0], -1, -1, -1)
    try:
        if kwargs:
            check_keywords(module, kwargs, packed is not None, attention_mask is not None)
        mask, bias = _mask(module, query, key.shape[2], attention_mask, is_causal, packed)
    except NotImplementedError:
        earlier = earlier_attention(module)
        if earlier is None or packed is not None or any(kwargs.get(name) is not None for name in DECIDED_BY_NAME):
            raise
        others = {
            "dropout": dropout,
            "scaling": scaling,
            "is_causal": is_causal,
            "position_bias": position_bias,
            "s_aux": s_aux,
            "output_attentions": output_attentions,
            **kwargs,
        }
        return earlier(module, query, key, value, attention_mask, others)
    if position_bias is not None:
        bias = position_bias if bias is None else bias + position_bias
    if bias is not None and bias.dtype not in (query.dtype, torch.float32):
        bias = bias.to(query.dtype)
    _count(mask, bias)
    if s_aux is None:
        out, sink = cross_attention(query, key, value, mask, bias=bias, scale=scaling, dropout_p=dropout), None
    else:
        out, lse = cross_attention(
            query, key, value, mask, bias=bias, scale=scaling, dropout_p=dropout, return_lse=True
        )
        sink = torch.sigmoid(lse - s_aux.reshape(1, -1, 1))[..., None]  # [B, Hq, Lq, 1]: the share that the sink leaves
        out = (out * sink).to(out.dtype)
    out = out.transpose(1, 2)
    if not _weights_requested(output_attentions):
        return out, None
    weights = _weights(query, key, mask, bias, scaling)
    return out, (weights if sink is None else weights * sink).to(out.dtype)


def _mask(
    module: torch.nn.Module,
    query: Tensor,
    k_len: int,
    attention_mask: ModelMask | Tensor | None,
    is_causal: bool | None,
    packed: Packed | None,
) -> tuple[Visible, Tensor | None]:
    """Returns the mask and the bias for `cross_attention`."""
    if attention_mask is None and packed is not None:
        return packed_spans(packed, query.shape[2], k_len, _packed_is_causal(module, is_causal)), None
    mask, bias = _whole_row(module, query, k_len, attention_mask, is_causal)
    if packed is not None:
        mask = both(mask, packed_spans(packed, query.shape[2], k_len, causal=False), k_len)
    return mask, bias


def _whole_row(
    module: torch.nn.Module,
    query: Tensor,
    k_len: int,
    attention_mask: ModelMask | Tensor | None,
    is_causal: bool | None,
) -> tuple[Visible, Tensor | None]:
    """Returns the mask and the bias of a call whose rows are one sequence each."""
    if attention_mask is None:
        return _unmasked(module, query, is_causal), None
    if isinstance(attention_mask, ModelMask):
        visible = _visible(module, query, k_len, attention_mask)
        if not isinstance(visible, Tensor):
            return visible, None
        attention_mask = visible
    if not isinstance(attention_mask, Tensor):
        raise TypeError(
            f"attention_mask must be a tensor, None or made for {NAME!r}, got {type(attention_mask).__name__}; "
            "set the implementation with set_attn_implementation, so that masks are made for it"
        )
    mask, bias, _ = read_matrix(attention_mask, query.dtype)
    return mask, bias


def _packed_is_causal(module: torch.nn.Module, is_causal: bool | None) -> bool:
    """Returns whether packed sequences without a mask are causal: as transformers' "flash_attention_2" decides it.

    Raises:
        NotImplementedError: neither the call nor the module says it.
    """
    causal: bool | None = getattr(module, "is_causal", None) if is_causal is None else is_causal
    if causal is None:
        raise NotImplementedError(
            f'attn_implementation="mmkernels" is not for {type(module).__name__}: it packs sequences and does not say '
            f"whether they are causal; {USE_ANOTHER}"
        )
    return causal


def _unmasked(module: torch.nn.Module, query: Tensor, is_causal: bool | None) -> Visible:
    """Returns what a query sees where the model passes no mask; `make_mask` always returns one.

    Raises:
        NotImplementedError: only the module says that it is causal, or nothing does. transformers' "eager" then hides
            nothing and its "sdpa" the later keys, and models rely on either; a patched one, on what it had before.
    """
    q_len = query.shape[2]
    if q_len == 1 or is_causal is False or (is_causal is None and getattr(module, "is_causal", None) is False):
        return None
    name = stand_in(getattr(module, "config", None))
    if is_causal is None and name is not None:
        is_causal = name.before == "sdpa" and getattr(module, "is_causal", True)
        if not is_causal:
            return None
    if is_causal is None:
        raise NotImplementedError(
            f'attn_implementation="mmkernels" is not for {type(module).__name__}: it passes neither a mask nor '
            f'`is_causal`, which transformers\' "sdpa" reads as causal and "eager" as not; {USE_ANOTHER}'
        )
    return causal_from(0, q_len, query.device)  # keys after the last query are hidden


def _visible(module: torch.nn.Module, query: Tensor, k_len: int, mask: ModelMask) -> Visible:
    """Returns what a mask shows.

    Raises:
        NotImplementedError: the mask is of another size, because the model changed the keys and not the mask.
    """
    batch, heads, q_len, _ = query.shape
    if mask.omitted or mask.shape == (batch, 1, q_len, k_len):
        return mask.visible
    sizes = (batch, heads, q_len, k_len)
    if mask.shape[-1] != k_len or mask.ndim != 4 or not all(map(broadcasts, mask.shape, sizes)):
        raise NotImplementedError(
            f'attn_implementation="mmkernels" is not for {type(module).__name__}: its mask was made for '
            f"{list(mask.shape)} and its scores are {list(sizes)}; {USE_ANOTHER}"
        )
    return mask.visible


def _count(mask: Visible, bias: Tensor | None) -> None:
    if torch.compiler.is_compiling():
        return
    for calls in active():
        if bias is not None:
            calls.bias += 1
        elif mask is None:
            calls.unmasked += 1
        elif isinstance(mask, SpanMask):
            calls.spans += 1
        else:
            calls.dense += 1


def _weights_requested(requested: bool | None) -> bool:
    """Returns whether attention weights are requested: by argument, or by transformers' hooks, which record them."""
    if requested is not None or torch.compiler.is_compiling():
        return bool(requested)
    recorded = _collector.get() if _collector is not None else None
    return recorded is not None and any(kind in recorded for kind in _KINDS)


def _find_collector() -> Any:
    """Returns the variable in which transformers lists what the running model records; None: this version has none."""
    try:
        from transformers.utils import output_capturing
    except ImportError:
        return None
    return getattr(output_capturing, "_active_collector", None)


_collector = _find_collector()


def _weights(query: Tensor, key: Tensor, mask: Visible, bias: Tensor | None, scale: float | None) -> Tensor:
    """Returns the probabilities [B, Hq, Lq, Lk], with a gradient if one is needed: only the formula has one."""
    if not (torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (query, key, bias))):
        return attention_weights(query, key, mask, bias=bias, scale=scale)
    heads, k_len, head_dim = query.shape[1], key.shape[2], query.shape[3]
    visible = mask.to_dense(k_len) if isinstance(mask, SpanMask) else mask
    scale = 1.0 / math.sqrt(head_dim) if scale is None else scale
    repeated = key.repeat_interleave(heads // key.shape[1], dim=1)  # [B, Hq, Lk, D]
    return probabilities(query, repeated, visible, bias, scale, need_lse=False)[0]
