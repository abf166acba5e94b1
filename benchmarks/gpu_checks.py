"""Parts of `make gpu` that call ops themselves: finite and right at awkward lengths; the CPU time of a call."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor

from mmkernels import SpanMask, cross_attention
from mmkernels.bench.gate import Gate, draw_cotangents, flat, with_gradients
from mmkernels.meters import host_seconds
from mmkernels.ops.attention.cross_attention.spec import SPEC
from mmkernels.options import DTYPES
from mmkernels.spec import Inputs

Result = dict[str, Any]  # as in gpu.py
Kind = Callable[[int, int, torch.dtype], Inputs]  # queries, keys, dtype -> what a call has beside query, key and value

_BATCH, _HEADS, _KEY_HEADS = 2, 4, 2
_LENGTHS = ((64, 64), (192, 320), (1088, 1088))  # each has L % 128 == 64, where PyTorch's cuDNN attention gave NaN
_LONGEST = 16448


def _dense(blind: bool) -> Kind:
    def make(q_len: int, k_len: int, dtype: torch.dtype) -> Inputs:
        mask = torch.rand(_BATCH, 1, q_len, k_len) < 0.5
        if blind:
            mask[:, :, ::3] = False
        return {"mask": mask}

    return make


def _bias(*, hides: bool) -> Kind:
    def make(q_len: int, k_len: int, dtype: torch.dtype) -> Inputs:
        bias = torch.randn(1, _HEADS, q_len, k_len, dtype=dtype)
        if hides:
            bias = bias.masked_fill(torch.rand(bias.shape) < 0.3, -torch.inf)
        return {"bias": bias}

    return make


def _ragged(q_len: int, k_len: int, dtype: torch.dtype) -> Inputs:
    return {"mask": SpanMask.key_padding(torch.tensor([k_len, k_len * 3 // 5]))}


def _media(q_len: int, k_len: int, dtype: torch.dtype) -> Inputs:
    index = (torch.arange(q_len) * 5 // q_len - 1)[None].expand(_BATCH, -1)  # the first fifth sees no image
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
    "dense": _dense(blind=False),
    "dense, blind rows": _dense(blind=True),
    "bias": _bias(hides=False),
    "bias that hides": _bias(hides=True),
    "padding, bias, gate": lambda q, k, dtype: (
        _ragged(q, k, dtype) | _bias(hides=False)(q, k, dtype) | {"gate": torch.randn(_HEADS, dtype=dtype)}
    ),
    "dropout": lambda q, k, dtype: {"dropout_p": 0.2},
}
_FEW = ("no mask", "key padding", "dense", "bias")  # for the dtypes and head dims beside bfloat16 at 128


Task = tuple[str, str, int, tuple[tuple[int, int], ...], bool]  # kind, dtype, head dim, lengths, beside float64


def check_all(
    end: float,
    device: str,
    lengths: Sequence[tuple[int, int]] = _LENGTHS,
    longest: int = _LONGEST,
    processes: int = 0,
) -> Result:
    """Forward and every gradient: finite, and within the op's error budget against float64.

    Args:
        end: by `time.monotonic`, after which the rest is left out.
        longest: a last length, whose results are only looked at for being finite.
        processes: that share the work, most of which is compiling; 0: this one does it.
    """
    settings = [("bf16", 128, tuple(KINDS)), ("bf16", 64, _FEW), ("fp16", 128, _FEW), ("fp16", 64, _FEW)]
    tasks: list[Task] = [
        (kind, dtype, dim, tuple(lengths), kind != "dropout") for dtype, dim, kinds in settings for kind in kinds
    ]
    tasks += [(kind, "bf16", 128, ((longest, longest),), False) for kind in ("no mask", "key padding", "causal")]
    run = partial(_run_task, end, device)
    if processes:
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            results = list(pool.map(run, tasks))
    else:
        results = list(map(run, tasks))
    found: Result = {name: [x for result in results for x in result[name]] for name in ("problems", "left_out")}
    checks = sum(result["checks"] for result in results)
    return found | {"checks": checks, "summary": f"{checks} calls, forward and backward"}


def _run_task(end: float, device: str, task: Task) -> Result:
    kind, dtype, dim, lengths, exact = task
    found: Result = {"checks": 0, "problems": [], "left_out": []}
    for q_len, k_len in lengths:
        name = f"{kind}, {q_len}x{k_len}, D{dim}, {dtype}"
        if time.monotonic() > end:
            found["left_out"].append(name)
            continue
        found["checks"] += 1
        try:
            problem = _check(kind, q_len, k_len, dim, DTYPES[dtype], device, exact=exact)
        except Exception as error:  # one kernel that does not compile must not hide the others
            problem = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        if problem is not None:
            found["problems"].append(f"{name}: {problem}")
    return found


def _check(kind: str, q_len: int, k_len: int, dim: int, dtype: torch.dtype, device: str, *, exact: bool) -> str | None:
    """What is wrong, or None; `exact`: beside float64, else only whether it is finite."""
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
    found = flat(with_gradients(call, [inputs[name] for name in grads], cotangents)())
    for place, x in enumerate(found):
        if not bool(x.isfinite().all()):
            return f"result {place} has {int((~x.isfinite()).sum())} elements that are not finite"
    return Gate(SPEC, inputs, grads, cotangents).problem(found) if exact else None


# CPU time of a call.


def host_times(end: float, device: str, calls: int = 100) -> Result:
    """Microseconds that a call takes of the calling thread, by size, mode and candidate; None where it can't run."""
    from attention_peers import flex, sdpa

    prepares = {
        "ours": lambda inputs: partial(cross_attention, **inputs),
        "triton": lambda inputs: partial(cross_attention, **inputs, backend="triton"),
        "sdpa": sdpa,
        "flex": flex,
    }
    table: list[dict[str, Any]] = []
    left_out = []
    for size, inputs in _small(device):
        for mode in ("eager", "eager, with backward", "compiled"):
            if time.monotonic() > end:
                left_out.append(f"{size}, {mode}")
                continue
            row: dict[str, Any] = {"size": size, "mode": mode, "microseconds": {}, "why_not": {}}
            for name, prepare in prepares.items():
                try:
                    row["microseconds"][name] = _host_time(mode, inputs, prepare, device, calls)
                except Exception as error:  # such as no compiler
                    row["why_not"][name] = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
            table.append(row)
    lines = [
        f"{row['size']}, {row['mode']}: "
        + ", ".join(f"{name} {value:.0f} us" for name, value in row["microseconds"].items())
        for row in table
    ]
    broken = [f"{row['size']}, {row['mode']}: {row['why_not']['ours']}" for row in table if "ours" in row["why_not"]]
    return {
        "summary": "CPU time of one call (flex is compiled in every mode)",
        "lines": lines,
        "host": table,
        "left_out": left_out,
        "problems": broken,
    }


def _small(device: str) -> Iterator[tuple[str, Inputs]]:
    dtype = torch.bfloat16
    for name, heads, key_heads, q_len, k_len, dim in (
        ("B1 H4 16x64 D64", 4, 4, 16, 64, 64),
        ("B1 H32/8 1x1024 D128", 32, 8, 1, 1024, 128),
    ):
        key, value = (torch.randn(1, key_heads, k_len, dim, dtype=dtype, device=device) for _ in range(2))
        yield name, {"query": torch.randn(1, heads, q_len, dim, dtype=dtype, device=device), "key": key, "value": value}


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
