"""The definition of the late-interaction score: its record, its results, and what tests and benchmarks know of it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from mmkernels.ops.contrastive.max_sim.cases import BENCHMARKS, CASES, PARTS, cost
from mmkernels.runtime.arguments import Differentiable
from mmkernels.spec import OpSpec


class Arguments(NamedTuple):
    """The record of `max_sim`."""

    query: Differentiable  # [Nq, Lq, d]
    document: Differentiable  # [Nd, Ld, d]
    query_lengths: Tensor | None  # int64 [Nq]
    document_lengths: Tensor | None  # int64 [Nd]
    paired: bool
    keep_index: bool  # whether a gradient will be wanted


class Results(NamedTuple):
    """What a backend returns."""

    scores: Differentiable  # wide [Nq, Nd]; paired: [N]
    # int32 [Nq, Nd, Lq], paired [N, Lq]: each query token's best document token, or NO_TOKEN; empty [0]
    index: Tensor  # type: ignore[assignment]  # no tuple's method is called by this name


SPEC = OpSpec(name="max_sim", cases=CASES, cost=cost, benchmarks=BENCHMARKS, parts=PARTS)
