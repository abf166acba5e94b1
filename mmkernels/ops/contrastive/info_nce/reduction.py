"""What backends compute, the rows' losses; from them to one number, and what flows back from it to each row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from mmkernels.runtime.arguments import Differentiable

REFERENCE, SUM, POSITIVES, CLASSES = range(4)
"""Rows of a state ``[4, N]``, which says of each row's softmax: a pair's probability is ``2 ** (logit * log2(e) -
reference) / sum``, the reference close to the largest logit; how many positives the row has, and how many classes."""


class Arguments(NamedTuple):
    """The record of `info_nce`."""

    image: Differentiable  # [N, d] or [N, Q, d]
    text: Differentiable  # [M, d]
    logit_scale: Differentiable  # one element
    image_ids: Tensor | None  # int64 [N]
    text_ids: Tensor | None  # int64 [M]
    hard_texts: Differentiable | None  # [K, d]
    ignore: bool  # same_id == "ignore"
    label_smoothing: float
    image_weight: float
    reduction: str
    stats: bool  # whether ranks are wanted


class Results(NamedTuple):
    """What the op returns: the reduced loss, and what its backends compute, the rows of both directions."""

    loss: Differentiable  # []
    image_loss: Differentiable  # [N]
    text_loss: Differentiable  # [M]
    image_state: Tensor  # [4, N], see REFERENCE
    text_state: Tensor  # [4, M]
    image_rank: Tensor  # int64 [N], or [0] without stats
    text_rank: Tensor  # int64 [M], or [0]


Rows = Callable[[Any], tuple[Tensor, ...]]
"""A backend. Its forward pass takes `Arguments` and returns `Results` but for the loss. Its backward pass takes the
backward record, of which it reads the rows' gradients, not ``grad_loss``."""


def reduced(
    image_loss: Tensor,
    text_loss: Tensor,
    image_state: Tensor,
    text_state: Tensor,
    image_weight: float,
    reduction: str,
) -> Tensor:
    """A tensor without a dim; 0 for reduction "none". The states tell which rows have a positive; empty ones: all."""
    if reduction == "none":
        return image_loss.new_zeros(())
    sides = ((image_loss, image_state, image_weight), (text_loss, text_state, 1.0 - image_weight))
    first, second = (weight * loss.sum() / _count(loss, state, reduction) for loss, state, weight in sides)
    return first + second


def upstream(
    grad_loss: Tensor | None,
    grad_rows: Tensor | None,
    state: Tensor,
    weight: float,
    reduction: str,
) -> Tensor | None:
    """What flows back to each row of one direction, [rows]: through the loss of all, and through its own."""
    if grad_loss is None or reduction == "none":
        return grad_rows
    each = (weight * grad_loss / _count(state[REFERENCE], state, reduction)).expand(state.shape[1])
    return each if grad_rows is None else each + grad_rows


def _count(loss: Tensor, state: Tensor, reduction: str) -> Tensor | int:
    """What a sum of losses is divided by."""
    if reduction == "sum":
        return 1
    return (state[POSITIVES] > 0).sum().clamp(min=1) if state.numel() else loss.numel()


def with_reduction(rows: Rows) -> Rows:
    """Returns a backend's forward pass with the reduced loss in front."""

    def forward(args: Arguments) -> tuple[Tensor, ...]:
        outputs = rows(args)
        image_loss, text_loss, image_state, text_state, *_ = outputs
        loss = reduced(image_loss, text_loss, image_state, text_state, args.image_weight, args.reduction)
        return (loss, *outputs)

    return forward


def with_upstream(rows: Rows) -> Rows:
    """Returns a backend's backward pass from the gradient of the reduced loss too."""

    def backward(args: Any) -> tuple[Tensor, ...]:
        of_loss, weight, reduction = args.grad_loss, args.image_weight, args.reduction
        of_images = upstream(of_loss, args.grad_image_loss, args.image_state, weight, reduction)
        of_texts = upstream(of_loss, args.grad_text_loss, args.text_state, 1.0 - weight, reduction)
        return rows(args._replace(grad_loss=None, grad_image_loss=of_images, grad_text_loss=of_texts))

    return backward
