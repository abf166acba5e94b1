"""The peers of `cross_attention`: SDPA with the same mask, FlexAttention, and a loop over images; of `co_attention`:
the formula as models write it, the same compiled, and SDPA for each direction.

On a GPU also each of SDPA's backends ("sdpa" is the one that PyTorch chooses), and the flash-attn package.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from mmkernels import SpanMask, cross_attention
from mmkernels.bench.peers import Call, CantRunError, Peer, compiled, first_line
from mmkernels.spec import Inputs

_CUDA_ROWS = 8  # queries up to which there are kernels for decoding


def sdpa(inputs: Inputs) -> Call:
    """``F.scaled_dot_product_attention`` with the mask as a dense tensor, built once."""
    query, key, value = _query_key_value(inputs)
    mask: Any = inputs.get("mask")
    if isinstance(mask, SpanMask):
        mask = mask.to_dense(key.shape[2])
    if "bias" in inputs:
        if mask is not None:
            raise CantRunError("takes a mask or a bias, not both")
        mask = inputs["bias"]
    grouped = query.shape[1] != key.shape[1]
    return lambda: F.scaled_dot_product_attention(query, key, value, mask, enable_gqa=grouped)


def sdpa_by(backend: SDPBackend) -> Callable[[Inputs], Call]:
    """SDPA with one backend alone."""

    def prepare(inputs: Inputs) -> Call:
        attend = sdpa(inputs)

        def call() -> Tensor:
            with sdpa_kernel(backend):
                return attend()

        with warnings.catch_warnings(record=True) as raised:  # PyTorch's reasons; the last ones say most
            warnings.simplefilter("always")
            try:
                call()
            except RuntimeError as error:
                reasons = [re.sub(r"\s*\(Triggered internally.*", "", str(w.message), flags=re.DOTALL) for w in raised]
                reasons = [reason for reason in reasons if "not used because" not in reason]
                raise CantRunError("; ".join(dict.fromkeys(reasons)) or first_line(error)) from error
        return call

    return prepare


def flash_attn(inputs: Inputs) -> Call:
    """The flash-attn package, where it is installed: its decode kernel for a few queries, else its general one."""
    query, key, value = _query_key_value(inputs)
    if inputs.get("mask") is not None or "bias" in inputs:
        raise CantRunError("takes neither a mask nor a bias")
    try:
        from flash_attn import flash_attn_func, flash_attn_with_kvcache
    except ImportError as error:
        raise CantRunError(f"is not installed: {first_line(error)}") from error
    if query.dtype not in (torch.bfloat16, torch.float16):
        raise CantRunError("takes 16-bit inputs only")
    decodes = query.shape[2] <= _CUDA_ROWS and not query.requires_grad
    attend = flash_attn_with_kvcache if decodes else flash_attn_func
    return lambda: attend(*(x.transpose(1, 2) for x in (query, key, value))).transpose(1, 2)


def ours_by_triton(inputs: Inputs) -> Call:
    """The Triton kernel, where the op itself runs the CUDA kernel."""
    if inputs["query"].shape[2] > _CUDA_ROWS:
        raise CantRunError("is the kernel that the op runs")
    return partial(cross_attention, **inputs, backend="triton")


def loop_over_images(inputs: Inputs) -> Call:
    """SDPA once for each run of queries that see the same keys, without a mask, and the results concatenated."""
    query, key, value = _query_key_value(inputs)
    mask = inputs.get("mask")
    if not isinstance(mask, SpanMask) or mask.shape[1] == 1 or "bias" in inputs:
        raise CantRunError("only where each query sees one image")
    spans = torch.stack(torch.broadcast_tensors(mask.start, mask.end), -1)  # [B, Lq, 2]
    if mask.key_valid is not None or not bool((spans == spans[:1]).all()):
        raise CantRunError("only where all sequences have their images at the same places")
    runs, lengths = spans[0].unique_consecutive(dim=0, return_counts=True)
    places = [slice(int(end - length), int(end)) for end, length in zip(lengths.cumsum(0), lengths, strict=True)]
    images = [slice(*run) for run in runs.tolist()]

    def call() -> Tensor:
        parts = [
            F.scaled_dot_product_attention(query[:, :, at], key[:, :, image], value[:, :, image])
            for at, image in zip(places, images, strict=True)
        ]
        return torch.cat(parts, 2)

    return call


def flex(inputs: Inputs) -> Call:
    """FlexAttention, compiled, with a block mask built once."""
    query, key, value = _query_key_value(inputs)
    if query.requires_grad and query.device.type == "cpu":
        raise CantRunError("has no backward pass on a CPU")
    options: dict[str, Any] = {"enable_gqa": query.shape[1] != key.shape[1]}
    if "bias" in inputs:
        bias = inputs["bias"].expand(query.shape[0], *inputs["bias"].shape[1:])
        options["score_mod"] = lambda score, b, h, i, j: score + bias[b, h, i, j]
    options["block_mask"] = _block_mask(inputs.get("mask"), query, key)
    return compiled(flex_attention, query, key, value, **options)


def _block_mask(mask: SpanMask | Tensor | None, query: Tensor, key: Tensor) -> Any:
    if mask is None:
        return None
    (batch, _, q_len, _), k_len = query.shape, key.shape[2]
    if isinstance(mask, SpanMask) and mask.key_valid is None:
        start, end = (x.expand(batch, q_len).contiguous() for x in (mask.start, mask.end))

        def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (start[b, i] <= j) & (j < end[b, i])
    else:
        dense = mask.to_dense(k_len) if isinstance(mask, SpanMask) else mask
        if dense.shape[1] != 1:
            raise CantRunError("only where all heads share a mask")
        pairs = dense[:, 0].expand(batch, q_len, k_len).contiguous()

        def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return pairs[b, i, j]

    return create_block_mask(visible, batch, None, q_len, k_len, device=str(query.device))


def _query_key_value(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    return inputs["query"], inputs["key"], inputs["value"]


PEERS = (
    Peer("sdpa", sdpa),
    Peer("flex", flex, slow=True),
    Peer("loop", loop_over_images),
    Peer("cudnn", sdpa_by(SDPBackend.CUDNN_ATTENTION), device="cuda"),
    Peer("flash", sdpa_by(SDPBackend.FLASH_ATTENTION), device="cuda"),
    Peer("efficient", sdpa_by(SDPBackend.EFFICIENT_ATTENTION), device="cuda"),
    Peer("flash-attn", flash_attn, device="cuda"),
    Peer("triton", ours_by_triton, device="cuda"),
)


def co_eager(inputs: Inputs) -> Call:
    """One matrix of scores and two softmaxes, as GroundingDINO's fusion layer computes them."""
    return partial(_co_formula, **_co_arguments(inputs))


