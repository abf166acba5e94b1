"""What received attention is: the probabilities' columns, summed."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from mmkernels.ops.attention.cases import CASES, attention_cost, case_inputs
from mmkernels.ops.attention.formula import probabilities, visible_keys
from mmkernels.ops.common.cases import normal
from mmkernels.spec import Benchmark, Case, Cost, Inputs, OpSpec


def reference(
    query: Tensor,
    key: Tensor,
    start: Tensor | None,
    end: Tensor | None,
    key_valid: Tensor | None,
    dense: Tensor | None,
    bias: Tensor | None,
    query_weights: Tensor | None,
    scale: float,
) -> Tensor:
    """[B, Hq, Lk]."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    visible = visible_keys(start, end, key_valid, dense, key.shape[2])
    weights, _, visible = probabilities(query, key, visible, bias, scale, need_lse=False)
    weights = weights.to(torch.float64 if query.dtype == torch.float64 else torch.float32)
    if query_weights is not None:
        weights = weights * query_weights[..., None]
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
