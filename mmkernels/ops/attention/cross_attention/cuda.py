"""cross_attention in CUDA C++: decoding, 1 to 8 queries in a 16-bit dtype (csrc/attention/decode_cuda.cuh).

Untested on a GPU.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, bfloat16, float16

from mmkernels.runtime import cuda

__all__ = ["forward", "why_not"]

# As in csrc/attention/decode_plan.h; a test compares them.
_DIMS = (64, 80, 96, 128)
_QUERIES, _ROWS = 8, 64
_KEYS, _OUTPUT_ROWS = 2**31 - 1 - 4 * 64, (2**31 - 1) // 128
_DTYPES = (bfloat16, float16)

forward = cuda.op("cross_attention_decode_cuda")
"""The op's record -> out [B, Hq, Lq, D], in memory [B, Lq, Hq, D], and log-sum-exp [B, Hq, Lq]."""


def why_not(args: Any = None) -> str | None:
    """Returns why a call can't run on these kernels, or None; without a record, why no call can.

    Args:
        args: the op's record, read by its fields' names.
    """
    if args is None:
        return cuda.why_not()
    query = args.query
    if query.is_cpu:  # the first question: on CPU tensors it is all that a call pays for
        return "the tensors are on cpu"
    if not query.is_cuda:
        return f"the tensors are on {query.device}"
    return cuda.why_not_device(query.device) or _why_not_call(args)


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
    return None


def _has_aligned_rows(x: Tensor) -> bool:
    b, h, i, channel = x.stride()
    if channel != 1 or x.data_ptr() % 16:
        return False
    if not (b | h | i) & 7:
        return True
    # The stride of a dim of size 1 means nothing.
    return all(size == 1 or stride % 8 == 0 for size, stride in zip(x.shape[:3], (b, h, i), strict=True))
