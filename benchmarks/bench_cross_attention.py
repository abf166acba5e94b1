"""`cross_attention` beside PyTorch's SDPA with the same mask, FlexAttention, and a loop over images."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from mmkernels import SpanMask
from mmkernels.ops.cross_attention.spec import SPEC
from mmkernels.profiling.benchmark import Call, CantRunError, Peer, Row, measure
from mmkernels.spec import Inputs


def sdpa(inputs: Inputs) -> Call:
    """``F.scaled_dot_product_attention`` with the mask as a dense tensor, built once."""
    query, key, value = _query_key_value(inputs)
    mask: Any = inputs.get("mask")
    if isinstance(mask, SpanMask):
        mask = mask.to_dense(key.shape[2])
    if "bias" in inputs:
        if mask is not None:
            raise CantRunError("takes a mask or a bias, not both")
        mask = inputs["bias"]
    grouped = query.shape[1] != key.shape[1]
    return lambda: F.scaled_dot_product_attention(query, key, value, mask, enable_gqa=grouped)


def loop_over_images(inputs: Inputs) -> Call:
    """SDPA once for each run of queries that see the same keys, without a mask, and the results concatenated."""
    query, key, value = _query_key_value(inputs)
    mask = inputs.get("mask")
    if not isinstance(mask, SpanMask) or mask.shape[1] == 1 or "bias" in inputs:
        raise CantRunError("only where each query sees one image")
    spans = torch.stack(torch.broadcast_tensors(mask.start, mask.end), -1)  # [B, Lq, 2]
    if mask.key_valid is not None or not bool((spans == spans[:1]).all()):
        raise CantRunError("only where all sequences have their images at the same places")
    runs, lengths = spans[0].unique_consecutive(dim=0, return_counts=True)
    places = [slice(int(end - length), int(end)) for end, length in zip(lengths.cumsum(0), lengths, strict=True)]
    images = [slice(*run) for run in runs.tolist()]

    def call() -> Tensor:
        parts = [
            F.scaled_dot_product_attention(query[:, :, at], key[:, :, image], value[:, :, image])
            for at, image in zip(places, images, strict=True)
        ]
        return torch.cat(parts, 2)

    return call


def flex(inputs: Inputs) -> Call:
    """FlexAttention, compiled, with a block mask built once."""
    query, key, value = _query_key_value(inputs)
    if query.requires_grad and query.device.type == "cpu":
        raise CantRunError("has no backward pass on a CPU")
    options: dict[str, Any] = {"enable_gqa": query.shape[1] != key.shape[1]}
    if "bias" in inputs:
        bias = inputs["bias"].expand(query.shape[0], *inputs["bias"].shape[1:])
        options["score_mod"] = lambda score, b, h, i, j: score + bias[b, h, i, j]
    try:
        options["block_mask"] = _block_mask(inputs.get("mask"), query, key)
        compiled = _compiled_flex()
        with torch.no_grad():
            compiled(query, key, value, **options)
    except Exception as error:  # whatever the compiler may say: no compiler, no support for a shape
        raise CantRunError(f"does not compile here: {type(error).__name__}: {_first_line(error)}") from error
    return lambda: compiled(query, key, value, **options)


def _block_mask(mask: SpanMask | Tensor | None, query: Tensor, key: Tensor) -> Any:
    if mask is None:
        return None
    (batch, _, q_len, _), k_len = query.shape, key.shape[2]
    if isinstance(mask, SpanMask) and mask.key_valid is None:
        start, end = (x.expand(batch, q_len).contiguous() for x in (mask.start, mask.end))

        def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (start[b, i] <= j) & (j < end[b, i])
    else:
        dense = mask.to_dense(k_len) if isinstance(mask, SpanMask) else mask
        if dense.shape[1] != 1:
            raise CantRunError("only where all heads share a mask")
        pairs = dense[:, 0].expand(batch, q_len, k_len).contiguous()

        def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return pairs[b, i, j]

    return create_block_mask(sees, batch, None, q_len, k_len, device=str(query.device))


@cache
def _compiled_flex() -> Any:
    torch._dynamo.config.recompile_limit = 256  # one for each configuration and dtype
    return torch.compile(flex_attention, dynamic=False)


def _query_key_value(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    return inputs["query"], inputs["key"], inputs["value"]


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "")


PEERS = (Peer("sdpa", sdpa), Peer("flex", flex), Peer("loop", loop_over_images))


@pytest.mark.rows_of(SPEC)
def test_cross_attention(benchmark: Any, row: Row) -> None:
    measure(benchmark, row, PEERS)
