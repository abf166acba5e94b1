"""The launches that are compiled ahead of time: each kernel for the arguments that change its code."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mmkernels import SpanMask
from mmkernels.aot.resources import Resources
from mmkernels.aot.triton import TARGETS, check_frontend, resources, specialisation
from mmkernels.ops.attention.attention_received import triton as received
from mmkernels.ops.attention.attention_weights import triton as weights
from mmkernels.ops.attention.cross_attention.triton import backward, forward
from mmkernels.ops.attention.inputs import take_mask_apart
from mmkernels.ops.contrastive.info_nce.reduction import Arguments, Upstream
from mmkernels.ops.contrastive.info_nce.triton import backward as info_nce_backward
from mmkernels.ops.contrastive.info_nce.triton import forward as info_nce
from mmkernels.ops.contrastive.retrieval_ranks import triton as ranks
from mmkernels.ops.contrastive.sigmoid_contrastive import triton as sigmoid
from mmkernels.runtime import tuning
from mmkernels.runtime.triton import Launch, recorded

_BATCH, _HEADS, _LENGTH = 2, 8, 2048
_PROCESSES = 2


@dataclass(frozen=True)
class Variant:
    """Arguments of a call.

    Args:
        what: "training" (forward and backward), "decode", "received", "weights"; "info_nce", "sigmoid", "ranks".
        mask: "none", "spans", "dense", "bias" (shared by the batch, with its gradient), or "everything": valid keys, a
            whole bias with its gradient, a gate with its gradient, dropout. Of contrastive losses which pairs belong
            together: "place", "hidden" (by place, ids hide; several queries an image), or "everything": by id, hard
            texts, label smoothing, statistics.
    """

    what: str
    mask: str
    dim: int
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} D{self.dim} {self.mask}"


# The code that a mask makes is read for Hopper; elsewhere it is enough that each configuration compiles and fits. What
# takes most memory is asked of those that have least.
_MAIN = (
    *(Variant("training", mask, dim) for dim in (64, 128) for mask in ("none", "everything")),
    *(Variant("training", "spans", dim) for dim in (64, 128, 256)),
    Variant("training", "none", 80),
    Variant("training", "spans", 64, torch.float32),
    Variant("decode", "none", 128),
    *(Variant(what, "spans", 64) for what in ("received", "weights")),
    Variant("info_nce", "place", 768),
)
_HOPPER = (
    *_MAIN,
    *(Variant("training", mask, dim) for dim in (64, 128) for mask in ("dense", "bias")),
    Variant("training", "none", 72),
    Variant("training", "spans", 80),
    Variant("training", "spans", 64, torch.float16),
    Variant("decode", "spans", 128),
    *(Variant(what, "none", 128) for what in ("received", "weights")),
    *(Variant("info_nce", kind, 768) for kind in ("everything", "hidden")),
    Variant("info_nce", "place", 100, torch.float32),
    *(Variant("sigmoid", "place", dim) for dim in (768, 100)),
    Variant("ranks", "none", 768),
)
_LEAST_MEMORY = (
    *(Variant("training", "everything", dim, dtype) for dim in (128, 256) for dtype in (torch.bfloat16, torch.float32)),
    *(Variant("training", mask, 256, dtype) for mask in ("spans", "bias") for dtype in (torch.bfloat16, torch.float32)),
    *(Variant("training", "none", dim) for dim in (64, 128, 160)),
    *(Variant("decode", "spans", dim) for dim in (64, 128, 256)),
    *(Variant(what, "spans", dim) for what in ("received", "weights") for dim in (64, 128, 256)),
    *(Variant(what, "place", 768) for what in ("info_nce", "sigmoid")),
)


def variants(target: str) -> tuple[Variant, ...]:
    """What is compiled for a target."""
    return {"sm_89": _LEAST_MEMORY, "sm_90": _HOPPER, "gfx942": _MAIN + _LEAST_MEMORY[:4]}.get(target, _MAIN)


def launches(variant: Variant, target: str) -> list[Launch]:
    """What the launchers launch for a variant on a GPU of architecture `target`. No kernel runs."""
    with tuning.pretend(target), recorded() as found:
        _call(variant)
    return found


def _call(variant: Variant) -> None:
    if variant.what in ("info_nce", "sigmoid", "ranks"):
        _call_contrastive(variant)
        return
    dim, dtype = variant.dim, variant.dtype
    q_len = 1 if variant.what == "decode" else _LENGTH
    query = torch.empty(_BATCH, _HEADS, q_len, dim, dtype=dtype)
    key = torch.empty(_BATCH, 2 if variant.what == "decode" else _HEADS, _LENGTH, dim, dtype=dtype)
    masks = take_mask_apart(_mask(variant.mask, q_len), query, _LENGTH)
    if variant.what == "received":
        received.forward(query, key, *masks, None, None, 0.1)
        return
    if variant.what == "weights":
        weights.forward(query, key, *masks, None, 0.1)
        return
    bias = gate = seed = None
    if variant.mask in ("bias", "everything"):
        bias = torch.empty(1 if variant.mask == "bias" else _BATCH, _HEADS, q_len, _LENGTH, dtype=dtype)
    if variant.mask == "everything":
        gate, seed = torch.zeros(_HEADS, dtype=dtype), torch.zeros(1, dtype=torch.int64)
    out, lse = forward.forward(query, key, key, *masks, bias, gate, seed, 0.1, 0.1)
    if variant.what == "training":
        needs = [True, True, True, bias is not None, gate is not None]
        backward.backward(out, None, query, key, key, *masks, bias, gate, seed, out, lse, 0.1, 0.1, needs)


def _call_contrastive(variant: Variant) -> None:
    rows, dtype = 1024, variant.dtype
    text = torch.empty(rows, variant.dim, dtype=dtype)
    hidden, everything = variant.mask == "hidden", variant.mask == "everything"
    image = torch.empty(rows, 4, variant.dim, dtype=dtype) if hidden else text
    scale, number = torch.ones(()), torch.arange(rows)
    ids = number if hidden or everything else None
    if variant.what == "ranks":
        ranks.forward(image, text, number)
    elif variant.what == "sigmoid":
        sigmoid.forward(image, text, scale, scale, ids, ids, [True] * 4)
    else:
        hard, smoothing = (text if everything else None), (0.1 if everything else 0.0)
        state, grad = torch.ones(4, rows), torch.ones(rows)
        given = Arguments(image, text, scale, ids, ids, hard, hidden, smoothing)
        info_nce.forward(given, everything)
        info_nce_backward.backward(given, Upstream(state, state, grad, grad, [True] * 4))


def _mask(kind: str, q_len: int) -> SpanMask | Tensor | None:
    if kind == "spans":
        return SpanMask.causal(q_len, _LENGTH)
    if kind == "dense":
        return torch.ones(_BATCH, 1, q_len, _LENGTH, dtype=torch.bool)
    return SpanMask.from_key_mask(torch.ones(_BATCH, _LENGTH, dtype=torch.bool)) if kind == "everything" else None


def distinct(target: str) -> Iterator[tuple[Variant, Launch]]:
    """Every variant's launches, the same code once."""
    seen: set[str] = set()
    for variant in variants(target):
        for launch in launches(variant, target):
            code = repr((launch.kernel.__name__, launch.config, specialisation(launch)))
            if code not in seen:
                seen.add(code)
                yield variant, launch


