"""The record of `co_attention`, and what it is made of: pairs of a's and b's positions."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from mmkernels.runtime.arguments import Differentiable


class Arguments(NamedTuple):
    """The record of `co_attention`."""

    a: Differentiable  # [B, H, La, D]
    b: Differentiable  # [B, H, Lb, D]
    value_a: Differentiable  # [B, H, La, Dv_a]
    value_b: Differentiable  # [B, H, Lb, Dv_b]
    start: Tensor | None  # the mask of the pairs, as in MaskTensors: queries are a, keys are b
    end: Tensor | None
    key_valid: Tensor | None
    dense: Tensor | None
    valid_a: Tensor | None  # bool [B or 1, La]: False hides a position of a from b
    valid_b: Tensor | None  # bool [B or 1, Lb]: False hides a position of b from a
    bias: Differentiable | None  # broadcastable to [B, H, La, Lb]
    seed: Tensor | None  # int64 [2], of the dropout over b and over a; None: no dropout
    scale: float
    dropout_p: float
    clamp: float  # how far below the largest score a score may be; 0: any


class Results(NamedTuple):
    """What `co_attention` computes."""

    out_a: Differentiable  # [B, H, La, Dv_b], in memory [B, La, H, Dv_b]
    out_b: Differentiable  # [B, H, Lb, Dv_a], in memory [B, Lb, H, Dv_a]
    lse_a: Tensor  # [B, H, La]
    lse_b: Tensor  # [B, H, Lb]
    floor: Tensor  # no dim: what lower scores are raised to; -inf where there is none, or none is lower


class Pairs(NamedTuple):
    """The scores of a record as the attention ops name them: a's positions are queries, b's are keys."""

    query: Tensor
    key: Tensor
    start: Tensor | None
    end: Tensor | None
    key_valid: Tensor | None
    dense: Tensor | None
    bias: Tensor | None
    scale: float


def pairs_of(args: Any) -> Pairs:
    """Returns the scores of a record, or of that of the backward pass, without what hides one direction alone."""
    return Pairs(args.a, args.b, args.start, args.end, args.key_valid, args.dense, args.bias, args.scale)
