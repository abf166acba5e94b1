"""Masks that a model builds itself as a matrix: looked through once, for all layers that they are handed to."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mmkernels.integrations.transformers.counts import count_conversion
from mmkernels.masks import SpanMask


class Reading(NamedTuple):
    """A model's matrix as `cross_attention` takes it: what it hides, and what it adds to the scores."""

    mask: SpanMask | Tensor | None = None
    bias: Tensor | None = None
    reason: str = ""  # why the mask is dense


class _Kept(NamedTuple):
    version: int | None  # of the matrix when it was read; None: PyTorch keeps none
    copy: Tensor | None  # then its values
    reading: Reading


def read_matrix(matrix: Tensor, dtype: torch.dtype) -> Reading:
    """What a mask matrix ``[B or 1, H or 1, Lq or 1, Lk]`` says: spans where it can, else bool, else a bias.

    Of a matrix of numbers, those at most half of its dtype's most negative value hide, as models write it; the others
    are added to the scores, unless all are 0. The answer is kept with the tensor until it is changed in place. Looking
    at values waits for the device, once a matrix; inside ``torch.compile``, and where the matrix wants a gradient,
    nothing is looked at.

    Args:
        dtype: the query's, which a bias that is not float32 takes on.

    Raises:
        TypeError: the matrix holds whole numbers.
    """
    if matrix.dtype != torch.bool and not matrix.is_floating_point():
        raise TypeError(f"attention_mask must be bool or a floating dtype, got {matrix.dtype}")
    if torch.compiler.is_compiling() or matrix.requires_grad or matrix.is_meta:
        if matrix.dtype == torch.bool:
            return Reading(matrix, reason="a matrix inside torch.compile is not looked through")
        shown, bias = _split(matrix, dtype)
        return Reading(shown, bias)
    kept: _Kept | None = getattr(matrix, "_mmkernels_mask", None)
    if kept is not None and _unchanged(matrix, kept):
        return kept.reading
    version = None if matrix.is_inference() else matrix._version
    reading = _look_through(matrix.detach(), dtype)
    matrix._mmkernels_mask = _Kept(version, matrix.clone() if version is None else None, reading)  # type: ignore[attr-defined]
    count_conversion(reading.reason)
    return reading


def _unchanged(matrix: Tensor, kept: _Kept) -> bool:
    if kept.copy is None:
        return matrix._version == kept.version
    return torch.equal(matrix, kept.copy)


def _look_through(matrix: Tensor, dtype: torch.dtype) -> Reading:
    matrix = _shared(matrix)
    if matrix.dtype != torch.bool:
        shown, bias = _split(matrix, dtype)
        if bool(bias.any()):
            return Reading(None if bool(shown.all()) else shown, bias)
        matrix = shown
    if bool(matrix.all()):
        return Reading()
    if matrix.dim() < 4:
        matrix = matrix.reshape((1,) * (4 - matrix.dim()) + tuple(matrix.shape))
    if matrix.shape[1] > 1:
        return Reading(matrix, reason="the model's matrix differs by head")
    spans = SpanMask.try_from_dense(matrix)
    if spans is None:
        return Reading(matrix, reason="the model's matrix shows a query more than one run of keys")
    return Reading(spans)


def _shared(matrix: Tensor) -> Tensor:
    """One row for each dim but the last that the matrix was expanded along."""
    for dim in range(matrix.dim() - 1):
        if matrix.stride(dim) == 0 and matrix.shape[dim] > 1:
            matrix = matrix.narrow(dim, 0, 1)
    return matrix


def _split(matrix: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What a matrix of numbers shows, and what it adds to the scores, 0 where it hides."""
    shown = ~(matrix.detach() <= torch.finfo(matrix.dtype).min / 2)  # NaN is no way to hide
    bias = torch.where(shown, matrix, 0.0)
    return shown, bias if bias.dtype in (dtype, torch.float32) else bias.to(dtype)
