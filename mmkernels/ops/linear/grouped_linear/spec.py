"""What a grouped linear layer is: runs of rows, each multiplied by a weight of its own; its cases and benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from mmkernels.ops.common.cases import normal
from mmkernels.ops.common.results import or_empty
from mmkernels.ops.linear.grouped_linear.groups import groups_of_rows, sizes_of
from mmkernels.runtime.arguments import Differentiable
from mmkernels.spec import Benchmark, Case, Cost, Inputs, OpSpec, Parts, Shard
from mmkernels.targets import AtPeakShare, BandwidthShare, PeakShare, Speedup


class Arguments(NamedTuple):
    """The record of `grouped_linear`."""

    x: Differentiable  # [R, C], rows packed group after group
    weight: Differentiable  # [G, O, C]
    lengths: Tensor  # int32 or int64 [G], the rows of each group
    bias: Differentiable | None  # [G, O]


class Results(NamedTuple):
    """What `grouped_linear` returns."""

    y: Differentiable  # [R, O]


def reference(args: Any) -> Tensor:
    """The naive formula, a loop over the groups; of the backward pass's record too.

    Where Python may not look at lengths, each group's weight multiplies all rows, and `torch.where` keeps its own.
    """
    x, weight, bias = args.x, args.weight, args.bias
    rows, sizes = x.shape[0], sizes_of(args.lengths, x.shape[0])
    if sizes is not None:
        behind = x.new_zeros(rows - sum(sizes), weight.shape[1])
        parts = x.split([*sizes, behind.shape[0]])[: len(sizes)]
        return torch.cat([*(_linear(part, weight, bias, g) for g, part in enumerate(parts)), behind])
    group = groups_of_rows(args.lengths, rows)[:, None]
    y = x.new_zeros(rows, weight.shape[1])
    for g in range(weight.shape[0]):
        member = group == g
        y = torch.where(member, _linear(torch.where(member, x, 0.0), weight, bias, g), y)
    return y


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, group: int) -> Tensor:
    return F.linear(x, weight[group], None if bias is None else bias[group])


def reference_backward(args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of x, weight and bias, empty where none is wanted."""
    x, flow, lengths = args.x, args.grad_y, args.lengths
    of_x = of_weight = of_bias = None
    if args.need_x:
        of_x = reference(args._replace(x=flow, weight=args.weight.mT, bias=None))
    if args.need_weight:
        of_weight = x.new_empty(args.weight.shape)
        for g in range(args.weight.shape[0]):
            of_weight[g] = _part(flow, lengths, g).mT @ _part(x, lengths, g)
    if args.need_bias:
        of_bias = torch.stack([_part(flow, lengths, g).sum(0) for g in range(args.weight.shape[0])])
    return or_empty(of_x, x), or_empty(of_weight, x), or_empty(of_bias, x)


def _part(x: Tensor, lengths: Tensor, group: int) -> Tensor:
    """Returns the rows of a group; where Python may not look at lengths all rows, with zeros in place of others."""
    sizes = sizes_of(lengths, x.shape[0])
    if sizes is None:
        return torch.where((groups_of_rows(lengths, x.shape[0]) == group)[:, None], x, 0.0)
    first = sum(sizes[:group])
    return x[first : first + sizes[group]]


def formula(args: Any) -> tuple[Tensor]:
    """Returns the output for a backward record."""
    return (reference(args),)


def _case(
    id: str,
    lengths: Sequence[int],
    channels: int,
    outputs: int,
    *,
    behind: int = 0,
    bias: bool = False,
    transposed: bool = False,
    dtype: torch.dtype = torch.int64,
) -> Case:
    """
    Args:
        behind: rows behind those of the groups.
        transposed: the weight is a transposed view.
    """

    def make(g: Generator) -> Inputs:
        weight = normal(g, len(lengths), *((channels, outputs) if transposed else (outputs, channels)))
        inputs: Inputs = {
            "x": normal(g, sum(lengths) + behind, channels),
            "weight": weight.mT if transposed else weight,
            "lengths": torch.tensor(lengths, dtype=dtype),
        }
        return inputs | ({"bias": normal(g, len(lengths), outputs)} if bias else {})

    return Case(id, make, ("x", "weight", "bias") if bias else ("x", "weight"))


def routed(tokens: int, active: int, experts: int, g: Generator) -> Tensor:
    """Returns int64 [experts]: how often each is chosen where every token chooses so many different ones at random."""
    chosen = torch.rand(tokens, experts, generator=g, device=g.device).topk(active, 1).indices
    return chosen.flatten().bincount(minlength=experts)


def _elements(inputs: Inputs) -> int:
    """Of the largest tensor that the naive formula keeps, beside the inputs: the weight's gradient."""
    return int(inputs["weight"].numel())


