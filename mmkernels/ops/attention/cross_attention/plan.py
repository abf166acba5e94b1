"""Cross-attention's GPU kernels: tile sizes, what is compiled ahead of time, what is tuned."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Generator

from mmkernels.masks import SpanMask
from mmkernels.ops.attention import plans
from mmkernels.ops.attention.cases import attention_inputs
from mmkernels.ops.common.cases import normal
from mmkernels.plan import TARGETS, CudaSource, Limit, Plan, Problem, Search, Variant
from mmkernels.spec import Inputs

# (rows, keys, warps, stages) for head dims up to 64, 128 and 256; "latent" is for 576 and 512. They are chosen by
# registers and shared memory, which `python -m mmkernels.aot --table` prints; none has been timed on a GPU yet, see
# benchmarks/tune.py.
_HOPPER = {
    "forward": ((128, 64, 8, 3), (128, 64, 8, 3), (64, 64, 8, 2)),
    "decode": ((16, 64, 4, 3), (16, 64, 4, 3), (16, 32, 4, 3)),
    "latent": ((16, 32, 8, 3),),
    "grad_query": ((128, 64, 8, 2), (128, 64, 8, 2), (32, 32, 8, 2)),
    "grad_key_value": ((64, 128, 8, 2), (64, 128, 8, 2), (32, 32, 8, 2)),
    "grad_key_value_masked": ((64, 128, 8, 2), (32, 64, 8, 2), (32, 32, 8, 2)),
    "grad_query_dropout": ((128, 32, 8, 2), (128, 32, 8, 2), (64, 32, 8, 2)),
    "grad_key_value_dropout": ((32, 64, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2)),
    "grad_bias": ((64, 64, 8, 2), (64, 64, 8, 2), (32, 32, 8, 1)),
}
_AMPERE = _HOPPER | {
    "latent": ((16, 32, 8, 2),),
    "forward": ((128, 64, 8, 3), (128, 32, 8, 3), (64, 32, 8, 2)),
    "grad_query": ((64, 64, 4, 2), (64, 64, 8, 2), (32, 32, 8, 1)),
    "grad_key_value": ((32, 64, 4, 2), (32, 64, 8, 2), (32, 32, 8, 1)),
    "grad_key_value_masked": ((32, 64, 4, 2), (32, 64, 8, 2), (32, 32, 8, 1)),
    "grad_query_dropout": ((64, 32, 8, 2), (64, 32, 8, 2), (32, 32, 8, 2)),
    "grad_key_value_dropout": ((32, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2)),
}
_ADA = _AMPERE | {  # 100 KiB of shared memory a multiprocessor, against 164 and 228
    "latent": ((16, 16, 4, 1),),
    "forward": ((128, 64, 8, 2), (128, 32, 8, 2), (64, 32, 8, 1)),
    "grad_query": ((64, 64, 4, 1), (64, 32, 4, 1), (32, 32, 8, 1)),
    "grad_key_value": ((32, 64, 4, 1), (32, 64, 8, 1), (32, 32, 8, 1)),
    "grad_key_value_masked": ((32, 64, 4, 1), (32, 64, 8, 1), (32, 32, 8, 1)),
    "grad_query_dropout": ((64, 32, 8, 1), (64, 32, 8, 1), (32, 32, 8, 1)),
    "grad_key_value_dropout": ((32, 64, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1)),
}
_CDNA = _AMPERE | {  # 64 KiB
    "forward": ((128, 64, 4, 1), (128, 32, 4, 1), (64, 32, 4, 1)),
    "decode": ((16, 64, 4, 1), (16, 64, 4, 1), (16, 32, 4, 1)),
    "latent": ((16, 16, 4, 1),),
    "grad_query": ((64, 64, 4, 1), (64, 32, 4, 1), (32, 32, 4, 1)),
    "grad_key_value": ((64, 64, 4, 1), (32, 64, 4, 1), (32, 32, 4, 1)),
    "grad_key_value_masked": ((64, 64, 4, 1), (32, 64, 4, 1), (32, 32, 4, 1)),
    "grad_query_dropout": ((64, 32, 4, 1), (64, 32, 4, 1), (32, 32, 4, 1)),
    "grad_key_value_dropout": ((32, 64, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1)),
    "grad_bias": ((64, 64, 4, 1), (32, 64, 4, 1), (32, 32, 4, 1)),
}

# What is compiled ahead of time. The code of every mask is compiled for Hopper; elsewhere it is enough that each
# configuration compiles and fits. Ada and CDNA, which have the least shared memory, compile what takes the most.
_HOPPER_ONLY = ("sm_90",)
_LEAST_MEMORY = ("sm_89", "gfx942")
_BUT_ADA = tuple(target for target in TARGETS if target != "sm_89")


def _variants() -> Iterator[Variant]:
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    for dim in (64, 128):
        yield _training("none", dim)
        yield _training("everything", dim, targets=TARGETS if dim == 128 else _BUT_ADA)
        yield _training("spans", dim, targets=_BUT_ADA)
    yield _training("spans", 256)
    yield _training("none", 80, targets=_BUT_ADA)
    yield _training("spans", 64, fp32, targets=_BUT_ADA)
    yield _decode("none", 128, _BUT_ADA)
    for mask in ("dense", "bias"):
        for dim in (64, 128):
            yield _training(mask, dim, targets=_HOPPER_ONLY)
    yield _training("none", 72, targets=_HOPPER_ONLY)
    yield _training("spans", 80, targets=_HOPPER_ONLY)
    yield _training("spans", 64, fp16, targets=_HOPPER_ONLY)
    yield _decode("spans", 128, ("sm_89", "sm_90"))
    yield _training("everything", 128, fp32, targets=_LEAST_MEMORY)
    for dtype in (bf16, fp32):
        yield _training("everything", 256, dtype, targets=_LEAST_MEMORY)
        yield _training("bias", 256, dtype, targets=("sm_89",))
    yield _training("spans", 256, fp32, targets=("sm_89",))
    yield _training("none", 160, targets=("sm_89",))
    for dim in (64, 256):
        yield _decode("spans", dim, ("sm_89",))
    yield Variant("bfloat16 D576 spans decode", lambda: plans.latent("spans"))
    yield Variant("float32 D576 none decode", lambda: plans.latent("none", fp32, shared=False), (), _LEAST_MEMORY)


def _training(mask: str, dim: int, dtype: torch.dtype = torch.bfloat16, targets: tuple[str, ...] = TARGETS) -> Variant:
    grads = ["query", "key", "value"]
    if mask in ("bias", "everything"):
        grads.append("bias")
    if mask == "everything":
        grads.append("gate")
    name = f"{str(dtype).removeprefix('torch.')} D{dim} {mask} training"
    return Variant(name, lambda: plans.attention(mask, dim, dtype), tuple(grads), targets)


def _decode(mask: str, dim: int, targets: tuple[str, ...]) -> Variant:
    return Variant(f"bfloat16 D{dim} {mask} decode", lambda: plans.attention(mask, dim, decode=True), (), targets)


# What kernels are timed on: a long sequence without a mask and a text over images, as far as each kernel has the two.


def _plain(length: int) -> Callable[[Generator, int], Inputs]:
    return lambda g, dim: attention_inputs(g, 1, 16, length, length, dim)


def _media(g: Generator, dim: int) -> Inputs:
    index = (torch.arange(2048) * 8 // 2048)[None].expand(2, -1)
    return attention_inputs(g, 2, 16, 2048, 8192, dim) | {"mask": SpanMask.media(index, 1024)}


def _biased(g: Generator, dim: int) -> Inputs:
    return attention_inputs(g, 4, 16, 1024, 2048, dim) | {"bias": normal(g, 1, 16, 1024, 2048)}


def _cached(g: Generator, dim: int) -> Inputs:
    return attention_inputs(g, 16, 32, 1, 4096, dim, key_heads=8)


def _heaviest(
    *grads: str, q_len: int = 256, dropout_p: float = 0.0, masked: bool = True, bias_batch: int = 1
) -> Problem:
    def make(g: Generator, dim: int) -> Inputs:
        inputs = attention_inputs(g, 2, 4, q_len, 512, dim) | {"gate": normal(g, 4), "dropout_p": dropout_p}
        if masked:
            mask = torch.rand(2, 4, q_len, 512, generator=g, device=g.device) < 0.5
            inputs |= {"mask": mask, "bias": normal(g, bias_batch, 4, q_len, 512)}
        return inputs

    return Problem(make, grads)


def _search(rows: tuple[int, ...], columns: tuple[int, ...], warps: tuple[int, ...], stages: tuple[int, ...],
            problems: tuple[Problem, ...], heaviest: Problem) -> Search:  # fmt: skip
    return Search(rows, columns, warps, stages, problems, heaviest, plans.least_shared)


_KEY_VALUE = ("key", "value")
# The configurations for dropout are not searched: registers set what their tiles hold.
_SEARCHES = {
    "forward": _search(
        (64, 128), (32, 64, 128), (4, 8), (2, 3, 4), (Problem(_plain(8192)), Problem(_media)), _heaviest(dropout_p=0.1)
    ),
    "decode": _search(
        (16,), (32, 64, 128), (2, 4, 8), (2, 3, 4, 5), (Problem(_cached),), _heaviest(q_len=1, dropout_p=0.1)
    ),
    "grad_query": _search(
        (64, 128), (32, 64, 128), (4, 8), (1, 2, 3), (Problem(_plain(4096), ("query",)), Problem(_media, ("query",))),
        _heaviest("query", bias_batch=2),
    ),
    "grad_key_value": _search(  # which runs only without a mask
        (32, 64, 128), (64, 128), (4, 8), (1, 2, 3), (Problem(_plain(4096), _KEY_VALUE),),
        _heaviest(*_KEY_VALUE, masked=False),
    ),
    "grad_key_value_masked": _search(
        (32, 64), (64, 128), (4, 8), (1, 2, 3), (Problem(_media, _KEY_VALUE),), _heaviest(*_KEY_VALUE)
    ),
    "grad_bias": _search(
        (32, 64, 128), (32, 64, 128), (4, 8), (1, 2), (Problem(_biased, ("bias",)),), _heaviest("bias")
    ),
}  # fmt: skip

PLAN = Plan(
    tiles={"sm_80": _AMPERE, "sm_89": _ADA, "sm_90": _HOPPER, "sm_100": _HOPPER, "gfx942": _CDNA},
    float32=plans.FLOAT32,
    variants=tuple(_variants()),
    limits=(plans.NO_SPILLS, Limit(kernels=("decode_*",))),  # decode_*: the CUDA C++ kernels
    searches=_SEARCHES,
    why_not=plans.why_not_latent,
    cuda=CudaSource(
        "attention/cuda.cu", ("D{}", "{} row tiles"), ("attention/decode_plan.h", "mmkernels::decode_shared_bytes")
    ),
)
