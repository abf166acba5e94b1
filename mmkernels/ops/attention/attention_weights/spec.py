"""What attention weights are: the probabilities themselves, for the queries given."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from mmkernels.ops.attention.cases import CASES, attention_cost, case_inputs
from mmkernels.ops.attention.formula import probabilities, visible_keys
from mmkernels.ops.common.cases import normal
from mmkernels.ops.common.dtypes import wide_dtype
from mmkernels.spec import Benchmark, Case, Cost, Inputs, OpSpec


class Arguments(NamedTuple):
    """The record of `attention_weights`; the chosen queries are its queries."""

    query: Tensor  # [B, Hq, Lq, D]
    key: Tensor  # [B or 1, Hkv, Lk, D]
    start: Tensor | None  # the mask, as in MaskTensors
    end: Tensor | None
    key_valid: Tensor | None
    dense: Tensor | None
    bias: Tensor | None  # broadcastable to [B, Hq, Lq, Lk]
    scale: float


class Results(NamedTuple):
    """What `attention_weights` returns."""

    weights: Tensor  # [B, Hq, Lq, Lk]


def reference(args: Arguments) -> Tensor:
    """The naive formula."""
    key = args.key.repeat_interleave(args.query.shape[1] // args.key.shape[1], 1)
    weights, _, visible = probabilities(args.query, key, visible_keys(args), args.bias, args.scale, need_lse=False)
    weights = weights.to(wide_dtype(weights))
    return weights.clone() if visible is None else torch.where(visible, weights, 0.0)


_NAMES = ("query", "key", "mask", "bias", "scale")


def _chosen(per_sequence: bool) -> Callable[[Generator], Inputs]:
    def make(generator: Generator) -> Inputs:
        inputs = case_inputs("grouped-query", _NAMES)(generator)
        batch, _, q_len, _ = inputs["query"].shape
        shape = (batch, 3) if per_sequence else (3,)
        return inputs | {"rows": torch.randint(q_len, shape, generator=generator)}

    return make


def _cost(inputs: Inputs, backward: bool) -> Cost:
    """Of the chosen rows alone; the probabilities are written in float32."""
    rows = inputs.get("rows")
    batch, heads, q_len, _ = inputs["query"].shape
    chosen = q_len if rows is None else rows.shape[-1]
    whole = attention_cost(inputs, matmuls=1)
    key = inputs["key"]
    moved = key.numel() * key.element_size() + 4 * batch * heads * chosen * key.shape[2]
    return Cost(flops=whole.flops * chosen / max(1, q_len), bytes=float(moved))


def _benchmark(generator: Generator) -> Inputs:
    query, key = normal(generator, 1, 16, 1024, 64), normal(generator, 1, 16, 4096, 64)
    return {"query": query, "key": key, "rows": torch.arange(0, 1024, 64)}


SPEC = OpSpec(
    name="attention_weights",
    cases=(
        *(Case(id, case_inputs(id, _NAMES)) for id in CASES),
        Case("chosen rows", _chosen(per_sequence=False)),
        Case("chosen rows of each sequence", _chosen(per_sequence=True)),
    ),
    benchmarks=(
        Benchmark("16 rows of 1024", _benchmark, {"B": 1, "H": 16, "R": 16, "Lk": 4096, "D": 64}, headline=True),
    ),
    cost=_cost,
)
