"""The CUDA extension: loads the decode kernels of ``csrc/attention/cuda.cu``, says why a call can't use them.

Untested on a GPU.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["decode", "why_not"]

# As in csrc/attention/decode_plan.h.
_DIMS = (64, 80, 96, 128)
_QUERIES, _ROWS = 8, 64
_KEYS, _OUTPUT_ROWS = 2**31 - 1 - 4 * 64, (2**31 - 1) // 128
_DTYPES = (torch.bfloat16, torch.float16)
_CAPABILITY = (8, 0)


def _load() -> str | None:
    """Why the extension can't be used, or None."""
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    folder = Path(__file__).parents[1]
    library = folder / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not library.exists():
        reason = folder / "_cuda_why_not.txt"  # left by setup.py
        why = reason.read_text().strip() if reason.exists() else "there is no such file"
        return f"the CUDA extension is not built: {why}; install again with nvcc and --no-build-isolation"
    try:
        torch.ops.load_library(str(library))
        overload = torch.ops.mmkernels.cross_attention_decode_cuda.default
    except (OSError, RuntimeError, AttributeError) as error:
        return f"the CUDA extension does not load: {error}; install again to build it for torch {torch.__version__}"
    global _kernel
    _kernel = getattr(overload, "_op", overload)  # what the overload calls, without a Python function between
    return None


def decode(args: Any) -> tuple[Tensor, Tensor]:
    """`cross_attention`'s forward pass for calls that `why_not` has no objection to: out [B, Hq, Lq, D], in memory
    [B, Lq, Hq, D], and log-sum-exp [B, Hq, Lq]."""
    if _kernel is None:
        raise RuntimeError(_unusable)
    out, lse = _kernel(args.query, args.key, args.value, args.start, args.end, args.key_valid, args.gate, args.scale)
    return out, lse


def why_not(args: Any = None) -> str | None:
    """Returns why a call with `cross_attention`'s record can't run on the CUDA kernels, or None; without one, why no
    call can."""
    if args is None:
        return _unusable or (None if torch.cuda.is_available() else "there is no NVIDIA GPU")
    # The device first: on other tensors this is all that a call pays for.
    if not args.query.is_cuda:
        return f"the tensors are on {args.query.device}"
    return _unusable or _why_not_call(args)


def _why_not_call(args: Any) -> str | None:
    query, key, value = args.query, args.key, args.value
    batch, heads, q_len, dim = query.shape
    if q_len > _QUERIES or q_len == 0:
        return f"the kernels are for 1 to {_QUERIES} queries, this call has {q_len}"
    if query.dtype not in _DTYPES:
        return f"{query.dtype} is not computed, only bfloat16 and float16"
    for name, x in (("a dense mask", args.dense), ("a bias", args.bias), ("dropout", args.seed)):
        if x is not None:
            return f"{name} is not computed"
    if dim not in _DIMS or value.shape[3] != dim:
        return f"head dims may be {', '.join(map(str, _DIMS))}, the same of key and value; got {dim}, {value.shape[3]}"
    rows = heads // key.shape[1] * q_len
    if rows > _ROWS:
        return f"one key head may have {_ROWS} queries times query heads, this call has {rows}"
    if key.shape[2] > _KEYS or batch * heads * q_len > _OUTPUT_ROWS:
        return "the shape is too large"
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not _has_aligned_rows(x):
            return f"{name}'s rows must be contiguous and start at multiples of 16 bytes"
    return _why_not_device(query.device)


def _has_aligned_rows(x: Tensor) -> bool:
    b, h, i, channel = x.stride()
    if channel != 1 or x.data_ptr() % 16:
        return False
    if not (b | h | i) & 7:
        return True
    # The stride of a dim of size 1 means nothing.
    return all(size == 1 or stride % 8 == 0 for size, stride in zip(x.shape[:3], (b, h, i), strict=True))


@cache
def _why_not_device(device: torch.device) -> str | None:
    if torch.cuda.get_device_capability(device) < _CAPABILITY:
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    return None


_kernel: Callable[..., Any] | None = None
_unusable: str | None = _load()