def _shards(inputs: Inputs) -> list[Shard]:
    """Returns a few groups at the begin, in the middle and at the end."""
    ends = [0, *inputs["lengths"].cumsum(0).tolist()]
    number = len(ends) - 1
    count = min(_SHARD, number)
    return [partial(_of_groups, ends, first, first + count) for first in (0, (number - count) // 2, number - count)]


def _of_groups(ends: Sequence[int], first: int, last: int, x: Any) -> Any:
    """Returns what belongs to groups `first <= g < last`, of an argument or a result: rows, or something by group."""
    if not isinstance(x, Tensor):
        return x
    return x[ends[first] : ends[last]] if x.dim() == 2 else x[first:last]


def _benchmark(tokens: int, name: str, channels: int, outputs: int, **more: Any) -> Benchmark:
    """Returns a layer of DeepSeek-VL2-small's experts: each token goes through 6 of 64."""

    def make(g: Generator) -> Inputs:
        draw = lambda *shape: torch.randn(shape, generator=g, device=g.device)
        lengths = routed(tokens, _ACTIVE, _EXPERTS, g)
        weight = draw(_EXPERTS, outputs, channels).mul_(channels**-0.5)
        return {
            "x": draw(tokens * _ACTIVE, channels),
            "weight": weight,
            "lengths": lengths,
        }

    params = {"T": tokens, "G": _EXPERTS, "active": _ACTIVE, "C": channels, "O": outputs}
    grads = ("x", "weight") if tokens >= _TRAINED else ()
    return Benchmark(f"{name}, {tokens} tokens", make, params, grads, **more)


def _cost(inputs: Inputs, backward: bool) -> Cost:
    """Of a group without rows nothing is multiplied or read, but its weight's gradient is written."""
    x, weight, lengths = (inputs[name] for name in ("x", "weight", "lengths"))
    rows, used = int(lengths.sum()), int((lengths > 0).sum())
    one = weight[0].numel() * weight.element_size()
    moved = used * one + (rows * x.shape[1] + x.shape[0] * weight.shape[1]) * x.element_size()
    product = 2.0 * rows * weight[0].numel()
    if not backward:
        return Cost(product, float(moved))
    return Cost(3 * product, float(3 * moved - used * one + weight.shape[0] * one))


_EXPERTS, _ACTIVE = 64, 6
_TRAINED = 64  # tokens from which on a training step is measured, too
_SHARD = 4  # groups that are checked together where not all are
_WIDTH, _MLP = 2048, 1408  # of DeepSeek-VL2-small
_UP, _DOWN = ("gate and up", _WIDTH, 2 * _MLP), ("down", _MLP, _WIDTH)
_LOOP, _BANDWIDTH, _AT_PEAK = 1.5, 0.8, 0.6
"""Targets: the ratio to a loop over groups; shares of the machine's rates; of 48 rows a group both rates count."""
_NEVER_SLOWER = (Speedup("fp32", False, 1.0, "grouped_mm"),)

SPEC = OpSpec(
    name="grouped_linear",
    cases=(
        _case("bias, an empty group", (2, 0, 9), 40, 24, behind=2, bias=True, dtype=torch.int32),
        _case("some groups empty, rows behind", (0, 4, 0, 7, 1, 0), 20, 33, behind=3),
        _case("transposed", (6, 17, 1), 48, 32, transposed=True),
        _case("one group has all rows", (0, 70, 0), 72, 136),
        _case("one row each", (1,) * 9, 130, 65),
        _case("no row", (0, 0), 8, 8),
        _case("one channel", (4, 3), 1, 5, bias=True),
        _case("tiles", (130, 0, 33, 65), 96, 160),
    ),
    benchmarks=(
        _benchmark(1, *_UP, targets=(BandwidthShare("fp32", False, _BANDWIDTH), *_NEVER_SLOWER)),
        _benchmark(1, *_DOWN, targets=_NEVER_SLOWER),
        _benchmark(
            16, *_UP, headline=True,
            targets=(
                Speedup("fp32", False, _LOOP, "loop"),
                BandwidthShare("fp32", False, _BANDWIDTH),
                BandwidthShare("bf16", False, _BANDWIDTH),
                *_NEVER_SLOWER,
            ),
        ),
        _benchmark(64, *_UP, targets=(Speedup("fp32", False, _LOOP, "loop"), *_NEVER_SLOWER)),
        _benchmark(
            512, *_UP,
            targets=(
                AtPeakShare("fp32", False, _AT_PEAK, "grouped_mm"),
                AtPeakShare("fp32", True, _AT_PEAK, "loop"),
                *_NEVER_SLOWER,
            ),
        ),
        _benchmark(
            4096, *_UP, devices=("gpu",),
            targets=(
                PeakShare("bf16", False, 0.6, device="gpu"), Speedup("bf16", False, 1.0, "grouped_mm", device="gpu"),
            ),
        ),
        _benchmark(4096, *_DOWN, devices=("gpu",)),
    ),
    cost=_cost,
    parts=Parts(_elements, _shards),
)  # fmt: skip
