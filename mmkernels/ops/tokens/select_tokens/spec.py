"""What selecting is: the tokens with the best scores, and the rest merged into them; its cases and benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from mmkernels.ops.common.dtypes import wide_dtype
from mmkernels.ops.tokens.cosine import near_one, unit_rows
from mmkernels.ops.tokens.keep import share_of
from mmkernels.ops.tokens.ranking import best, image_of
from mmkernels.runtime.arguments import Differentiable, Sizes
from mmkernels.spec import Benchmark, Case, Cost, Inputs, OpSpec
from mmkernels.targets import BandwidthShare, MemoryRatio, Speedup


class Arguments(NamedTuple):
    """The record of `select_tokens`."""

    x: Differentiable  # [tokens, C]
    scores: Tensor  # [tokens]
    metric: Tensor | None  # [tokens, D]
    lengths: Sizes
    keep: Sizes  # of each image, or one number for all
    over: str  # "image" or "batch"
    merge: str  # "": the rest is left out


class Results(NamedTuple):
    """What `select_tokens` returns, and what its backward pass reads."""

    y: Differentiable  # [kept, C]
    positions: Tensor  # int64 [kept], ascending
    counts: Tensor  # int64 [images]; over "image": [0]
    place: Tensor  # int32 [tokens]: the row of y that a token is part of, or -1; without merging [0]
    weight: Tensor  # [tokens], float32 or float64: how much of the token it is; without merging [0]


def reference(args: Arguments) -> tuple[Tensor, ...]:
    """The naive formula."""
    index = best(args.scores, args.lengths, args.keep, args.over)
    if not args.merge:
        return results(args, index, None)
    owner, (metric, kept) = image_of(args.lengths, index.device), operands(args, index)
    similarity = (metric @ kept.mT).nan_to_num(nan=torch.finfo(kept.dtype).min)
    similarity = similarity.masked_fill(owner[:, None] != owner[index], -torch.inf)
    return results(args, index, nearest(similarity))


def reference_backward(args: Any) -> Tensor:
    """Returns the gradient of x."""
    x, grad = args.x, args.grad_y
    if not args.merge:
        return torch.zeros(x.shape, dtype=x.dtype, device=x.device).index_copy_(0, args.positions, grad)
    if not len(grad):
        return torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    weighted = args.weight[:, None] * grad[args.place.clamp(min=0).long()]
    return torch.where(args.place[:, None] >= 0, weighted, 0).to(x.dtype)


def formula(args: Any) -> Tensor:
    """Returns y: its rows are sums of tokens, with weights that are constants.

    Args:
        args: a record with `positions`, `place` and `weight`.
    """
    if not args.merge:
        return args.x[args.positions]
    weighted = torch.where(args.place[:, None] >= 0, args.weight[:, None] * args.x, 0)
    y = weighted.new_zeros(len(args.positions), args.x.shape[1])
    return y.index_add(0, args.place.clamp(min=0).long(), weighted).to(args.x.dtype)


class _Merging(NamedTuple):
    x: Tensor
    merge: str
    positions: Tensor
    place: Tensor
    weight: Tensor


def results(args: Arguments, index: Tensor, place: Tensor | None) -> tuple[Tensor, ...]:
    """Returns all results.

    Args:
        place: int64 [tokens], of the tokens that are not kept; None: without merging.
    """
    x, counts, wide = args.x, index.new_empty(0), wide_dtype(args.x)
    if args.over == "batch":
        owner = image_of(args.lengths, index.device)[index]
        counts = index.new_zeros(len(args.lengths)).scatter_add(0, owner, torch.ones_like(index))
    weight = torch.empty(0, dtype=wide, device=x.device)
    if place is None:
        place = index.new_empty(0)
    else:
        place = place.scatter(0, index, torch.arange(len(index), device=index.device))
        weight = weights_of(args, index, place, wide)
    y = formula(_Merging(x, args.merge, index, place, weight))
    return y, index, counts, place.int(), weight


def operands(args: Arguments, index: Tensor) -> tuple[Tensor, Tensor]:
    """Returns what tokens are compared by, [tokens, D], and that of the kept ones, of length 1; rows of zeros stay.

    The length of a row of the first divides all of its similarities, and is left in.
    """
    metric = near_one((args.x if args.metric is None else args.metric).detach().to(wide_dtype(args.x)))
    return metric, unit_rows(metric[index])


def nearest(similarity: Tensor) -> Tensor:
    """Returns the row of y that is most similar to each token, int64 [tokens]; -1 where all are -inf.

    Args:
        similarity: [tokens, kept], to tokens of other images -inf.
    """
    if not similarity.shape[1]:
        return similarity.new_full(similarity.shape[:1], -1, dtype=torch.int64)
    top = similarity.max(1)
    return torch.where(top.values == -torch.inf, -1, top.indices)


def weights_of(args: Arguments, index: Tensor, place: Tensor, wide: torch.dtype) -> Tensor:
    """Returns the weight of each token in the row of y that it is part of, [tokens].

    Args:
        place: int64 [tokens].
    """
    row, kept = place.clamp(min=0), len(index)
    members = place.new_zeros(kept + 1).scatter_add(0, torch.where(place < 0, kept, place), torch.ones_like(place))
    members = members.to(wide)[row]
    if args.merge == "mean":
        weight = 1 / members
    elif args.merge == "visionzip":
        weight = (1 / (members - 1)).scatter(0, index, 1.0)
    else:
        weight = args.scores.to(wide).scatter(0, index, 1.0)
    return torch.where(place < 0, 0, weight)


def _make(
    lengths: tuple[int, ...], keep: Any, dim: int, *, over: str = "image", merge: Any = False, metric: int = 0
) -> Callable[[Generator], Inputs]:
    """Scores are small integers, so that many are equal, also after rounding."""

    def make(generator: Generator) -> Inputs:
        tokens = sum(lengths)
        random = lambda *size: torch.randn(size, generator=generator, dtype=torch.float64)
        scores = torch.randint(-9, 10, (tokens,), generator=generator).double() / 8
        if tokens:
            scores[torch.randint(tokens, (1 + tokens // 9,), generator=generator)] = torch.nan
        inputs = {"x": random(tokens, dim), "lengths": lengths, "keep": keep, "scores": scores, "over": over}
        if merge:
            inputs |= {"scores": scores.nan_to_num(0.5), "merge_rest": merge}
        if metric:
            inputs["metric"] = random(tokens, metric)
        return inputs

    return make


def _batched(images: int, tokens: int, keep: Any, dim: int, **more: Any) -> Callable[[Generator], Inputs]:
    def make(generator: Generator) -> Inputs:
        inputs = _make((tokens,) * images, keep, dim, **more)(generator)
        for name in ("x", "scores", "metric"):
            if name in inputs:
                inputs[name] = inputs[name].unflatten(0, (images, tokens))
        return inputs | {"lengths": tokens}

    return make


def _benchmark(
    id: str, lengths: tuple[int, ...], share: float, dim: int, merge: Any = False, metric: int = 0, **more: Any
) -> Benchmark:
    def make(generator: Generator) -> Inputs:
        inputs = _make(lengths, share, dim, merge=merge, metric=metric)(generator)
        return inputs | {"scores": torch.rand(sum(lengths), generator=generator, dtype=torch.float64)}

    params = {"images": len(lengths), "tokens": sum(lengths), "keep": share, "C": dim, "merge": str(merge)}
    return Benchmark(id, make, params, ("x",), **more)


def _cost(inputs: Inputs, backward: bool) -> Cost:
    """Of a benchmark: packed images, a share of each."""
    x, images, keep, merges = inputs["x"], inputs["lengths"], inputs["keep"], bool(inputs.get("merge_rest"))
    tokens = len(x)
    kept = sum(share_of(keep, images))
    width, metric = x.shape[-1], inputs.get("metric")
    channels = width if metric is None else metric.shape[-1]
    pairs = sum(k * (n - k) for k, n in zip(share_of(keep, images), images, strict=True)) if merges else 0
    moved = (tokens + kept if merges else 2 * kept) * width * x.element_size() + tokens * 4
    return Cost(2.0 * pairs * channels, float(moved + ((tokens + kept) * width * x.element_size() if backward else 0)))


_X = ("x",)
_MIXED = (576, 1200, 340, 2048, 900, 1536, 256, 729) * 4
"""Tokens of images of mixed resolutions."""

SPEC = OpSpec(
    name="select_tokens",
    cases=(
        Case("shares, an empty image", _make((9, 0, 16, 1), 0.3, 12), _X),
        Case("no tokens", _make((), (), 8), _X),
        Case("budget", _make((9, 0, 16, 1), 11, 24, over="batch"), _X),
        Case("visionzip", _make((40, 17), (6, 3), 24, merge="visionzip"), _X),
        Case("a batch, budget, prumerge", _batched(3, 11, 0.2, 8, over="batch", merge="prumerge"), _X),
        Case("a batch, merged", _batched(2, 19, 4, 65, merge="mean"), _X),
        Case("merged by a metric", _make((90, 130), (70, 20), 33, merge="mean", metric=24), _X),
    ),
    benchmarks=(
        _benchmark("one small image", (256,), 0.25, 1024, targets=(Speedup("fp32", False, 1.0, "topk"),)),
        _benchmark(
            "LLaVA, 4 images", (576,) * 4, 0.25, 4096, headline=True,
            targets=(
                Speedup("fp32", False, 1.0, "topk"),
                MemoryRatio("fp32", False, 1.0, "topk"),
                BandwidthShare("bf16", False, 0.8, device="gpu"),
            ),
        ),
        _benchmark("mixed resolutions", _MIXED, 0.25, 1024, targets=(Speedup("fp32", False, 1.0, "topk"),)),
        _benchmark(
            "VisionZip, keys", (2880,), 0.2, 1024, "visionzip", 64, targets=(Speedup("fp32", False, 1.0, "VisionZip"),)
        ),
        _benchmark(
            "merged by the tokens themselves", (2880,), 1 / 9, 1024, "visionzip",
            targets=(Speedup("fp32", False, 1.0, "VisionZip"),),
        ),
    ),
    cost=_cost,
    always_wide=frozenset({"scores"}),
)  # fmt: skip
