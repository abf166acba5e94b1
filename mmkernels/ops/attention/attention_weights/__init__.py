"""The attention probabilities of chosen queries."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.masks import SpanMask
from mmkernels.ops.attention.attention_weights import chunked
from mmkernels.ops.attention.attention_weights.spec import Arguments, Results, reference
from mmkernels.ops.attention.inputs import prepare
from mmkernels.ops.common.dtypes import wide_dtype
from mmkernels.runtime.backends import cpu_kernel, triton_kernel
from mmkernels.runtime.checks import check_range, check_tensor
from mmkernels.runtime.dispatch import Backend, define, resolve

__all__ = ["attention_weights"]


def attention_weights(
    query: Tensor,
    key: Tensor,
    mask: SpanMask | Tensor | None = None,
    *,
    bias: Tensor | None = None,
    scale: float | None = None,
    rows: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """`cross_attention`'s probabilities for the queries in `rows`: what a token looks at. No gradient.

    Only the chosen rows are computed: memory and time grow with R x Lk, not with Lq x Lk.

    Args:
        query, key, mask, bias, scale: as in `cross_attention`.
        rows: int64 ``[R]`` or ``[B, R]``: which queries, each from 0 to Lq - 1; None: all of them.
        backend: None (the fastest that can), "triton", "cpu", "chunked" or "reference".

    Returns:
        ``[B, Hq, R, Lk]`` float32 (float64 for float64 inputs), 0 where hidden; a row sums to 1, or to 0 where its
        query sees nothing.

    Under autocast query and key are cast to the autocast dtype; the result stays float32.

    Raises:
        TypeError: a wrong dtype or type. ValueError: a wrong shape or device.
        IndexError: a row out of range (CPU tensors outside ``torch.compile``; elsewhere PyTorch's own indexing check).

    Source: Vaswani et al., "Attention Is All You Need", 2017, eq. 1.

    Example:
        >>> import torch, mmkernels
        >>> text, image = torch.randn(1, 4, 6, 16), torch.randn(1, 4, 100, 16)
        >>> last = mmkernels.attention_weights(text, image, rows=torch.tensor([5]))
        >>> last.shape, last.sum(-1).round().unique()
        (torch.Size([1, 4, 1, 100]), tensor([1.]))
    """
    given = prepare(query, key, None, mask, bias, scale)
    args = Arguments(
        query=given.query.detach(),
        key=given.key.detach(),
        start=given.mask.start,
        end=given.mask.end,
        key_valid=given.mask.key_valid,
        dense=given.mask.dense,
        bias=None if given.bias is None else given.bias.detach(),
        scale=given.scale,
    )
    if rows is not None:
        rows = _check_rows(rows, args.query)
        args = args._replace(
            query=_take(args.query, rows, 2),
            start=_take_shared(args.start, rows, 1),
            end=_take_shared(args.end, rows, 1),
            dense=_take_shared(args.dense, rows, 2),
            bias=_take_shared(args.bias, rows, 2),
        )
    weights: Tensor = OP(args, resolve(backend))
    return weights


def _check_rows(rows: Tensor, query: Tensor) -> Tensor:
    """`rows` as [B, R]."""
    check_tensor("rows", rows)
    batch, _, q_len, _ = query.shape
    if rows.dtype != torch.int64:
        raise TypeError(f"rows must be int64, got {rows.dtype}")
    if rows.device != query.device:
        raise ValueError(f"rows must be on query's device {query.device}, got {rows.device}")
    if rows.dim() not in (1, 2) or (rows.dim() == 2 and rows.shape[0] != batch):
        raise ValueError(f"rows must be [R] or [{batch}, R], got shape {tuple(rows.shape)}")
    check_range("rows", rows, 0, q_len - 1, error=IndexError)
    return rows.expand(batch, -1)


def _take_shared(x: Tensor | None, rows: Tensor, dim: int) -> Tensor | None:
    """As `_take`, but a dim of size 1 serves all rows."""
    return x if x is None or x.shape[dim] == 1 else _take(x, rows, dim)


def _take(x: Tensor, rows: Tensor, dim: int) -> Tensor:
    """The chosen rows of dim `dim` of a tensor whose dim 0 is the batch or 1."""
    shape = list(x.shape)
    shape[0], shape[dim] = rows.shape
    index = rows.reshape([rows.shape[0] if d == 0 else rows.shape[1] if d == dim else 1 for d in range(x.dim())])
    return x.expand(rows.shape[0], *x.shape[1:]).gather(dim, index.expand(shape))


def _fake(args: Arguments) -> Tensor:
    query = args.query
    return query.new_empty(*query.shape[:3], args.key.shape[2], dtype=wide_dtype(query))


OP = define(
    "attention_weights",
    Arguments,
    Results,
    fake=_fake,
    backends=[
        triton_kernel(f"{__name__}.triton", "forward"),
        cpu_kernel("attention_weights_cpu"),
        Backend("chunked", chunked.forward),
        Backend("reference", reference),
    ],
)
