"""How much attention each key receives from all queries."""

from __future__ import annotations

from torch import Tensor

from mmkernels.masks import SpanMask
from mmkernels.ops.attention.attention_received import chunked
from mmkernels.ops.attention.attention_received.spec import Arguments, Results, reference
from mmkernels.ops.attention.inputs import prepare
from mmkernels.ops.common.dtypes import wide_dtype
from mmkernels.runtime.backends import cpu_kernel, triton_kernel
from mmkernels.runtime.checks import broadcasts, check_tensor
from mmkernels.runtime.dispatch import Backend, define, resolve

__all__ = ["attention_received"]


def attention_received(
    query: Tensor,
    key: Tensor,
    mask: SpanMask | Tensor | None = None,
    *,
    bias: Tensor | None = None,
    scale: float | None = None,
    query_weights: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """``sum_i query_weights[i] * P[i, j]``: the columns of `cross_attention`'s probabilities, summed over queries.

    What visual-token pruning ranks tokens by (FastV, VisionZip) and what grounding looks at; recomputed in tiles, so in
    memory linear in its inputs. No gradient.

    Args:
        query, key, mask, bias, scale: as in `cross_attention`.
        query_weights: float ``[B or 1, Hq or 1, Lq]``: what each query counts; None: 1 each. ``1 / Lq`` gives the mean;
            1 at the last query and 0 elsewhere gives what that query looks at.
        backend: None (the fastest that can), "triton", "cpu", "chunked" or "reference".

    Returns:
        ``[B, Hq, Lk]`` float32 (float64 for float64 inputs). A key that no query sees receives 0; without query_weights
        a head's row sums to the number of queries that see something.

    Under autocast query and key are cast to the autocast dtype; the result stays float32.

    Raises:
        TypeError: a wrong dtype or type. ValueError: a wrong shape or device.

    Source: Chen et al., "An Image is Worth 1/2 Tokens After Layer 2" (FastV), 2024, section 4.1.

    Example:
        >>> import torch, mmkernels
        >>> text, image = torch.randn(1, 4, 6, 16), torch.randn(1, 4, 100, 16)
        >>> received = mmkernels.attention_received(text, image)
        >>> best = received.mean(1).topk(25).indices  # the 25 visual tokens that the text looks at most
        >>> received.shape, best.shape
        (torch.Size([1, 4, 100]), torch.Size([1, 25]))
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
        query_weights=None if query_weights is None else _check_weights(query_weights, given.query),
        scale=given.scale,
    )
    received: Tensor = OP(args, resolve(backend))
    return received


def _check_weights(weights: Tensor, query: Tensor) -> Tensor:
    check_tensor("query_weights", weights)
    batch, heads, q_len, _ = query.shape
    if not weights.is_floating_point():
        raise TypeError(f"query_weights must be floating point, got {weights.dtype}")
    if weights.device != query.device:
        raise ValueError(f"query_weights must be on query's device {query.device}, got {weights.device}")
    shape = tuple(weights.shape)
    if len(shape) != 3 or not broadcasts(shape[0], batch) or not broadcasts(shape[1], heads) or shape[2] != q_len:
        raise ValueError(f"query_weights must be [1 or {batch}, 1 or {heads}, {q_len}], got shape {shape}")
    return weights.detach()


def _fake(args: Arguments) -> Tensor:
    query = args.query
    return query.new_empty(*query.shape[:2], args.key.shape[2], dtype=wide_dtype(query))


OP = define(
    "attention_received",
    Arguments,
    Results,
    fake=_fake,
    backends=[
        triton_kernel(f"{__name__}.triton", "forward"),
        cpu_kernel("attention_received_cpu"),
        Backend("chunked", chunked.forward),
        Backend("reference", reference),
    ],
)
