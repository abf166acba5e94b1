"""The definition of co-attention: the naive formula, and its gradients written out."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmkernels.ops.attention.co_attention.record import Arguments, pairs_of
from mmkernels.ops.attention.formula import (
    masked_softmax,
    pair_scores,
    shown_by_bias,
    visible_keys,
    weighted_values,
)
from mmkernels.ops.attention.philox import keep_mask, keep_scale
from mmkernels.ops.common.dtypes import wide_dtype


class _Direction(NamedTuple):
    """One direction's softmax, its rows being the side whose output it gives."""

    weights: Tensor  # [B, H, rows, columns]
    lse: Tensor | None
    visible: Tensor | None  # bool, broadcastable to the weights
    keep: Tensor | None  # of the dropout, 0 or its factor


class _Naive(NamedTuple):
    """The scores before they are raised, [B, H, La, Lb], the floor, and both directions."""

    scores: Tensor
    floor: Tensor | None
    of_a: _Direction
    of_b: _Direction


def reference(args: Arguments, need_lse: bool = True) -> tuple[Tensor, ...]:
    """Returns `Results` by the naive formula, which PyTorch can differentiate."""
    naive = _naive(args, need_lse)
    attended = _attended(naive.of_a, args.value_b), _attended(naive.of_b, args.value_a)
    # The layout of every backend: in memory [B, L, H, Dv].
    outs = [out.transpose(1, 2).contiguous().transpose(1, 2) for out in attended]
    lses = [out.new_empty(0) if x.lse is None else x.lse for out, x in zip(outs, naive[2:], strict=True)]
    floor = args.a.new_full((), -torch.inf, dtype=wide_dtype(args.a)) if naive.floor is None else naive.floor
    return (*outs, *lses, floor)


def reference_backward(args: Any) -> tuple[Tensor, ...]:
    """The gradients, written out: autograd does not record inside an op boundary."""
    scores, floor, of_a, of_b = _naive(args, need_lse=False)
    of_scores = _score_gradient(of_a, args.grad_out_a, args.value_b)
    of_scores = of_scores + _score_gradient(of_b, args.grad_out_b, args.value_a).mT
    if floor is not None:
        of_scores = torch.where(scores >= floor, of_scores, 0.0)
    hides = of_a.visible is not None or of_b.visible is not None
    a, b = (torch.where(x.isfinite(), x, 0.0) if hides else x for x in (args.a, args.b))
    grads = {
        "a": of_scores @ b * args.scale,
        "b": of_scores.mT @ a * args.scale,
        "value_a": _value_gradient(of_b, args.grad_out_b),
        "value_b": _value_gradient(of_a, args.grad_out_a),
        "bias": None if args.bias is None else of_scores.sum_to_size(args.bias.shape),
    }
    return tuple(
        torch.empty_like(getattr(args, name)).copy_(grad)
        if grad is not None and getattr(args, f"need_{name}")
        else args.a.new_empty(0)
        for name, grad in grads.items()
    )


def floor_of(scores: Tensor, clamp: float) -> Tensor:
    """Returns what lower scores are raised to: the largest finite score less `clamp`, -inf where there is none."""
    scores = scores.detach().to(wide_dtype(scores))
    if scores.numel() == 0:
        return scores.new_full((), -torch.inf)
    return torch.where(scores.isfinite(), scores, -torch.inf).amax() - clamp


def _naive(args: Any, need_lse: bool) -> _Naive:
    pairs = pairs_of(args)
    visible = shown_by_bias(visible_keys(pairs), args.bias)
    by_a, by_b = visible, None if visible is None else visible.mT
    if args.valid_b is not None:
        by_a = _both(visible, args.valid_b[:, None, None, :])
    if args.valid_a is not None:
        by_b = _both(by_b, args.valid_a[:, None, None, :])
    # A pair that one direction hides alone is computed for the other one.
    seen = None if by_a is None or by_b is None else by_a | by_b.mT
    if seen is None and (by_a is not None or by_b is not None):
        seen = torch.ones((), dtype=torch.bool, device=args.a.device).expand(1, 1, 1, 1)
    scores, finite = pair_scores(args.a, args.b, seen, args.bias, args.scale)
    raised, floor = scores, None
    if args.clamp:
        with torch.no_grad():
            floor = floor_of(pair_scores(args.a, args.b, None, args.bias, args.scale)[0], args.clamp)
        raised = scores.clamp(min=floor.to(scores.dtype))
        floor = floor.to(scores.dtype).to(floor.dtype)
    keep_a, keep_b = (None, None) if args.seed is None else (_keep(scores, args, 0), _keep(scores, args, 1).mT)
    return _Naive(
        scores,
        floor,
        _Direction(*masked_softmax(raised, by_a, finite, need_lse), by_a, keep_a),
        _Direction(*masked_softmax(raised.mT, by_b, finite, need_lse), by_b, keep_b),
    )


def _both(x: Tensor | None, y: Tensor) -> Tensor:
    return y if x is None else x & y


def _keep(scores: Tensor, args: Any, direction: int) -> Tensor:
    """Returns the factors [B, H, La, Lb] of one direction's dropout."""
    b, h, i = (torch.arange(n, device=scores.device) for n in scores.shape[:3])
    places = b[:, None, None, None], h[:, None, None], i[:, None]
    kept = keep_mask(args.seed[direction], args.dropout_p, *places, range(scores.shape[3]))
    return kept.to(scores.dtype) * keep_scale(args.dropout_p)


def _attended(direction: _Direction, value: Tensor) -> Tensor:
    return weighted_values(_kept(direction), value, direction.visible)


def _kept(direction: _Direction) -> Tensor:
    return direction.weights if direction.keep is None else direction.weights * direction.keep


def _score_gradient(direction: _Direction, grad_out: Tensor, value: Tensor) -> Tensor:
    """Returns what one direction gives to the gradient of the scores, its rows first."""
    visible = direction.visible

    def hide(x: Tensor) -> Tensor:
        return x if visible is None else torch.where(visible, x, 0.0)

    of_weights = hide(grad_out @ value.mT)
    if direction.keep is not None:
        of_weights = of_weights * direction.keep
    delta = (direction.weights * of_weights).sum(-1, keepdim=True)
    return hide(direction.weights * (of_weights - delta))


def _value_gradient(direction: _Direction, grad_out: Tensor) -> Tensor:
    weights, visible = _kept(direction), direction.visible
    return weighted_values(weights.mT, grad_out, None if visible is None else visible.expand_as(weights).mT)
