"""The definition of the log-probabilities: the naive formula, its cases, its benchmark configurations."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Generator, Tensor

from mmkernels.ops.linear.cases import inputs_of, large, linear_cost
from mmkernels.ops.linear.parts import LOGPROBS
from mmkernels.runtime.arguments import Differentiable
from mmkernels.spec import Benchmark, Case, Inputs, OpSpec
from mmkernels.targets import MemoryRatio, Milliseconds, PeakShare, Speedup, Target


class Arguments(NamedTuple):
    """The record of `linear_logprobs`, which losses that need more of the rows call too."""

    hidden: Differentiable  # [T, d]
    weight: Differentiable  # [V, d], this rank's tokens
    bias: Differentiable | None  # [V]
    target: Tensor  # int64 [T], `formula.IGNORED` in ignored rows; V or more: no token
    token_weight: Tensor | None  # wide [V], of all ranks' tokens; None: 1 each; only checked without `average`
    softcap: float  # 0: none
    temperature: float
    entropy: bool
    average: bool  # whether `formula.RowResults.average` is wanted
    best: bool
    group: str  # the name of a process group; "": this process alone


class Results(NamedTuple):
    """What a backend returns, wide [T] each, see `formula.RowResults`, or empty where it is not wanted."""

    logprobs: Differentiable
    lse: Differentiable
    entropy_of_rows: Differentiable
    average: Differentiable
    softmax: Tensor  # wide [2, T], see `formula.LOG_SUM`
    best_index: Tensor  # int64 [T], the token with the largest logit; -1 where ignored


_GRADS = ("hidden", "weight", "bias")


def _case(id: str, rows: int, tokens: int, dim: int, **more: Any) -> Case:
    def make(g: Generator) -> Inputs:
        return inputs_of(g, rows, tokens, dim, **more)

    return Case(id, make, _GRADS if more.get("bias") else _GRADS[:2])


def _config(id: str, rows: int, tokens: int, dim: int, *targets: Target, **more: Any) -> Benchmark:
    options = more.pop("options", {})

    def make(g: Generator) -> Inputs:
        hidden, weight, target = large(g, rows, tokens, dim)
        return {"hidden": hidden, "weight": weight, "target": target} | options

    return Benchmark(id, make, {"T": rows, "V": tokens, "d": dim}, targets=targets, **more)


SPEC = OpSpec(
    name="linear_logprobs",
    cases=(
        _case("few rows", 5, 37, 16),
        _case("one row, one token", 1, 1, 8),
        _case("odd sizes", 21, 135, 13, ignored=0.3),
        _case("entropy", 18, 75, 24, return_entropy=True, ignored=0.2),
        _case("correct", 18, 75, 24, return_correct=True, ignored=0.2),
        _case("bias, entropy, correct", 18, 75, 24, bias=True, return_entropy=True, return_correct=True),
        _case("softcap", 20, 90, 16, scale=30.0, softcap=15.0),
        _case("softcap, temperature, entropy", 20, 90, 16, softcap=5.0, temperature=0.7, return_entropy=True),
        _case("temperature, bias", 20, 90, 16, temperature=1.7, bias=True),
        _case("all ignored", 9, 40, 16, ignored=1.0),
        _case("large logits", 20, 90, 16, scale=1000.0),
        _case("a transposed weight", 20, 90, 16, transposed=True, ignored=0.4),
        _case("strided rows", 20, 90, 16, strided=True, bias=True),
        _case("more than a tile", 150, 300, 72, ignored=0.5, return_entropy=True),
    ),
    cost=linear_cost(products=4),
    benchmarks=(
        _config(
            "152k, entropy",
            1024,
            151_936,
            1024,
            Speedup("fp32", False, 1.5, "log_softmax"),
            MemoryRatio("fp32", False, 50.0, "log_softmax"),
            options={"return_entropy": True},
        ),
        _config(
            "few rows",
            16,
            32_000,
            1024,
            *(Speedup(dtype, False, 1.0, "log_softmax") for dtype in ("fp32", "bf16")),
        ),
        _config(
            "131k, entropy",
            4096,
            131_072,
            4096,
            PeakShare("bf16", True, 0.6, device="gpu"),
            Speedup("bf16", True, 1 / 1.3, "verl", device="gpu"),
            Milliseconds("bf16", True, 1.3 * 24.9, "H200", device="gpu"),
            grads=_GRADS[:2],
            options={"return_entropy": True},
            devices=("gpu",),
        ),
        _config("a decoder's head", 1024, 32_000, 1024, grads=_GRADS[:2], headline=True),
    ),
    always_wide=frozenset({"bias"}),
    parts=LOGPROBS,
)
