"""Reads masks that a model builds itself as a matrix, once for all layers that use them."""

from __future__ import annotations

import threading
from collections.abc import MutableMapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from mmkernels.integrations.transformers.counts import count_conversion
from mmkernels.masks import SpanMask
from mmkernels.runtime.checks import can_look


class Reading(NamedTuple):
    """A model's matrix as arguments of `cross_attention`: what it hides, and what it adds to the scores."""

    mask: SpanMask | Tensor | None = None
    bias: Tensor | None = None
    reason: str = ""  # why the mask is dense


class _Cached(NamedTuple):
    dtype: torch.dtype  # of the query that it was read for
    version: int | None  # of the matrix when it was read; None: an inference tensor, which has no version
    copy: Tensor | None  # of an inference tensor
    reading: Reading


_readings: MutableMapping[Tensor, _Cached] = WeakTensorKeyDictionary()
_lock = threading.Lock()


def read_matrix(matrix: Tensor, dtype: torch.dtype) -> Reading:
    """Returns a mask matrix ``[B or 1, H or 1, Lq or 1, Lk]`` as spans if possible, else as bool, and as a bias.

    In a matrix of numbers, those at most half of the dtype's most negative value hide, as models write it; the others
    are added to the scores, unless all are 0. The result is cached while the tensor lives, until one of PyTorch's
    in-place operators changes it (writes through ``.data`` or NumPy are not noticed). Reading values waits for the
    device, once a matrix. Inside ``torch.compile``, and if the matrix requires a gradient, no values are read.

    Args:
        dtype: the query's dtype, to which a bias is converted unless it is float32.

    Raises:
        TypeError: the matrix holds whole numbers.
    """
    if matrix.dtype != torch.bool and not matrix.is_floating_point():
        raise TypeError(f"attention_mask must be bool or a floating dtype, got {matrix.dtype}")
    if matrix.numel() == 0:
        return Reading()
    if matrix.requires_grad or not can_look(matrix):
        if matrix.dtype == torch.bool:
            return Reading(matrix)
        shown, bias = _split(matrix, dtype)
        return Reading(shown, bias)
    with _lock:
        cached = _readings.get(matrix)
    if cached is not None and cached.dtype == dtype and _unchanged(matrix, cached):
        return cached.reading
    version = None if matrix.is_inference() else matrix._version
    with torch.inference_mode(matrix.is_inference()):  # else a normal matrix could not be used in training later
        reading = _read(matrix.detach(), dtype)
    with _lock:
        _readings[matrix] = _Cached(dtype, version, matrix.clone() if version is None else None, reading)
    count_conversion(reading.reason)
    return reading


def _unchanged(matrix: Tensor, cached: _Cached) -> bool:
    if cached.copy is None:
        return matrix._version == cached.version
    return torch.equal(matrix, cached.copy)


def _read(matrix: Tensor, dtype: torch.dtype) -> Reading:
    matrix = _shared(matrix)
    rows, row_of = _distinct_rows(matrix.reshape((1,) * (4 - matrix.dim()) + tuple(matrix.shape)))
    bias = None
    if rows.dtype == torch.bool:
        shown = rows
    else:
        shown, bias = _split(rows, dtype)
        bias = bias.index_select(2, row_of) if bool(bias.any()) else None
    if bool(shown.all()):
        return Reading(bias=bias)
    reason = "the model's matrix differs by head"
    if shown.shape[1] == 1:
        spans = SpanMask.try_from_dense(shown)
        if spans is not None:
            start, end = (x.index_select(1, row_of) for x in (spans.start, spans.end))
            return Reading(SpanMask(start, end, spans.key_valid), bias)
        reason = "the model's matrix shows a query more than one run of keys"
    return Reading(shown.index_select(2, row_of), bias, reason)


def _distinct_rows(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the first of each run of equal rows of ``[B, H, Lq, Lk]``, and for each row the index of its equal.

    All queries of one image have equal rows, so that only this pass reads the whole matrix.
    """
    changes = (matrix[:, :, 1:] != matrix[:, :, :-1]).any(-1).any(0).any(0)  # [Lq - 1]
    row_of = torch.nn.functional.pad(changes.cumsum(0), (1, 0))
    first = torch.nn.functional.pad(changes.nonzero()[:, 0] + 1, (1, 0))
    return matrix.index_select(2, first), row_of


def _shared(matrix: Tensor) -> Tensor:
    """Narrows each dim but the last along which the matrix was expanded."""
    for dim in range(matrix.dim() - 1):
        if matrix.stride(dim) == 0 and matrix.shape[dim] > 1:
            matrix = matrix.narrow(dim, 0, 1)
    return matrix


def _split(matrix: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns what a matrix of numbers shows, and what it adds to the scores: 0 where it hides."""
    shown = ~(matrix.detach() <= torch.finfo(matrix.dtype).min / 2)  # NaN does not hide
    bias = torch.where(shown, matrix, 0.0)
    return shown, bias if bias.dtype in (dtype, torch.float32) else bias.to(dtype)
