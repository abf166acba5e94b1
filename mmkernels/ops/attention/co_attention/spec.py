"""What co-attention is measured at and by; its record, definition and cases are in the files beside this one."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor

from mmkernels.masks import SpanMask
from mmkernels.ops.attention.co_attention.cases import CASES, co_inputs
from mmkernels.spec import Benchmark, Cost, Inputs, OpSpec, Parts, Shard
from mmkernels.targets import MemoryRatio, PeakShare, Speedup, Target

_VALUES = ("a", "b", "value_a", "value_b")
_PASSES = (False, True)


def _targets(*, masked: bool = False) -> tuple[Target, ...]:
    """What the CPU kernels set out to reach in float32. Hidden pairs cost time and do not count as work."""
    found: list[Target] = [] if masked else [PeakShare("fp32", backward, 0.65) for backward in _PASSES]
    for backward in _PASSES:
        found += [Speedup("fp32", backward, 1.5, "eager"), MemoryRatio("fp32", backward, 10.0, "eager")]
    return tuple(found)


def _shape(
    name: str, batch: int, heads: int, a_len: int, b_len: int, dim: int, *, targets: tuple[Target, ...],
    headline: bool = False, more: Callable[[], Inputs] | None = None,
) -> Benchmark:  # fmt: skip
    def make(g: Generator) -> Inputs:
        return co_inputs(g, batch, heads, a_len, b_len, dim) | ({} if more is None else more())

    return Benchmark(
        f"{name} B{batch} H{heads} {a_len}x{b_len} D{dim}",
        make,
        {"B": batch, "H": heads, "La": a_len, "Lb": b_len, "D": dim, "mask": "none" if more is None else "padding"},
        grads=_VALUES,
        tags=frozenset({name, "large"}),
        targets=targets,
        devices=("cpu", "gpu") if name == "grounding_dino" else ("cpu",),  # `make gpu` has eight minutes for all ops
        headline=headline,
    )


def _padding() -> Inputs:
    """Of GroundingDINO's fusion: images of two sizes, texts of two lengths, and its clamp."""
    image, text = torch.tensor([13_294, 10_000]), torch.tensor([64, 256])
    return {
        "valid_a": torch.arange(13_294) < image[:, None],
        "valid_b": torch.arange(256) < text[:, None],
        "clamp": 50_000.0,
    }


# GroundingDINO (Swin-T, 800 x 800 pixels): four levels of 100, 50, 25 and 13 rows of patches, 256 words, 4 heads of 256
# channels. 2,048 x 2,048: two sequences of one length, such as sound and video.
BENCHMARKS = (
    _shape("grounding_dino", 2, 4, 13_294, 256, 256, targets=_targets(), headline=True),
    _shape("grounding_dino masked", 2, 4, 13_294, 256, 256, targets=_targets(masked=True), more=_padding),
    _shape("square", 2, 4, 2_048, 2_048, 256, targets=_targets(), headline=True),
)


def _pairs(inputs: Inputs) -> tuple[float, float, float]:
    """Returns how many pairs are visible in any direction, to a, and to b: the work that is there to do."""
    (batch, heads, a_len, _), b_len = inputs["a"].shape, inputs["b"].shape[2]
    mask: Any = inputs.get("mask")
    dense = mask.to_dense(b_len) if isinstance(mask, SpanMask) else mask
    every = torch.ones(1, 1, a_len, b_len, dtype=torch.bool, device=inputs["a"].device)
    every = every if dense is None else every & dense
    valid_a, valid_b = inputs.get("valid_a"), inputs.get("valid_b")
    to_a = every if valid_b is None else every & valid_b[:, None, None, :]
    to_b = every if valid_a is None else every & valid_a[:, None, :, None]
    counts = [x.sum((2, 3)).expand(batch, heads).sum() for x in (to_a | to_b, to_a, to_b)]
    any_, of_a, of_b = (float(count) for count in counts)
    return any_, of_a, of_b


def _cost(inputs: Inputs, backward: bool) -> Cost:
    """Forward: the scores and both outputs. Backward: seven products more."""
    any_, to_a, to_b = _pairs(inputs)
    dim, of_a, of_b = (inputs[name].shape[3] for name in ("a", "value_a", "value_b"))
    scores, outputs = any_ * dim, to_a * of_b + to_b * of_a
    products = scores + outputs + (3 * scores + 2 * outputs if backward else 0)
    moved = sum(x.numel() * x.element_size() for x in inputs.values() if isinstance(x, Tensor))
    a, b = inputs["a"], inputs["b"]
    moved += a.element_size() * (a.numel() // max(dim, 1) * of_b + b.numel() // max(dim, 1) * of_a)
    return Cost(flops=2.0 * products, bytes=float(moved))


def _scores(inputs: Inputs) -> int:
    batch, heads, a_len, _ = inputs["a"].shape
    return batch * heads * a_len * inputs["b"].shape[2]


def _shards(inputs: Inputs) -> list[Shard]:
    """Returns two: a drawn sequence and head, and the last ones, with the largest offsets. None has a bias."""
    batch, heads = inputs["a"].shape[:2]
    draw = random.Random(0)
    places = ((draw.randrange(batch), draw.randrange(heads)), (batch - 1, heads - 1))

    def shard_at(sequence: int, head: int) -> Shard:
        def shard(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            x = x[sequence : sequence + 1] if x.shape[0] == batch else x
            return x[:, head : head + 1] if x.dim() == 4 and x.shape[1] == heads else x

        return shard

    return [shard_at(*place) for place in dict.fromkeys(places)]


SPEC = OpSpec(
    name="co_attention",
    cases=CASES,
    benchmarks=BENCHMARKS,
    cost=_cost,
    parts=Parts(_scores, _shards),
)
