"""Attention's correctness cases, shared by the attention ops: each takes the arguments that it has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from mmkernels.masks import SpanMask
from mmkernels.ops.common.cases import normal
from mmkernels.spec import Cost, Inputs


def attention_inputs(
    generator: Generator,
    batch: int = 2,
    heads: int = 2,
    q_len: int = 5,
    k_len: int = 7,
    dim: int = 8,
    *,
    key_batch: int | None = None,
    key_heads: int | None = None,
    value_dim: int | None = None,
) -> Inputs:
    """query, key and value."""
    key_batch = batch if key_batch is None else key_batch
    key_heads = heads if key_heads is None else key_heads
    return {
        "query": normal(generator, batch, heads, q_len, dim),
        "key": normal(generator, key_batch, key_heads, k_len, dim),
        "value": normal(generator, key_batch, key_heads, k_len, dim if value_dim is None else value_dim),
    }


def _media(g: Generator) -> Inputs:
    index = torch.tensor([[-1, -1, 0, 0, 1, 2, 2, 2], [0, 0, 0, 1, 1, -1, 2, 1]])
    return attention_inputs(g, 2, 2, 8, 12) | {"mask": SpanMask.media(index, 4)}


def _ragged_media(g: Generator) -> Inputs:
    index = torch.tensor([[-1, 0, 1, 2, 2]])
    mask = SpanMask.media(index, media_offsets=[0, 3, 3, 7])
    return attention_inputs(g, 1, 2, 5, 7) | {"mask": mask}


def _holes(g: Generator) -> Inputs:
    inputs = attention_inputs(g, 3, 2, 6, 9)
    valid = torch.rand(3, 9, generator=g) < 0.6
    valid[2] = False
    return inputs | {"mask": SpanMask.from_key_mask(valid) & SpanMask.causal(6, 9)}


def _dense(g: Generator) -> Inputs:
    inputs = attention_inputs(g, 2, 4, 6, 9, key_heads=2)
    dense = torch.rand(2, 4, 6, 9, generator=g) < 0.4
    dense[0, 1, 2] = False
    return inputs | {"mask": dense}


def _dense_key_mask(g: Generator) -> Inputs:
    return attention_inputs(g, 2, 2, 6, 9) | {"mask": torch.rand(2, 1, 1, 9, generator=g) < 0.6}


def _packed(g: Generator) -> Inputs:
    return attention_inputs(g, 1, 2, 9, 9) | {"mask": SpanMask.packed([3, 0, 6], [3, 0, 6]) & SpanMask.causal(9, 9)}


def _bias(*shape: int) -> Callable[[Generator], Inputs]:
    def make(g: Generator) -> Inputs:
        return attention_inputs(g, 2, 4, 5, 7, key_heads=2) | {"bias": normal(g, *shape)}

    return make


def _hiding_bias(g: Generator) -> Inputs:
    bias = normal(g, 1, 2, 5, 7)
    bias[torch.rand(bias.shape, generator=g) < 0.3] = -torch.inf
    bias[0, 1, 2] = -torch.inf
    return attention_inputs(g, 2, 2, 5, 7) | {"bias": bias, "mask": SpanMask.key_padding([7, 4])}


def _strided(g: Generator) -> Inputs:
    """Views as a fused projection gives them: [B, L, H, D] in memory, one buffer, odd offsets."""
    buffer = normal(g, 2, 7, 3, 2, 9)
    query, key, value = (buffer[:, :, n, :, 1:].transpose(1, 2) for n in range(3))
    return {"query": query[:, :, ::2], "key": key, "value": value}


def _shared_key(g: Generator) -> Inputs:
    inputs = attention_inputs(g, 3, 4, 5, 7, key_batch=1, key_heads=2)
    return inputs | {"mask": SpanMask.key_padding([7, 3, 0]), "bias": normal(g, 3, 1, 5, 7)}


def _many_tiles(g: Generator) -> Inputs:
    """More queries and keys than one tile holds, in every backend."""
    inputs = attention_inputs(g, 1, 2, 150, 1100, 4, key_heads=1)
    return inputs | {"mask": SpanMask.window(400, 100, 150, 1100)}


CASES: dict[str, Callable[[Generator], Inputs]] = {
    "no mask": lambda g: attention_inputs(g),
    "one query, one key": lambda g: attention_inputs(g, 1, 1, 1, 1, 1),
    "odd sizes": lambda g: attention_inputs(g, 1, 3, 17, 33, 5, value_dim=3),
    "value dim above": lambda g: attention_inputs(g, 2, 2, 5, 7, 4, value_dim=16),
    "grouped-query": lambda g: attention_inputs(g, 2, 6, 5, 7, key_heads=2) | {"mask": SpanMask.causal(5, 7)},
    "multi-query": lambda g: attention_inputs(g, 2, 4, 5, 7, key_heads=1),
    "batch-1 keys": lambda g: attention_inputs(g, 3, 2, 5, 7, key_batch=1),
    "batch-1 keys, grouped, masked, biased": _shared_key,
    "no queries": lambda g: attention_inputs(g, q_len=0),
    "no keys": lambda g: attention_inputs(g, k_len=0),
    "no batch": lambda g: attention_inputs(g, batch=0),
    "decode": lambda g: attention_inputs(g, 3, 4, 1, 40, key_heads=2) | {"mask": SpanMask.key_padding([40, 11, 1])},
    "key padding": lambda g: attention_inputs(g, 3) | {"mask": SpanMask.key_padding([7, 3, 0])},
    "left padding": lambda g: attention_inputs(g, 3) | {"mask": SpanMask.left_padding([7, 3, 0], 7)},
    "causal": lambda g: attention_inputs(g, q_len=9, k_len=9) | {"mask": SpanMask.causal(9, 9)},
    "causal, more queries than keys": lambda g: attention_inputs(g, q_len=9, k_len=5) | {"mask": SpanMask.causal(9, 5)},
    "prefix": lambda g: attention_inputs(g, q_len=9, k_len=9) | {"mask": SpanMask.prefix_lm([4, 0], 9, 9)},
    "window": lambda g: attention_inputs(g, q_len=9, k_len=9) | {"mask": SpanMask.window(2, 1, 9, 9)},
    "packed causal": _packed,
    "media": _media,
    "media of several sizes": _ragged_media,
    "holes": _holes,
    "dense": _dense,
    "dense key mask": _dense_key_mask,
    "dense 2-D": lambda g: attention_inputs(g) | {"mask": torch.rand(5, 7, generator=g) < 0.5},
    "bias": _bias(2, 4, 5, 7),
    "bias shared by the batch": _bias(1, 4, 5, 7),
    "bias of keys": _bias(7),
    "bias that hides": _hiding_bias,
    "scale": lambda g: attention_inputs(g) | {"scale": 0.3},
    "negative scale": lambda g: attention_inputs(g) | {"scale": -1.0, "mask": SpanMask.key_padding([6, 2])},
    "strided": _strided,
    "many tiles": _many_tiles,
}


def case_inputs(id: str, names: Sequence[str]) -> Callable[[Generator], Inputs]:
    """A case's inputs, only the arguments in `names`."""

    def make(generator: Generator) -> Inputs:
        return {name: x for name, x in CASES[id](generator).items() if name in names}

    return make


def visible_pairs(inputs: Inputs) -> float:
    """How many (b, h, query, key) pairs the mask shows: the work that is there to do."""
    (batch, heads, q_len, _), k_len = inputs["query"].shape, inputs["key"].shape[2]
    mask: Any = inputs.get("mask")
    if mask is None:
        return float(batch * heads * q_len * k_len)
    dense = mask.to_dense(k_len) if isinstance(mask, SpanMask) else mask
    return float(dense.expand(batch, heads, q_len, k_len).sum())


def attention_cost(inputs: Inputs, matmuls: int) -> Cost:
    """`matmuls` multiplications of 2 D FLOP for each visible pair; every input read and the output written once."""
    query = inputs["query"]
    moved = sum(x.numel() * x.element_size() for x in inputs.values() if isinstance(x, Tensor))
    moved += query.numel() * query.element_size()
    return Cost(flops=2.0 * query.shape[3] * visible_pairs(inputs) * matmuls, bytes=float(moved))
