"""The definition of similarity to other tokens: the naive formula, its cases, its benchmark configurations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from mmkernels.ops.common.cases import normal
from mmkernels.ops.common.dtypes import wide_dtype
from mmkernels.ops.tokens.cosine import unit_rows
from mmkernels.runtime.arguments import Sizes
from mmkernels.spec import Benchmark, Case, Cost, Inputs, OpSpec
from mmkernels.targets import BandwidthShare, MemoryRatio, PeakShare, Speedup

REDUCTIONS = ("mean", "max", "min")


class Arguments(NamedTuple):
    """The record of `token_similarity`."""

    x: Tensor  # [tokens, C] or [images, tokens, C]
    others: Tensor  # [others, C] or [images, others, C]
    lengths: Sizes  # the tokens of each image
    other_lengths: Sizes
    reduce: str  # of `REDUCTIONS`


class Results(NamedTuple):
    """What `token_similarity` returns."""

    similarity: Tensor  # [tokens], float32 or float64


def reference(args: Arguments) -> Tensor:
    """Returns [tokens] by the naive formula: all similarities of an image, then their mean or largest or smallest."""
    parts = [_reduced(unit_rows(x) @ unit_rows(others).mT, args.reduce) for x, others in image_pairs(args)]
    return torch.cat(parts) if parts else args.x.new_empty(0, dtype=wide_dtype(args.x))


def image_pairs(args: Arguments) -> Iterator[tuple[Tensor, Tensor]]:
    """Gives each image's tokens, and those that they are compared with; not of images without tokens."""
    tokens, others = args.x.flatten(0, -2).split(args.lengths), args.others.flatten(0, -2).split(args.other_lengths)
    return ((a, b) for a, b, n in zip(tokens, others, args.lengths, strict=True) if n)


def _reduced(similarity: Tensor, reduce: str) -> Tensor:
    if reduce == "mean":
        return similarity.mean(1)
    return similarity.amax(1) if reduce == "max" else similarity.amin(1)


# Cases.


def _inputs(g: Generator, dim: int, lengths: Sizes, others: Sizes, reduce: str) -> Inputs:
    x = normal(g, sum(lengths), dim) + normal(g, 1, dim)
    return {
        "x": x, "lengths": lengths, "others": normal(g, sum(others), dim) + 0.5 * x[:1].sum(0), "other_lengths": others,
        "reduce": reduce,
    }  # fmt: skip


def _case(id: str, dim: int, lengths: Sizes, others: Sizes, reduce: str) -> Case:
    return Case(id, lambda g: _inputs(g, dim, lengths, others, reduce))


def _batched(g: Generator) -> Inputs:
    """As after a class token is left out."""
    inputs = _inputs(g, 20, (12,) * 3, (5,) * 3, "max")
    x, others = inputs["x"].unflatten(0, (3, 12))[:, 1:], inputs["others"].unflatten(0, (3, 5))
    return inputs | {"x": x, "others": others, "lengths": 11, "other_lengths": 5}


def _odd_rows(reduce: str) -> Callable[[Generator], Inputs]:
    """Tokens and others that are zero, far from 1 (as far as float16 allows), or not finite, which is seen alone."""

    def make(g: Generator) -> Inputs:
        inputs = _inputs(g, 20, (14, 9), (7, 3), reduce)
        x, others = inputs["x"], inputs["others"]
        x[2], others[1] = 0, 0
        x[3] *= 1e-4
        x[4] *= 1e3
        others[2] *= 1e-4
        others[3] *= 1e3
        x[5, 1], x[6, 0], others[8, 2] = torch.nan, torch.inf, torch.nan
        return inputs

    return make


def _cost(inputs: Inputs, backward: bool) -> Cost:
    """Each token and each other one is read once; for a mean, tokens are multiplied with one direction an image."""
    x, others = inputs["x"], inputs["others"]
    dim = x.shape[-1]
    pairs = float(sum(n * m for n, m in zip(inputs["lengths"], inputs["other_lengths"], strict=True)))
    flops = 2.0 * pairs * dim if inputs["reduce"] != "mean" else 4.0 * (x.numel() + others.numel())
    return Cost(flops, float((x.numel() + others.numel()) * x.element_size() + 4 * (x.numel() // dim)))


def _benchmark(id: str, dim: int, lengths: Sizes, others: Sizes, reduce: str, **more: Any) -> Benchmark:
    params = {"images": len(lengths), "tokens": sum(lengths), "others": sum(others), "C": dim, "reduce": reduce}
    return Benchmark(id, lambda g: _inputs(g, dim, lengths, others, reduce), params, **more)


SPEC = OpSpec(
    name="token_similarity",
    cases=(
        _case("mean", 24, (9, 0, 16), (4, 2, 1), "mean"),
        _case("max", 33, (50, 17), (20, 3), "max"),
        _case("min", 16, (7, 30), (1, 70), "min"),
        _case("more others than a tile, mean", 40, (5, 3), (150, 2), "mean"),
        _case("more others than a tile, max", 72, (70, 3), (150, 2), "max"),
        _case("one channel", 1, (9,), (3,), "mean"),
        _case("no images", 6, (), (), "max"),
        Case("images of one size", _batched),
        *(Case(f"odd rows, {reduce}", _odd_rows(reduce)) for reduce in REDUCTIONS),
    ),
    cost=_cost,
    benchmarks=(
        _benchmark(
            "relevance to the text", 4096, (576,) * 4, (32,) * 4, "mean", headline=True,
            targets=(
                Speedup("fp32", False, 2.0, "formula"),
                MemoryRatio("fp32", False, 1.0, "formula"),
                Speedup("bf16", False, 2.0, "formula"),
                BandwidthShare("bf16", False, 0.8, device="gpu"),
            ),
        ),
        _benchmark(
            "duplication of pivots", 4096, (2880,), (20,), "max", headline=True,
            targets=(Speedup("fp32", False, 1.0, "formula"), MemoryRatio("fp32", False, 1.0, "formula")),
        ),
        _benchmark(
            "the frame before", 1024, (2048,), (2048,), "max", devices=("cpu",),
            targets=(PeakShare("fp32", False, 0.6), MemoryRatio("fp32", False, 1.0, "formula")),
        ),
        _benchmark(
            "one small image", 1024, (256,), (32,), "mean", devices=("cpu",),
            targets=(Speedup("fp32", False, 1.0, "formula"),),
        ),
    ),
)  # fmt: skip
