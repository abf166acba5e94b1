"""What received attention is: the probabilities' columns, summed."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Generator, Tensor

from mmkernels.ops.attention.cases import CASES, attention_cost, case_inputs
from mmkernels.ops.attention.formula import probabilities, visible_keys
from mmkernels.ops.common.cases import normal
from mmkernels.ops.common.dtypes import wide_dtype
from mmkernels.spec import Benchmark, Case, Cost, Inputs, OpSpec


class Arguments(NamedTuple):
    """The record of `attention_received`."""

    query: Tensor  # [B, Hq, Lq, D]
    key: Tensor  # [B or 1, Hkv, Lk, D]
    start: Tensor | None  # the mask, as in MaskTensors
    end: Tensor | None
    key_valid: Tensor | None
    dense: Tensor | None
    bias: Tensor | None  # broadcastable to [B, Hq, Lq, Lk]
    query_weights: Tensor | None  # [B or 1, Hq or 1, Lq]
    scale: float


class Results(NamedTuple):
    """What `attention_received` returns."""

    received: Tensor  # [B, Hq, Lk]


def reference(args: Arguments) -> Tensor:
    """The naive formula."""
    key = args.key.repeat_interleave(args.query.shape[1] // args.key.shape[1], 1)
    weights, _, visible = probabilities(args.query, key, visible_keys(args), args.bias, args.scale, need_lse=False)
    weights = weights.to(wide_dtype(weights))
    if args.query_weights is not None:
        weights = weights * args.query_weights[..., None]
    if visible is not None:
        weights = torch.where(visible, weights, 0.0)
    return weights.sum(2)


_NAMES = ("query", "key", "mask", "bias", "scale")


def _weighted(generator: Generator) -> Inputs:
    inputs = case_inputs("grouped-query", _NAMES)(generator)
    batch, _, q_len, _ = inputs["query"].shape
    weights = torch.randn(batch, 1, q_len, generator=generator, dtype=torch.float64)
    return inputs | {"query_weights": weights}


def _cost(inputs: Inputs, backward: bool) -> Cost:
    return attention_cost(inputs, matmuls=1)


def _benchmark(generator: Generator) -> Inputs:
    return {"query": normal(generator, 1, 16, 1024, 64), "key": normal(generator, 1, 16, 4096, 64)}


SPEC = OpSpec(
    name="attention_received",
    cases=(
        *(Case(id, case_inputs(id, _NAMES)) for id in CASES),
        Case("query weights", _weighted),
    ),
    benchmarks=(
        Benchmark("text looks at image", _benchmark, {"B": 1, "H": 16, "Lq": 1024, "Lk": 4096, "D": 64}, headline=True),
    ),
    cost=_cost,
)
