"""Co-attention's GPU kernels: tile sizes, what is compiled ahead of time, what is tuned."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Generator

from mmkernels.masks import SpanMask
from mmkernels.ops.attention import plans
from mmkernels.ops.attention.co_attention.cases import co_inputs
from mmkernels.ops.common.cases import normal
from mmkernels.plan import TARGETS, Plan, Problem, Search, Variant
from mmkernels.spec import Inputs

# (rows of the own side, rows of the other side, warps, stages) for head dims up to 64, 128 and 256. They are chosen by
# registers and shared memory, which `python -m mmkernels.aot --table` prints; none has been timed on a GPU yet.
_HOPPER = {
    "forward": ((128, 64, 8, 3), (128, 64, 8, 3), (64, 64, 8, 2)),
    "forward_masked": ((128, 64, 8, 2), (64, 64, 8, 3), (64, 32, 8, 2)),
    "forward_dropout": ((64, 64, 8, 2), (64, 32, 8, 2), (32, 32, 8, 2)),
    "backward": ((64, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 1)),
    "backward_dropout": ((32, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 1)),
    "grad_bias": ((32, 32, 8, 1), (32, 16, 8, 1), (32, 16, 8, 1)),
}
_AMPERE = _HOPPER | {
    "forward": ((128, 64, 8, 3), (128, 32, 8, 3), (64, 32, 8, 2)),
    "forward_masked": ((128, 64, 8, 2), (64, 32, 8, 3), (64, 32, 8, 2)),
}
_ADA = _AMPERE | {  # 100 KiB of shared memory a multiprocessor, against 164 and 228
    "forward": ((128, 64, 8, 2), (128, 32, 8, 2), (64, 32, 8, 1)),
    "forward_masked": ((128, 64, 8, 2), (64, 32, 8, 2), (64, 32, 8, 1)),
    "forward_dropout": ((64, 64, 8, 2), (64, 32, 8, 2), (32, 32, 8, 1)),
    "backward": ((64, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1)),
    "backward_dropout": ((32, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1)),
}
_CDNA = _ADA | {  # 64 KiB
    "forward": ((128, 64, 4, 1), (128, 32, 4, 1), (64, 32, 4, 1)),
    "forward_masked": ((128, 64, 4, 1), (64, 32, 4, 1), (32, 32, 4, 1)),
    "forward_dropout": ((64, 64, 4, 1), (64, 32, 4, 1), (32, 32, 4, 1)),
    "backward": ((64, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1)),
    "backward_dropout": ((32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1)),
    "grad_bias": ((32, 32, 4, 1), (32, 16, 4, 1), (32, 16, 4, 1)),
}

_HOPPER_ONLY = ("sm_90",)
_VALUES = ("a", "b", "value_a", "value_b")


def _inputs(kind: str, dim: int, dtype: torch.dtype) -> Inputs:
    """Returns uninitialised arguments of a kind: "none", "padding", "spans", or "everything"."""
    batch, heads, a_len, b_len = 2, 8, 4096, 1024
    a, b = (torch.empty(batch, heads, length, dim, dtype=dtype) for length in (a_len, b_len))
    inputs: Inputs = {"a": a, "b": b, "value_a": a, "value_b": b}
    valid = {"valid_a": torch.ones(batch, a_len).bool(), "valid_b": torch.ones(batch, b_len).bool(), "clamp": 5e4}
    if kind == "padding":
        inputs |= valid
    elif kind == "spans":
        inputs |= {"mask": SpanMask.causal(a_len, b_len)}
    elif kind == "everything":
        dense = torch.ones(batch, 1, a_len, b_len, dtype=torch.bool)
        bias = torch.empty(1, heads, a_len, b_len, dtype=dtype)
        inputs |= valid | {"mask": dense, "bias": bias, "dropout_p": 0.1}
    return inputs


def _variants() -> Iterator[Variant]:
    bf16, fp32 = torch.bfloat16, torch.float32
    yield _training("none", 64, bf16, _HOPPER_ONLY)
    yield _training("padding", 256, bf16, TARGETS)
    yield _training("everything", 128, bf16, TARGETS)
    yield _training("none", 256, bf16, ("sm_80", "sm_100"))
    yield _training("spans", 72, bf16, ("sm_80",))
    yield _training("everything", 256, bf16, ("sm_89",))
    yield _training("everything", 256, fp32, ("sm_89",))


def _training(kind: str, dim: int, dtype: torch.dtype, targets: tuple[str, ...]) -> Variant:
    name = f"{str(dtype).removeprefix('torch.')} D{dim} {kind} training"
    grads = (*_VALUES, "bias") if kind == "everything" else _VALUES
    return Variant(name, lambda: _inputs(kind, dim, dtype), grads, targets)


def _why_not(args: Any) -> str | None:
    return plans.too_wide(max(x.shape[3] for x in (args.a, args.value_a, args.value_b)))


# What kernels are timed on: an image's patches with a text, and two long sequences.


def _fusion(g: Generator, dim: int) -> Inputs:
    return co_inputs(g, 2, 4, 13_294, 256, dim)


def _padded(g: Generator, dim: int) -> Inputs:
    words = torch.arange(256, device=g.device) < torch.tensor([[64], [256]], device=g.device)
    return _fusion(g, dim) | {"valid_b": words}


def _square(g: Generator, dim: int) -> Inputs:
    return co_inputs(g, 2, 8, 2048, 2048, dim)


def _biased(g: Generator, dim: int) -> Inputs:
    return co_inputs(g, 4, 8, 1024, 2048, dim) | {"bias": normal(g, 1, 8, 1024, 2048)}


def _heaviest(*grads: str) -> Problem:
    def make(g: Generator, dim: int) -> Inputs:
        mask = torch.rand(2, 4, 256, 512, generator=g, device=g.device) < 0.5
        valid = {"valid_a": mask[:, 0, :, 0], "valid_b": mask[:, 0, 0]}
        return co_inputs(g, 2, 4, 256, 512, dim) | valid | {"mask": mask, "bias": normal(g, 1, 4, 256, 512)}

    return Problem(make, grads)


def _search(problems: tuple[Problem, ...], heaviest: Problem) -> Search:
    return Search((32, 64, 128), (16, 32, 64, 128), (4, 8), (1, 2, 3), problems, heaviest, plans.least_shared)


PLAN = Plan(
    tiles={"sm_80": _AMPERE, "sm_89": _ADA, "sm_90": _HOPPER, "sm_100": _HOPPER, "gfx942": _CDNA},
    float32=plans.FLOAT32,
    variants=tuple(_variants()),
    limits=(plans.NO_SPILLS,),
    searches={
        "forward": _search((Problem(_fusion), Problem(_square)), Problem(_square)),
        "forward_masked": _search((Problem(_padded),), _heaviest()),
        "backward": _search((Problem(_fusion, _VALUES), Problem(_square, _VALUES)), _heaviest(*_VALUES)),
        "grad_bias": _search((Problem(_biased, ("bias",)),), _heaviest("bias")),
    },
    why_not=_why_not,
)
