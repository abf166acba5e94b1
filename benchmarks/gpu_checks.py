"""Checks and times that need a GPU, as pytest runs them for `make gpu`: awkward lengths; the CPU time of a call."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from mmkernels import SpanMask, cross_attention
from mmkernels.bench.gate import Gate, draw_cotangents, flat, with_gradients
from mmkernels.meters import host_seconds
from mmkernels.ops.attention.cross_attention.spec import SPEC
from mmkernels.options import DTYPES
from mmkernels.spec import Inputs

Kind = Callable[[int, int, torch.dtype], Inputs]  # queries, keys, dtype -> what a call has beside query, key and value

_BATCH, _HEADS, _KEY_HEADS = 2, 4, 2
_LENGTHS = ((64, 64), (192, 320), (1088, 1088))  # each has L % 128 == 64, where PyTorch's cuDNN attention gave NaN
_LONGEST = 16448


def _dense(q_len: int, k_len: int, dtype: torch.dtype, every: int = 0) -> Inputs:
    """A dense mask that hides everything from one row of `every` so many; 0: from none on purpose."""
    mask = torch.rand(_BATCH, 1, q_len, k_len) < 0.5
    if every:
        mask[:, :, ::every] = False
    return {"mask": mask}


def _bias(q_len: int, k_len: int, dtype: torch.dtype, hidden: float = 0.0) -> Inputs:
    """A bias, of which a share is -inf."""
    bias = torch.randn(1, _HEADS, q_len, k_len, dtype=dtype)
    return {"bias": bias.masked_fill(torch.rand(bias.shape) < hidden, -torch.inf)}


def _ragged(q_len: int, k_len: int, dtype: torch.dtype) -> Inputs:
    return {"mask": SpanMask.key_padding(torch.tensor([k_len, k_len * 3 // 5]))}


def _media(q_len: int, k_len: int, dtype: torch.dtype) -> Inputs:
    index = (torch.arange(q_len) * 5 // q_len - 1)[None].expand(_BATCH, -1)  # no image is visible to the first fifth
    return {"mask": SpanMask.media(index, k_len // 4)}


KINDS: dict[str, Kind] = {
    "no mask": lambda q, k, dtype: {},
    "key padding": _ragged,
    "left padding": lambda q, k, dtype: {"mask": SpanMask.left_padding(torch.tensor([k, k // 2]), k)},
    "causal": lambda q, k, dtype: {"mask": SpanMask.causal(q, k)},
    "prefix": lambda q, k, dtype: {"mask": SpanMask.prefix_lm(torch.tensor([k // 3, 0]), q, k)},
    "window": lambda q, k, dtype: {"mask": SpanMask.window(60, 30, q, k)},
    "media": _media,
    "holes": lambda q, k, dtype: {"mask": SpanMask.from_key_mask(torch.rand(_BATCH, k) < 0.6)},
    "dense": _dense,
    "dense, hidden rows": partial(_dense, every=3),
    "bias": _bias,
    "bias that hides": partial(_bias, hidden=0.3),
    "padding, bias, gate": lambda q, k, dtype: (
        _ragged(q, k, dtype) | _bias(q, k, dtype) | {"gate": torch.randn(_HEADS, dtype=dtype)}
    ),
    "dropout": lambda q, k, dtype: {"dropout_p": 0.2},
}
_FEW = ("no mask", "key padding", "dense", "bias")  # for the dtypes and head dims beside bfloat16 at 128


def attention_checks() -> Iterator[tuple[str, str, int, int, int]]:
    """Returns (kind, dtype, head dim, queries, keys)."""
    settings = [("bf16", 128, tuple(KINDS)), ("bf16", 64, _FEW), ("fp16", 128, _FEW), ("fp16", 64, _FEW)]
    for dtype, dim, kinds in settings:
        for kind in kinds:
            yield from ((kind, dtype, dim, q_len, k_len) for q_len, k_len in _LENGTHS)
    yield from ((kind, "bf16", 128, _LONGEST, _LONGEST) for kind in ("no mask", "key padding", "causal"))


@pytest.mark.parametrize(("kind", "dtype", "dim", "q_len", "k_len"), attention_checks())
def test_attention(kind: str, dtype: str, dim: int, q_len: int, k_len: int) -> None:
    """Forward and every gradient: finite, and within the op's error budget against float64."""
    compared = kind != "dropout" and q_len != _LONGEST
    problem = problem_of(kind, q_len, k_len, dim, DTYPES[dtype], "cuda", compared=compared)
    assert problem is None, problem


