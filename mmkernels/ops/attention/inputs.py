"""Argument checks shared by the attention ops, and masks as tensors."""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mmkernels.masks import SpanMask
from mmkernels.runtime.checks import DTYPES, PLAIN, autocast, broadcasts, check_floating, check_number, check_tensor

_DTYPES = frozenset(DTYPES)
_STRIDED = torch.strided


class Scores(Protocol):
    """What the scores of a call are made of: the fields that the records of all attention ops share."""

    @property
    def query(self) -> Tensor: ...  # [B, Hq, Lq, D]
    @property
    def key(self) -> Tensor: ...  # [B or 1, Hkv, Lk, D]
    @property
    def start(self) -> Tensor | None: ...  # as in MaskTensors
    @property
    def end(self) -> Tensor | None: ...
    @property
    def key_valid(self) -> Tensor | None: ...
    @property
    def dense(self) -> Tensor | None: ...
    @property
    def bias(self) -> Tensor | None: ...  # broadcastable to [B, Hq, Lq, Lk]
    @property
    def scale(self) -> float: ...


class MaskTensors(NamedTuple):
    """A mask as the records hold it: spans and `key_valid`, or `dense`, or nothing."""

    start: Tensor | None = None  # int32 [B or 1, Lq or 1]
    end: Tensor | None = None  # int32 [B or 1, Lq or 1]
    key_valid: Tensor | None = None  # bool [B or 1, Lk]
    dense: Tensor | None = None  # bool [B or 1, Hq or 1, Lq or 1, Lk or 1]


_NO_MASK = MaskTensors()


class Names(NamedTuple):
    """What errors call the first tensor of an op, the dims of its scores, and what their rows and columns stand for."""

    first: str = "query"
    dims: str = "[B, Hq, Lq, Lk]"
    rows: str = "queries"
    columns: str = "keys"


_NAMES = Names()


def check_attention(query: Tensor, key: Tensor, value: Tensor | None = None) -> None:
    """Raise unless query [B, Hq, Lq, D], key [B or 1, Hkv, Lk, D], value [B or 1, Hkv, Lk, Dv] fit together."""
    if _fit(query, key, key if value is None else value):
        return
    tensors = {"query": query, "key": key} | ({} if value is None else {"value": value})
    for name, x in tensors.items():
        check_floating(name, x)
        if x.dim() != 4:
            raise ValueError(f"{name} must be 4-D [B, H, L, D], got shape {tuple(x.shape)}")
        if x.dtype != query.dtype:
            raise TypeError(f"{name} must have query's dtype {query.dtype}, got {x.dtype}")
        if x.device != query.device:
            raise ValueError(f"{name} must be on query's device {query.device}, got {x.device}")
    batch, heads, _, dim = query.shape
    if heads < 1 or dim < 1:
        raise ValueError(f"query must have at least one head and one channel, got shape {tuple(query.shape)}")
    if key.shape[3] != dim:
        raise ValueError(f"key must have query's head dim {dim}, got shape {tuple(key.shape)}")
    for name, x in tensors.items():
        if not broadcasts(x.shape[0], batch):
            raise ValueError(f"{name} must have batch 1 or query's {batch}, got shape {tuple(x.shape)}")
        if x.shape[1] < 1 or heads % x.shape[1]:
            raise ValueError(f"{name} must have a number of heads that divides query's {heads}, got {x.shape[1]}")
    if value is not None:
        if value.shape[:3] != key.shape[:3]:
            raise ValueError(
                f"value must be [{', '.join(map(str, key.shape[:3]))}, Dv] as key is, got {tuple(value.shape)}"
            )
        if value.shape[3] < 1:
            raise ValueError(f"value must have at least one channel, got shape {tuple(value.shape)}")


