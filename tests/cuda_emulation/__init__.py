"""The CUDA decode kernels' source, compiled for the host: see ``fibers.h`` and ``ptx.h``."""

from __future__ import annotations

import ctypes
import math
import shutil
import subprocess
from functools import cache
from pathlib import Path

import torch
from filelock import FileLock
from op_runs import one_run
from torch import Tensor

_HERE = Path(__file__).parent
ROOT = _HERE.parents[1]
SCHEDULES = (0, 1, 2, 3)
"""Bit 0: copies land as early as they may rather than as late; bit 1: threads and blocks run backwards."""

_POINTER, _I64, _I32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
_GUARD = 64  # elements on either side of what a kernel writes


class _Problem(ctypes.Structure):
    """`DecodeProblem` of csrc/attention/decode_plan.h."""

    _fields_ = (
        *((name, _POINTER) for name in ("query", "key", "value")),
        *(
            (f"{name}_{dim}", _I64)
            for name, dims in (("query", "bhi"), ("key", "bhj"), ("value", "bhj"))
            for dim in dims
        ),
        *((name, _POINTER) for name in ("start", "end")),
        *((name, _I64) for name in ("start_b", "start_i", "end_b", "end_i")),
        ("key_valid", _POINTER),
        *((name, _I64) for name in ("valid_b", "valid_j")),
        ("gate", _POINTER),
        ("gate_is_float", ctypes.c_bool),
        ("gate_h", _I64),
        ("scale", ctypes.c_float),
        *((name, _POINTER) for name in ("out", "lse", "partial")),
        *((name, _I32) for name in ("batch", "heads", "key_heads", "q_len", "k_len", "splits")),
    )


class _Range(ctypes.Structure):
    _fields_ = (("begin", _POINTER), ("end", _POINTER), ("writable", ctypes.c_bool))


def why_not() -> str | None:
    """Why the kernels can't be compiled for the host, or None."""
    return None if shutil.which("g++") else "g++ not found"


@cache
def library() -> ctypes.CDLL:
    """Compiled once for each state of the sources, by one of the processes that need it at once."""
    sources = [*_HERE.glob("*.h"), *_HERE.glob("*.cpp"), *(ROOT / "csrc" / "attention").glob("decode_*")]
    built = ROOT / "build" / "cuda_emulation" / "decode.so"
    built.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{built}.lock"):
        if not built.exists() or built.stat().st_mtime < max(source.stat().st_mtime for source in sources):
            # Fibers change stacks by longjmp, which a fortified C library takes for an error.
            flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-U_FORTIFY_SOURCE", "-fPIC"]
            subprocess.run(["g++", *flags, "-shared", "-o", built, _HERE / "decode.cpp"], check=True)
    loaded = ctypes.CDLL(str(built))
    loaded.mmk_decode.restype = ctypes.c_char_p
    assert loaded.mmk_problem_bytes() == ctypes.sizeof(_Problem)
    return loaded


def plan(batch: int, heads: int, key_heads: int, q_len: int, k_len: int, dim: int, sms: int, shared: int) -> list[int]:
    """`plan_decode`'s [splits, blocks, merge blocks, partial floats]; shared: bytes of a multiprocessor."""
    plan = (_I64 * 4)()
    sizes = (_I64(n) for n in (batch, heads, key_heads, q_len, k_len))
    library().mmk_plan(*sizes, dim, sms, shared, plan)
    return list(plan)


def decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    start: Tensor | None = None,
    end: Tensor | None = None,
    key_valid: Tensor | None = None,
    gate: Tensor | None = None,
    scale: float | None = None,
    *,
    splits: int = 1,
    schedule: int = 0,
) -> tuple[Tensor, Tensor]:
    """The kernels' (out, lse); raises AssertionError where they do what they must not."""
    batch, heads, q_len, dim = query.shape
    sizes = (batch * q_len * heads * dim, batch * heads * q_len, batch * heads * q_len * splits * (dim + 2))
    written = [torch.full((n + 2 * _GUARD,), math.nan, dtype=d) for n, d in zip(sizes, (query.dtype, *_FLOATS))]
    out, lse, partial = (x[_GUARD:-_GUARD] for x in written)
    problem = _Problem(
        *(x.data_ptr() for x in (query, key, value)),
        *(stride for x in (query, key, value) for stride in _strides(x, 3)),
        *(None if x is None else x.data_ptr() for x in (start, end)),
        *(stride for x in (start, end) for stride in _strides(x, 2)),
        None if key_valid is None else key_valid.data_ptr(),
        *_strides(key_valid, 2),
        None if gate is None else gate.data_ptr(),
        gate is not None and gate.dtype == torch.float32,
        0 if gate is None or gate.numel() == 1 else gate.stride(0),
        (dim**-0.5 if scale is None else scale) / math.log(2),
        *(x.data_ptr() for x in (out, lse, partial)),
        *(batch, heads, key.shape[1], q_len, key.shape[2], splits),
    )
    read = [x for x in (query, key, value, start, end, key_valid, gate) if x is not None and x.numel()]
    ranges = [_range(x, False) for x in read] + [_range(x, True) for x in (out, lse, partial)]
    bf16 = query.dtype == torch.bfloat16
    with one_run("cross_attention"):
        error = library().mmk_decode(
            ctypes.byref(problem), int(bf16), dim, schedule, (_Range * len(ranges))(*ranges), len(ranges)
        )
    assert not error, error.decode()
    for x in written:
        assert x[:_GUARD].isnan().all() and x[-_GUARD:].isnan().all(), "a write past an end"
    return out.view(batch, q_len, heads, dim).transpose(1, 2), lse.view(batch, heads, q_len)


_FLOATS = (torch.float32, torch.float32)


def _strides(x: Tensor | None, count: int) -> list[int]:
    return [0] * count if x is None else [0 if x.shape[d] == 1 else x.stride(d) for d in range(count)]


def _range(x: Tensor, writable: bool) -> _Range:
    last = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    return _Range(x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size(), writable)