def problem_of(
    kind: str, q_len: int, k_len: int, dim: int, dtype: torch.dtype, device: str, *, compared: bool
) -> str | None:
    """Returns what is wrong, or None; `compared`: with float64, else only whether it is finite."""
    torch.manual_seed(0)
    with torch.device(device):
        inputs: Inputs = {
            "query": torch.randn(_BATCH, _HEADS, q_len, dim, dtype=dtype),
            "key": torch.randn(_BATCH, _KEY_HEADS, k_len, dim, dtype=dtype),
            "value": torch.randn(_BATCH, _KEY_HEADS, k_len, dim, dtype=dtype),
        } | KINDS[kind](q_len, k_len, dtype)
    grads = [name for name, x in inputs.items() if isinstance(x, Tensor) and x.is_floating_point()]
    inputs = {name: x.requires_grad_() if name in grads else x for name, x in inputs.items()}
    call = partial(cross_attention, **inputs)
    cotangents = draw_cotangents(flat(call()))
    results = flat(with_gradients(call, [inputs[name] for name in grads], cotangents)())
    for place, x in enumerate(results):
        if not bool(x.isfinite().all()):
            return f"result {place} has {int((~x.isfinite()).sum())} elements that are not finite"
    return Gate(SPEC, inputs, grads, cotangents).problem(results) if compared else None


# CPU time of a call.

SIZES = {"B1 H4 16x64 D64": (4, 4, 16, 64, 64), "B1 H32/8 1x1024 D128": (32, 8, 1, 1024, 128)}
MODES = ("eager", "eager, with backward", "compiled")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", SIZES)
def test_host_time(size: str, mode: str, record_property: Callable[[str, object], None]) -> None:
    """Only ours must run; the figures are recorded."""
    row = host_times(size, mode, "cuda")
    times = (f"{name} {microseconds:.0f} us" for name, microseconds in row["microseconds"].items())
    record_property("line", f"{size}, {mode}: {', '.join(times)} (flex is compiled in every mode)")
    record_property("row", json.dumps(row))
    assert "ours" in row["microseconds"], row["why_not"]["ours"]


def host_times(size: str, mode: str, device: str, calls: int = 100) -> dict[str, Any]:
    """Returns the microseconds that a call takes of the calling thread by candidate, and why others can't run."""
    from attention_peers import flex, sdpa

    prepares = {
        "ours": lambda inputs: partial(cross_attention, **inputs),
        "triton": lambda inputs: partial(cross_attention, **inputs, backend="triton"),
        "sdpa": sdpa,
        "flex": flex,
    }
    heads, key_heads, q_len, k_len, dim = SIZES[size]
    draw = partial(torch.randn, dtype=torch.bfloat16, device=device)
    inputs = {"query": draw(1, heads, q_len, dim), **{x: draw(1, key_heads, k_len, dim) for x in ("key", "value")}}
    row: dict[str, Any] = {"size": size, "mode": mode, "microseconds": {}, "why_not": {}}
    for name, prepare in prepares.items():
        try:
            row["microseconds"][name] = _host_time(mode, inputs, prepare, device, calls)
        except Exception as error:  # such as no compiler
            row["why_not"][name] = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    return row


def _host_time(mode: str, inputs: Inputs, prepare: Callable[[Inputs], Any], device: str, calls: int) -> float:
    trained = mode == "eager, with backward"
    given = {name: x.detach().requires_grad_(trained) for name, x in inputs.items()}
    call = prepare(given)
    if mode == "compiled":
        torch._dynamo.reset()
        call = torch.compile(call, fullgraph=True, dynamic=False)
    leaves = list(given.values()) if trained else []
    cotangents = draw_cotangents(flat(call())) if trained else []
    timed = with_gradients(call, leaves, cotangents)
    timed()
    return 1e6 * host_seconds(timed, device, calls=calls).seconds