def _fit(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the usual case has nothing wrong with it: `check_attention`'s conditions at a third of their time."""
    if not (type(query) in PLAIN and type(key) in PLAIN and type(value) in PLAIN):
        return False
    if not query.layout is key.layout is value.layout is _STRIDED:
        return False
    dtype = query.dtype
    if dtype not in _DTYPES or key.dtype is not dtype or value.dtype is not dtype:
        return False
    if not (query.is_cpu and key.is_cpu and value.is_cpu) and not query.device == key.device == value.device:
        return False
    try:
        batch, heads, _, dim = query.shape
        key_batch, key_heads, k_len, key_dim = key.shape
        b, h, n, value_dim = value.shape
    except (ValueError, RuntimeError):  # another number of dims; a nested tensor has no shape
        return False
    if key_heads == 0 or heads == 0 or heads % key_heads or not broadcasts(key_batch, batch):
        return False
    return b == key_batch and h == key_heads and n == k_len and key_dim == dim > 0 and value_dim > 0


def check_bias(bias: Tensor, query: Tensor, k_len: int, names: Names = _NAMES) -> Tensor:
    """`bias` as 4-D, broadcastable to [B, Hq, Lq, Lk]."""
    check_tensor("bias", bias)
    if bias.dtype not in (query.dtype, torch.float32):
        raise TypeError(f"bias must be {query.dtype} or float32, got {bias.dtype}")
    return _broadcastable("bias", bias, query, k_len, names)


def take_mask_apart(mask: SpanMask | Tensor | None, query: Tensor, k_len: int, names: Names = _NAMES) -> MaskTensors:
    """Check `mask` against [B, Hq, Lq, Lk] and turn it into tensors."""
    if mask is None:
        return _NO_MASK
    if isinstance(mask, SpanMask):
        batch, q_len = query.shape[0], query.shape[2]
        b, i = mask.shape
        if not broadcasts(b, batch):
            raise ValueError(f"mask must be for batch 1 or {batch}, got {b}")
        if not broadcasts(i, q_len):
            raise ValueError(f"mask must be for 1 or {q_len} {names.rows}, got {i}")
        if mask.key_valid is not None:
            if not broadcasts(mask.key_valid.shape[0], batch):
                raise ValueError(f"mask.key_valid must be for batch 1 or {batch}, got {mask.key_valid.shape[0]}")
            if mask.key_valid.shape[1] != k_len:
                raise ValueError(f"mask.key_valid must be for {k_len} {names.columns}, got {mask.key_valid.shape[1]}")
        if not (mask.start.is_cpu and query.is_cpu) and mask.device != query.device:
            raise ValueError(
                f"mask must be on {names.first}'s device {query.device}, got {mask.device}; see SpanMask.to"
            )
        return MaskTensors(mask.start, mask.end, mask.key_valid)
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a SpanMask, a bool tensor or None, got {type(mask).__name__}")
    check_tensor("mask", mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool (True = visible), got {mask.dtype}; an additive mask is the argument bias")
    return MaskTensors(dense=_broadcastable("mask", mask, query, k_len, names))


def check_scale(scale: float | None, query: Tensor) -> float:
    if scale is None:
        dim = query.shape[3]
        # `math.sqrt` would make a constant of a symbol.
        return dim**-0.5 if isinstance(dim, torch.SymInt) else 1.0 / math.sqrt(dim)
    return check_number("scale", scale, "a finite number")


class Prepared(NamedTuple):
    """Arguments of an attention op, cast by autocast, checked, with the mask as tensors."""

    query: Tensor
    key: Tensor
    value: Tensor  # key, where the op takes no value
    mask: MaskTensors
    bias: Tensor | None
    scale: float


def prepare(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    mask: SpanMask | Tensor | None,
    bias: Tensor | None,
    scale: float | None,
) -> Prepared:
    """Returns what every attention op begins with: its arguments cast, checked and taken apart into tensors."""
    if value is None:
        query, key = autocast(query, key)
        value = key
        check_attention(query, key)
    else:
        query, key, value = autocast(query, key, value)
        check_attention(query, key, value)
    k_len = key.shape[2]
    masks = _NO_MASK if mask is None else take_mask_apart(mask, query, k_len)
    bias = None if bias is None else check_bias(bias, query, k_len)
    return Prepared(query, key, value, masks, bias, check_scale(scale, query))


def _broadcastable(name: str, x: Tensor, query: Tensor, k_len: int, names: Names) -> Tensor:
    batch, heads, q_len, _ = query.shape
    target = (batch, heads, q_len, k_len)
    if x.device != query.device:
        raise ValueError(f"{name} must be on {names.first}'s device {query.device}, got {x.device}")
    if x.dim() > 4 or any(not broadcasts(*dims) for dims in zip(reversed(x.shape), reversed(target), strict=False)):
        raise ValueError(f"{name} must broadcast to {names.dims} = {list(target)}, got shape {tuple(x.shape)}")
    return x.reshape((1,) * (4 - x.dim()) + tuple(x.shape)) if x.dim() < 4 else x
