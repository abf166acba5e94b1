"""What cross-attention is: the naive formula, the cases that test it, the shapes that it is measured at."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from mmkernels.masks import SpanMask
from mmkernels.ops.attention.cases import CASES, attention_cost, attention_inputs
from mmkernels.ops.attention.formula import probabilities, visible_keys, weighted_values
from mmkernels.ops.attention.philox import keep_mask, keep_scale
from mmkernels.ops.common.cases import normal
from mmkernels.runtime.arguments import Differentiable
from mmkernels.runtime.checks import broadcasts
from mmkernels.spec import Benchmark, Case, Cost, Inputs, OpSpec, Parts, Shard
from mmkernels.targets import AtPeakShare, BandwidthShare, PeakShare, Rate, Speedup, Target, YardstickShare


class Arguments(NamedTuple):
    """The record of `cross_attention`."""

    query: Differentiable  # [B, Hq, Lq, D]
    key: Differentiable  # [B or 1, Hkv, Lk, D]
    value: Differentiable  # [B or 1, Hkv, Lk, Dv]
    start: Tensor | None  # the mask, as in MaskTensors
    end: Tensor | None
    key_valid: Tensor | None
    dense: Tensor | None
    bias: Differentiable | None  # broadcastable to [B, Hq, Lq, Lk]
    gate: Differentiable | None  # one element, or [Hq]
    seed: Tensor | None  # int64 [1], of the dropout; None: no dropout
    scale: float
    dropout_p: float


class Results(NamedTuple):
    """What `cross_attention` returns."""

    out: Differentiable  # [B, Hq, Lq, Dv], in memory [B, Lq, Hq, Dv]
    lse: Differentiable  # [B, Hq, Lq]


def reference(args: Arguments, need_lse: bool = True) -> tuple[Tensor, Tensor]:
    """The naive formula, differentiable by PyTorch."""
    query, gate = args.query, args.gate
    key, value = _repeat_heads(args.key, query), _repeat_heads(args.value, query)
    weights, lse, visible = probabilities(query, key, visible_keys(args), args.bias, args.scale, need_lse)
    if args.seed is not None:
        weights = weights * _keep(weights, args.seed, args.dropout_p)
    out = weighted_values(weights, value, visible)
    if gate is not None:
        out = out * _factor(gate, out)
    if lse is None:
        lse = out.new_empty(0)
    # The layout of every backend: in memory [B, Lq, H, Dv].
    return out.transpose(1, 2).contiguous().transpose(1, 2), lse


def reference_backward(args: Any) -> tuple[Tensor, ...]:
    """The gradients, written out: autograd does not record inside an op boundary."""
    query, bias, gate, grad_out = args.query, args.bias, args.gate, args.grad_out
    key, value = _repeat_heads(args.key, query), _repeat_heads(args.value, query)
    weights, _, visible = probabilities(query, key, visible_keys(args), bias, args.scale, need_lse=False)
    keep = 1.0 if args.seed is None else _keep(weights, args.seed, args.dropout_p)
    grad = grad_out if gate is None else grad_out * _factor(gate, grad_out)

    def hide(x: Tensor) -> Tensor:
        return x if visible is None else torch.where(visible, x, 0.0)

    of_value = weighted_values((weights * keep).mT, grad, None if visible is None else visible.expand_as(weights).mT)
    of_weights = hide(grad @ value.mT) * keep
    delta = (weights * of_weights).sum(-1, keepdim=True)
    if args.grad_lse is not None:
        delta = delta - args.grad_lse[..., None].to(delta.dtype)
    of_scores = hide(weights * (of_weights - delta))
    of_query = of_scores @ (key if visible is None else _finite(key)) * args.scale
    of_key = of_scores.mT @ (query if visible is None else _finite(query)) * args.scale
    of_bias = None if bias is None else of_scores.sum_to_size(bias.shape)
    of_gate = None
    if gate is not None:
        ungated = (hide(grad_out @ value.mT) * weights * keep).sum((0, 2, 3))
        slope = 1 - _factor(gate, ungated).flatten() ** 2
        of_gate = (slope * ungated).sum_to_size(gate.shape or (1,)).view(gate.shape)
    return (
        _gradient(args.query, of_query, args.need_query),
        _gradient(args.key, of_key, args.need_key),
        _gradient(args.value, of_value, args.need_value),
        _gradient(bias, of_bias, args.need_bias, like=grad_out),
        _gradient(gate, of_gate, args.need_gate, like=grad_out),
    )


def _gradient(x: Tensor | None, grad: Tensor | None, need: bool, like: Tensor | None = None) -> Tensor:
    """Returns `grad`, summed over what broadcasting repeated, as x lies in memory; empty where none is wanted."""
    if need and x is not None and grad is not None:
        return torch.empty_like(x).copy_(_sum_repeats(grad, x))
    empty = x if x is not None else like
    assert empty is not None
    return empty.new_empty(0)


def _repeat_heads(x: Tensor, query: Tensor) -> Tensor:
    repeat = query.shape[1] // x.shape[1]
    return x if repeat == 1 else x.repeat_interleave(repeat, 1)


def _keep(weights: Tensor, seed: Tensor, dropout_p: float) -> Tensor:
    b, h, i = (torch.arange(n, device=weights.device) for n in weights.shape[:3])
    kept = keep_mask(seed, dropout_p, b[:, None, None, None], h[:, None, None], i[:, None], range(weights.shape[3]))
    return kept.to(weights.dtype) * keep_scale(dropout_p)


def _factor(gate: Tensor, out: Tensor) -> Tensor:
    """tanh(gate) as [Hq or 1, 1, 1]."""
    return gate.tanh().to(out.dtype).reshape(-1, 1, 1)


def _finite(x: Tensor) -> Tensor:
    return torch.where(x.isfinite(), x, 0.0)


def _sum_repeats(grad: Tensor, x: Tensor) -> Tensor:
    """Returns the gradient summed over repeated heads and a shared batch."""
    if grad.dim() == 4 and not broadcasts(x.shape[1], grad.shape[1]):
        grad = grad.unflatten(1, (x.shape[1], -1)).sum(2)
    return grad.sum_to_size(x.shape)


# Correctness cases: attention's, and those of the arguments that only this op has.


def _with(**more: object) -> Callable[[Generator], Inputs]:
    def make(g: Generator) -> Inputs:
        inputs = attention_inputs(g, 2, 4, 5, 7, key_heads=2) | {
            "mask": SpanMask.key_padding([7, 3]),
            "return_lse": True,
        }
        drawn = {name: normal(g, *x) if isinstance(x, tuple) else x for name, x in more.items()}
        return inputs | drawn

    return make


_QKV = ("query", "key", "value")


def _case(id: str, make: Callable[[Generator], Inputs], *, seeded: bool = False) -> Case:
    drawn = make(torch.Generator())
    grads = (*_QKV, *(name for name in ("bias", "gate") if name in drawn))
    return Case(id, lambda g: {"return_lse": True} | make(g), grads, seeded)


_CASES = (
    *(_case(id, make) for id, make in CASES.items()),
    _case("gate", _with(gate=())),
    _case("gate of each head", _with(gate=(4,))),
    _case("closed gate", _with(gate=torch.zeros(4, dtype=torch.float64))),
    _case("dropout", _with(dropout_p=0.3), seeded=True),
    _case("dropout of everything", _with(dropout_p=1.0), seeded=True),
    _case("dropout, gate, bias", _with(dropout_p=0.5, gate=(4,), bias=(1, 4, 5, 7)), seeded=True),
)

# What the CPU kernels set out to reach: the share of the arithmetic peak, (float32, bfloat16) for each pass. Half of an
# irregular mask's pairs are hidden without hiding a whole tile: they cost time and do not count as work.
_PEAK_SHARES = {
    "none": ((0.75, 0.7), (0.7, 0.6)),
    "padding": ((0.75, 0.7), (0.7, 0.6)),
    "media": ((0.7, 0.6), (0.7, 0.6)),
    "irregular": ((0.35, 0.35), (0.35, 0.35)),
    "bias": ((0.7, 0.6), (0.7, 0.55)),
}


def _targets(kind: str) -> tuple[Target, ...]:
    rows = [(dtype, backward) for backward in (False, True) for dtype in ("fp32", "bf16")]
    if kind == "small":
        return tuple(Speedup(*row, 1.0, "sdpa") for row in rows)
    if kind == "decode":
        return tuple(BandwidthShare(dtype, False, 0.8) for dtype in ("fp32", "bf16"))
    shares = [share for of_pass in _PEAK_SHARES[kind] for share in of_pass]
    if kind == "bias":  # which is read from memory beside the inputs
        return tuple(AtPeakShare(*row, share, "sdpa") for row, share in zip(rows, shares, strict=True))
    peaks = tuple(PeakShare(*row, share) for row, share in zip(rows, shares, strict=True))
    if kind != "media":
        return peaks
    # SDPA computes all pairs, of which the mask hides seven eighths; the loop over images computes the same as the op.
    spared = tuple(Speedup(*row, 8.0, "sdpa") for row in rows)
    return (*peaks, *spared, *(Speedup(*row, 1.0, "loop") for row in rows))


def _masked(mask: str, batch: int, heads: int, q_len: int, k_len: int, dim: int) -> Callable[[Generator], Inputs]:
    def make(g: Generator) -> Inputs:
        inputs = attention_inputs(g, batch, heads, q_len, k_len, dim)
        if mask == "padding":  # mean length 75 %: from half to all of the keys
            lengths = torch.linspace(k_len // 2, k_len, batch).int() if batch > 1 else torch.tensor([k_len * 3 // 4])
            inputs["mask"] = SpanMask.key_padding(lengths)
        elif mask == "media":  # eight images, each seen by an eighth of the text
            inputs["mask"] = SpanMask.media((torch.arange(q_len) * 8 // q_len)[None].expand(batch, -1), k_len // 8)
        elif mask == "irregular":
            inputs["mask"] = torch.rand(batch, 1, q_len, k_len, generator=g) < 0.5
        elif mask == "bias":
            inputs["bias"] = normal(g, 1, heads, q_len, k_len)
        return inputs

    return make


_HEADLINES = {("none", 256, 64), ("padding", 256, 64), ("media", 1024, 64)}


def _shape(batch: int, heads: int, q_len: int, k_len: int, dim: int, mask: str = "none") -> Benchmark:
    params = {"B": batch, "H": heads, "Lq": q_len, "Lk": k_len, "D": dim, "mask": mask}
    large = q_len * k_len >= 2**18
    return Benchmark(
        f"B{batch} H{heads} {q_len}x{k_len} D{dim} {mask}",
        _masked(mask, batch, heads, q_len, k_len, dim),
        params,
        grads=(*_QKV, "bias") if mask == "bias" else _QKV,
        tags=frozenset({mask, "large"} if large else {mask}),
        targets=_targets("small" if q_len * k_len <= 2**10 else mask),
        devices=("cpu",),
        headline=(mask, q_len, dim) in _HEADLINES,
    )


def _decode(batch: int) -> Benchmark:
    return Benchmark(
        f"decode B{batch}" if batch != 8 else "decode",
        lambda g: attention_inputs(g, batch, 32, 1, 4096, 128, key_heads=8),
        {"B": batch, "H": 32, "Hkv": 8, "Lq": 1, "Lk": 4096, "D": 128},
        tags=frozenset({"decode"}),
        targets=_targets("decode"),
        devices=("cpu",),
        headline=True,
    )


# Benchmark configurations: encoder-decoder fusion widths, CLIP ViT-L/14's 577 and Flamingo-like 1601 tokens, the head
# dims 72 and 80 of SigLIP-SO400M and ViT-H, a decode step of a Llama-3-8B-like model.

_LARGE = ((2, 16, 256, 2048, 64), (1, 16, 128, 4096, 128), (2, 12, 64, 1024, 64))
_SMALL = replace(_shape(1, 4, 16, 64, 64), devices=("cpu", "gpu"))
_CPU_BENCHMARKS = (
    *(_shape(*shape) for shape in _LARGE),
    *(_shape(*shape, mask="padding") for shape in _LARGE),
    _shape(1, 8, 1024, 4096, 64, mask="media"),
    _shape(2, 16, 256, 2048, 64, mask="irregular"),
    _shape(2, 16, 256, 2048, 64, mask="bias"),
    _shape(2, 16, 256, 577, 72),
    _shape(2, 16, 256, 1601, 80),
    _decode(8),
    _SMALL,
)

# The same for a GPU, whose shapes fill it: the 16k self-attention that attention papers report, texts over several
# images, and the bias with and without a batch to sum its gradient over. Targets are set for bfloat16 on an H200.


def _on_gpu(config: Benchmark, *targets: Target, yardstick: Benchmark | None = None) -> Benchmark:
    """Returns `config` for a GPU."""
    return replace(config, targets=targets, devices=("gpu",), yardstick=yardstick)


def _faster(passes: tuple[bool, ...] = (False, True), **peers: float) -> tuple[Target, ...]:
    return tuple(
        Speedup("bf16", backward, limit, peer, device="gpu") for backward in passes for peer, limit in peers.items()
    )


_LONG = _on_gpu(
    _shape(1, 16, 16384, 16384, 128),
    Rate("bf16", False, 450.0, device="gpu"),
    Rate("bf16", True, 260.0, device="gpu"),
)
_GPU_BENCHMARKS = (
    _LONG,
    _on_gpu(_shape(4, 16, 2048, 8192, 128, mask="padding"), *_faster(sdpa=3.0, flex=1.0)),
    _on_gpu(_shape(4, 16, 2048, 16384, 128, mask="media"), *_faster(sdpa=10.0, flex=1.3, loop=3.0)),
    _on_gpu(_shape(4, 16, 2048, 4096, 128, mask="irregular"), *_faster((True,), sdpa=2.0)),
    _on_gpu(_shape(1, 16, 4096, 4096, 128, mask="bias"), *_faster((True,), sdpa=2.0)),
    _on_gpu(_shape(4, 16, 2048, 2048, 128, mask="bias"), *_faster((True,), sdpa=2.0)),
    *(
        # 0.8 of head dim 128's rate, times what rounding the dim up to the matrix units' 16 leaves of it.
        _on_gpu(
            _shape(1, 16, 16384, 16384, dim),
            *(
                YardstickShare("bf16", backward, 0.8 * dim / (-(-dim // 16) * 16), device="gpu")
                for backward in (False, True)
            ),
            yardstick=_LONG,
        )
        for dim in (64, 72, 80)
    ),
    _on_gpu(_decode(32), BandwidthShare("bf16", False, 0.8, device="gpu")),
)


def _cost(inputs: Inputs, backward: bool) -> Cost:
    # Forward: scores and output. Backward: scores again, and the gradients of weights, query, key and value.
    return attention_cost(inputs, matmuls=7 if backward else 2)


def _scores(inputs: Inputs) -> int:
    (batch, heads, q_len, _), k_len = inputs["query"].shape, inputs["key"].shape[2]
    return batch * heads * q_len * k_len


def _shards(inputs: Inputs) -> list[Shard]:
    """Returns two: a drawn sequence and key head with its query heads, and the last ones, with the largest offsets.

    Sequences or heads that share a key or a bias stay together, since its gradient is a sum over them.
    """
    floating = [x for x in inputs.values() if isinstance(x, Tensor) and x.is_floating_point() and x.dim() == 4]
    batch, heads = inputs["query"].shape[:2]
    key_heads = inputs["key"].shape[1]
    one_sequence = all(x.shape[0] == batch for x in floating)
    one_head = all(x.shape[1] in (heads, key_heads) for x in floating)
    draw = random.Random(0)
    places = ((draw.randrange(batch), draw.randrange(key_heads)), (batch - 1, key_heads - 1))

    def shard_at(sequence: int, head: int) -> Shard:
        def rows(x: Tensor) -> Tensor:
            return x[sequence : sequence + 1] if one_sequence and x.shape[0] == batch else x

        def shard(x: Any) -> Any:
            if isinstance(x, SpanMask):
                valid = None if x.key_valid is None else rows(x.key_valid)
                return SpanMask(rows(x.start), rows(x.end), valid)
            if not isinstance(x, Tensor) or x.dim() < 3:
                return x
            if one_head and x.shape[1] in (heads, key_heads):
                group = x.shape[1] // key_heads
                x = x[:, head * group : (head + 1) * group]
            return rows(x)

        return shard

    return [shard_at(*place) for place in dict.fromkeys(places)]


SPEC = OpSpec(
    name="cross_attention",
    cases=_CASES,
    benchmarks=_CPU_BENCHMARKS + _GPU_BENCHMARKS,
    cost=_cost,
    parts=Parts(_scores, _shards),
)