# In processes of their own, each of which makes the launches again: they hold tensors and code.


def compile_triton() -> list[Resources]:
    """Every target's kernels."""
    return _for_each_launch(_compile)


def translate_triton() -> int:
    """Every target's kernels as far as Triton's front end; how many."""
    return len(_for_each_launch(_translate))


def _for_each_launch(work: Callable[[str, int], Any]) -> list[Any]:
    with ProcessPoolExecutor(_PROCESSES, mp_context=multiprocessing.get_context("spawn")) as pool:
        counts = dict(zip(TARGETS, pool.map(_count, TARGETS), strict=True))
        jobs = [(target, number) for target in TARGETS for number in range(counts[target])]
        return list(pool.map(work, *zip(*jobs, strict=True)))


@cache
def _launches(target: str) -> list[tuple[Variant, Launch]]:
    return list(distinct(target))


def _count(target: str) -> int:
    return len(_launches(target))


def _compile(target: str, number: int) -> Resources:
    return _tried(target, number, lambda variant, launch: resources(launch, f"{variant} {variant.what}", target))


def _translate(target: str, number: int) -> None:
    _tried(target, number, lambda variant, launch: check_frontend(launch, target))


def _tried(target: str, number: int, work: Callable[[Variant, Launch], Any]) -> Any:
    variant, launch = _launches(target)[number]
    try:
        return work(variant, launch)
    except Exception as error:  # of the compiler's own kinds, some of which can't be passed on to another process
        name = launch.kernel.__name__
        raise RuntimeError(f"{name}, {variant}, {launch.config} does not compile for {target}: {error}") from None
