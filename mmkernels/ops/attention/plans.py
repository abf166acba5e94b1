"""What the plans of the attention ops share: inputs of variants and of tuning, the limits on head dims and spills."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor

from mmkernels.masks import SpanMask
from mmkernels.ops.attention.cases import attention_inputs
from mmkernels.ops.common.cases import normal
from mmkernels.plan import TARGETS, Config, Limit, Variant
from mmkernels.spec import Inputs

LENGTH = 2048
FLOAT32 = (32, 32, 16)
NO_SPILLS = Limit(variants=("* D64 *", "* D128 *"), targets=("sm_90",))
"""The tiles are chosen for Hopper at these head dims. Elsewhere some kernels spill."""

MOST_CHANNELS = 256
"""Of a head, but for few rows over a latent cache."""

_BATCH, _HEADS, _DECODE_KEY_HEADS = 2, 8, 2
_LATENT_CHANNELS, _LATENT_ROWS = 576, 128


def why_not(inputs: Any) -> str | None:
    """Returns why the Triton kernels can't run a call, or None.

    Args:
        inputs: an attention op's record.
    """
    widest = max(x.shape[3] for x in (inputs.query, getattr(inputs, "value", inputs.query)))
    return too_wide(widest)


def why_not_latent(inputs: Any) -> str | None:
    """As `why_not`, but few rows of a key head may have the head dims of a latent cache, without gradients."""
    query, key = inputs.query, inputs.key
    batch, heads, q_len, dim = query.shape
    rows = q_len * (heads // max(1, key.shape[1])) * (batch if key.shape[0] == 1 else 1)
    if hasattr(inputs, "grad_out") or rows > _LATENT_ROWS:
        return why_not(inputs)
    return too_wide(max(dim, inputs.value.shape[3]), _LATENT_CHANNELS)


def too_wide(dim: int, most: int = MOST_CHANNELS) -> str | None:
    """Returns why a head dim is not computed, or None."""
    return None if dim <= most else f"head dims above {most} do not fit into a multiprocessor, got {dim}"


def scores(mask: str, dim: int, dtype: torch.dtype = torch.bfloat16, *, decode: bool = False) -> Inputs:
    """Returns uninitialised query, key and mask.

    Args:
        mask: "none"; "spans"; "dense"; "bias": shared by the batch; "everything": valid keys and a whole bias.
        decode: one query, and fewer key heads.
    """
    q_len = 1 if decode else LENGTH
    inputs: Inputs = {
        "query": torch.empty(_BATCH, _HEADS, q_len, dim, dtype=dtype),
        "key": torch.empty(_BATCH, _DECODE_KEY_HEADS if decode else _HEADS, LENGTH, dim, dtype=dtype),
        "mask": _mask(mask, q_len),
    }
    if mask in ("bias", "everything"):
        inputs["bias"] = torch.empty(1 if mask == "bias" else _BATCH, _HEADS, q_len, LENGTH, dtype=dtype)
    return inputs


def attention(mask: str, dim: int, dtype: torch.dtype = torch.bfloat16, *, decode: bool = False) -> Inputs:
    """Returns uninitialised arguments of `cross_attention`; "everything" has a gate and dropout too."""
    inputs = scores(mask, dim, dtype, decode=decode)
    inputs["value"] = inputs["key"]
    if mask == "everything":
        inputs |= {"gate": torch.zeros(_HEADS, dtype=dtype), "dropout_p": 0.1}
    return inputs


def latent(mask: str, dtype: torch.dtype = torch.bfloat16, *, shared: bool = True) -> Inputs:
    """Returns uninitialised arguments of a decode step of `cross_attention` over a latent cache.

    Args:
        shared: value is a view of key.
    """
    key = torch.empty(_BATCH, 1, LENGTH, 576, dtype=dtype)
    value = key[..., :512] if shared else torch.empty(_BATCH, 1, LENGTH, 512, dtype=dtype)
    query = torch.empty(_BATCH, 16, 1, 576, dtype=dtype)
    return {"query": query, "key": key, "value": value, "mask": _mask(mask, 1), "scale": 0.1}


def _mask(kind: str, q_len: int) -> SpanMask | Tensor | None:
    if kind == "spans":
        return SpanMask.causal(q_len, LENGTH)
    if kind == "dense":
        return torch.ones(_BATCH, 1, q_len, LENGTH, dtype=torch.bool)
    return SpanMask.from_key_mask(torch.ones(_BATCH, LENGTH, dtype=torch.bool)) if kind == "everything" else None


def least_shared(config: Config, dim: int, size: int) -> int:
    """Returns the bytes of shared memory of a pipeline over tiles of one operand: the least that a kernel takes."""
    return (config.stages - 1) * min(config.block_q, config.block_k) * dim * size


def score_variants(what: str) -> tuple[Variant, ...]:
    """Returns what is compiled of an op that computes scores alone.

    Args:
        what: the last word of the variants' names.
    """
    targets = {
        ("spans", 64): TARGETS,
        ("none", 128): ("sm_90",),
        ("spans", 128): ("sm_89",),
        ("spans", 256): ("sm_89",),
    }
    return tuple(
        Variant(f"bfloat16 D{dim} {mask} {what}", partial(scores, mask, dim), (), where)
        for (mask, dim), where in targets.items()
    )


def long_scores(g: Generator, dim: int) -> Inputs:
    """Returns what a kernel on scores alone is timed on."""
    inputs = attention_inputs(g, 1, 16, 2048, 4096, dim)
    return {name: inputs[name] for name in ("query", "key")}


def few_scores(g: Generator, dim: int) -> Inputs:
    """Returns the heaviest call of a kernel on scores alone: with a dense mask and a bias."""
    inputs = attention_inputs(g, 2, 4, 256, 512, dim)
    mask = torch.rand(2, 4, 256, 512, generator=g, device=g.device) < 0.5
    return {name: inputs[name] for name in ("query", "key")} | {"mask": mask, "bias": normal(g, 1, 4, 256, 512)}