def co_compiled(inputs: Inputs) -> Call:
    """The same by ``torch.compile``."""
    return compiled(_co_formula, **_co_arguments(inputs))


def co_sdpa(inputs: Inputs) -> Call:
    """SDPA for each direction."""
    given = _co_arguments(inputs)  # of which a clamp of 50,000 changes nothing
    a, b, value_a, value_b = (given[name] for name in ("a", "b", "value_a", "value_b"))
    to_a, to_b = (None if x is None else ~x[:, None, None] for x in (given["hidden_b"], given["hidden_a"]))

    def call() -> tuple[Tensor, Tensor]:
        of_a = F.scaled_dot_product_attention(a, b, value_b, to_a)
        return of_a, F.scaled_dot_product_attention(b, a, value_a, to_b)

    return call


def _co_arguments(inputs: Inputs) -> dict[str, Any]:
    if inputs.get("mask") is not None or "bias" in inputs or "scale" in inputs:
        raise CantRunError("takes no mask of pairs, bias or scale")
    hidden = {f"hidden_{side}": None if (x := inputs.get(f"valid_{side}")) is None else ~x for side in ("a", "b")}
    sides = {name: inputs[name] for name in ("a", "b", "value_a", "value_b")}
    return sides | hidden | {"clamp": inputs.get("clamp")}


def _co_formula(
    a: Tensor, b: Tensor, value_a: Tensor, value_b: Tensor, hidden_a: Tensor | None, hidden_b: Tensor | None,
    clamp: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    scores = a * a.shape[3] ** -0.5 @ b.mT
    of_b = scores.mT
    if clamp is not None:
        scores = (scores - scores.max()).clamp(-clamp, clamp)
        of_b = (scores.mT - scores.mT.amax(-1, keepdim=True)).clamp(-clamp, clamp)
    if hidden_b is not None:
        scores = scores.masked_fill(hidden_b[:, None, None], -torch.inf)
    if hidden_a is not None:
        of_b = of_b.masked_fill(hidden_a[:, None, None], -torch.inf)
    return scores.softmax(-1) @ value_b, of_b.softmax(-1) @ value_a


CO_PEERS = (Peer("eager", co_eager), Peer("compiled", co_compiled, slow=True), Peer("two sdpa", co_sdpa))
