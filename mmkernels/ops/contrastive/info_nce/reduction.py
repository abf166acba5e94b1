"""From the rows' losses, which backends compute, to one number, and what flows back from it to each row.

The ``cpu`` kernels do the same inside (csrc/contrastive/info_nce.cpp): on small batches these operators would take more
time than the kernels themselves, 18 us beside 15 for a loss of 8 pairs and its call.
"""

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
    hard_text_ids: Tensor | None  # int64 [K]
    ignore: bool  # same_id == "ignore"
    label_smoothing: float
    image_weight: float
    reduction: str
    stats: bool  # whether ranks are wanted


class Results(NamedTuple):
    """What the op returns: the reduced loss, and the rows of both directions."""

    loss: Differentiable  # []
    image_loss: Differentiable  # [N]
    text_loss: Differentiable  # [M]
    image_state: Tensor  # [4, N], see REFERENCE
    text_state: Tensor  # [4, M]
    image_rank: Tensor  # int64 [N], or [0] without stats
    text_rank: Tensor  # int64 [M], or [0]


Rows = Callable[[Any], tuple[Tensor, ...]]
"""A backend without the reduction. Its forward pass takes `Arguments` and returns `Results` but for the loss. Its
backward pass takes the backward record, of which it reads the rows' gradients, not ``grad_loss``."""


def reduced(args: Any, image_loss: Tensor, text_loss: Tensor, image_state: Tensor, text_state: Tensor) -> Tensor:
    """Returns the reduced loss, a tensor without a dim; 0 for reduction "none".

    Args:
        args: the op's record or that of its backward pass.
        image_state, text_state: empty ones: every row has a positive.
    """
    if args.reduction == "none":
        return image_loss.new_zeros(())
    of_images = image_loss.sum() * _weight(args, args.image_weight, len(image_loss), image_state)
    return of_images + text_loss.sum() * _weight(args, 1.0 - args.image_weight, len(text_loss), text_state)


def _weight(args: Any, weight: float, rows: int, state: Tensor) -> Tensor | float:
    """Returns what each row's loss is multiplied by. For "mean" only rows that have a positive count."""
    if args.reduction == "sum":
        return weight
    all_positive = args.image_ids is None or args.ignore or state.numel() == 0
    # A number where it can be: operators on tensors would cost more time than a small call's kernels.
    if all_positive:
        return weight / rows
    # As integers the counts would give a quotient of PyTorch's default dtype.
    return weight / (state[POSITIVES] > 0).sum().clamp(min=1).to(state.dtype)


def _flow(args: Any, rows: Tensor | None, weight: float, state: Tensor) -> Tensor | None:
    """Returns the gradient of each row's loss in one direction, [rows]: through the reduced loss, and `rows`."""
    if args.grad_loss is None or args.reduction == "none":
        return rows
    count = state.shape[1]
    each = (args.grad_loss * _weight(args, weight, count, state)).expand(count)
    return each if rows is None else each + rows


def with_reduction(rows: Rows) -> Rows:
    """Returns a backend's forward pass with the reduced loss in front."""

    def forward(args: Arguments) -> tuple[Tensor, ...]:
        image_loss, text_loss, image_state, text_state, *ranks = rows(args)
        loss = reduced(args, image_loss, text_loss, image_state, text_state)
        return (loss, image_loss, text_loss, image_state, text_state, *ranks)

    return forward


def with_upstream(rows: Rows) -> Rows:
    """Returns a backend's backward pass from the gradient of the reduced loss too."""

    def backward(args: Any) -> tuple[Tensor, ...]:
        of_images = _flow(args, args.grad_image_loss, args.image_weight, args.image_state)
        of_texts = _flow(args, args.grad_text_loss, 1.0 - args.image_weight, args.text_state)
        return rows(args._replace(grad_loss=None, grad_image_loss=of_images, grad_text_loss=of_texts))

    return backward
