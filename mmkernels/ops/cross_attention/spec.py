"""What cross-attention is: the naive formula, the cases that test it, the shapes that it is measured at."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor

from mmkernels.masks import SpanMask
from mmkernels.ops._attention.cases import CASES, attention_cost, attention_inputs, normal
from mmkernels.ops._attention.formula import probabilities, visible_keys, weighted_values
from mmkernels.ops._attention.philox import keep_mask, keep_scale
from mmkernels.spec import Benchmark, Case, Cost, Inputs, OpSpec


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    start: Tensor | None,
    end: Tensor | None,
    key_valid: Tensor | None,
    dense: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
    need_lse: bool = True,
) -> tuple[Tensor, Tensor]:
    """The naive formula, differentiable by PyTorch; what its arguments mean stands at `cross_attention`."""
    (batch, heads, q_len, _), k_len = query.shape, key.shape[2]
    repeat = heads // key.shape[1]
    if repeat > 1:
        key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    visible = visible_keys(start, end, key_valid, dense, k_len)
    weights, lse, visible = probabilities(query, key, visible, bias, scale, need_lse)
    if seed is not None:
        b, h, i = (torch.arange(n, device=query.device) for n in (batch, heads, q_len))
        keep = keep_mask(seed, dropout_p, b[:, None, None, None], h[:, None, None], i[:, None], range(k_len))
        weights = weights * keep * keep_scale(dropout_p)
    out = weighted_values(weights, value, visible)
    if gate is not None:
        out = out * gate.tanh().expand(heads)[:, None, None].to(out.dtype)
    if lse is None:
        lse = out.new_empty(0)
    # The layout of every backend: in memory [B, Lq, H, Dv].
    return out.transpose(1, 2).contiguous().transpose(1, 2), lse


def reference_backward(
    grad_out: Tensor, grad_lse: Tensor | None, *rest: object
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, bias and gate by PyTorch's autograd through `reference`."""
    *tensors, _out, _lse, scale, dropout_p, needs = rest
    places = [place for place, need in zip((0, 1, 2, 7, 8), needs, strict=True) if need]  # type: ignore[call-overload]
    with torch.enable_grad():
        for place in places:
            tensors[place] = tensors[place].detach().requires_grad_()  # type: ignore[attr-defined]
        outputs = reference(*tensors, scale, dropout_p)  # type: ignore[arg-type]
        given = [grad_out] if grad_lse is None else [grad_out, grad_lse]
        found = torch.autograd.grad(outputs[: len(given)], [tensors[place] for place in places], given)  # type: ignore[misc]
    result = []
    for place in (0, 1, 2, 7, 8):
        if place in places:
            like = torch.empty_like(tensors[place])  # type: ignore[call-overload]
            result.append(like.copy_(found[places.index(place)]))
        else:
            result.append(grad_out.new_empty(0))
    return tuple(result)  # type: ignore[return-value]


# Correctness cases: attention's, and those of the arguments that only this op has.


def _with(**more: object) -> Callable[[Generator], Inputs]:
    def make(g: Generator) -> Inputs:
        inputs = attention_inputs(g, 2, 4, 5, 7, key_heads=2) | {"mask": SpanMask.key_padding([7, 3]), "return_lse": True}
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

# Benchmark configurations: encoder-decoder fusion widths, CLIP ViT-L/14's 577 and Flamingo-like 1601 tokens, the head
# dims 72 and 80 of SigLIP-SO400M and ViT-H, a decode step of a Llama-3-8B-like model.


def _shape(batch: int, heads: int, q_len: int, k_len: int, dim: int, mask: str = "none") -> Benchmark:
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

    params = {"B": batch, "H": heads, "Lq": q_len, "Lk": k_len, "D": dim, "mask": mask}
    grads = (*_QKV, "bias") if mask == "bias" else _QKV
    tags = frozenset({mask, "large"} if q_len * k_len >= 2**18 else {mask})
    return Benchmark(f"B{batch} H{heads} {q_len}x{k_len} D{dim} {mask}", make, params, grads, tags)


def _decode(g: Generator) -> Inputs:
    return attention_inputs(g, 8, 32, 1, 4096, 128, key_heads=8)


_LARGE = ((2, 16, 256, 2048, 64), (1, 16, 128, 4096, 128), (2, 12, 64, 1024, 64))
_BENCHMARKS = (
    *(_shape(*shape) for shape in _LARGE),
    *(_shape(*shape, mask="padding") for shape in _LARGE),
    _shape(1, 8, 1024, 4096, 64, mask="media"),
    _shape(2, 16, 256, 2048, 64, mask="irregular"),
    _shape(2, 16, 256, 2048, 64, mask="bias"),
    _shape(2, 16, 256, 577, 72),
    _shape(2, 16, 256, 1601, 80),
    Benchmark("decode", _decode, {"B": 8, "H": 32, "Hkv": 8, "Lq": 1, "Lk": 4096, "D": 128}, (), frozenset({"decode"})),
    _shape(1, 4, 16, 64, 64),
)


def _cost(inputs: Inputs, backward: bool) -> Cost:
    # Forward: scores and output. Backward: scores again, and the gradients of weights, query, key and value.
    return attention_cost(inputs, matmuls=7 if backward else 2)


SPEC = OpSpec(name="cross_attention", cases=_CASES, benchmarks=_BENCHMARKS, cost=_cost)
