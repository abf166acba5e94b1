"""What backends compute, the rows' losses; from them to one number, and what flows back from it to each row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

REFERENCE, SUM, POSITIVES, CLASSES = range(4)
"""Rows of a state ``[4, N]``, which says of each row's softmax: a pair's probability is ``2 ** (logit * log2(e) -
reference) / sum``, the reference close to the largest logit; how many positives the row has, and how many classes."""


class Arguments(NamedTuple):
    """Of the op, in the order of its boundary; what they mean stands at `info_nce`."""

    image: Tensor  # [N, d] or [N, Q, d]
    text: Tensor  # [M, d]
    logit_scale: Tensor
    image_ids: Tensor | None  # [N]
    text_ids: Tensor | None  # [M]
    hard_texts: Tensor | None  # [K, d]
    ignore: bool
    label_smoothing: float

    @property
    def all_positive(self) -> bool:
        """Whether every row has a positive whatever the ids are; else the states tell."""
        return self.image_ids is None or self.ignore


class Upstream(NamedTuple):
    """What a backend's backward pass is given beside them."""

    image_state: Tensor  # [4, N]
    text_state: Tensor  # [4, M]
    grad_image_loss: Tensor | None  # [N]
    grad_text_loss: Tensor | None  # [M]
    needs: list[bool]  # image, text, logit_scale, hard_texts


Outputs = tuple[Tensor, ...]
Forward = Callable[[Arguments, bool], Outputs]
"""Arguments, and whether ranks are wanted -> losses [N], [M], states [4, N], [4, M], ranks [N], [M]."""
Backward = Callable[[Arguments, Upstream], Outputs]
"""-> gradients of image, text, logit_scale and hard_texts, empty where not needed."""


def reduced(
    image_loss: Tensor,
    text_loss: Tensor,
    image_state: Tensor,
    text_state: Tensor,
    image_weight: float,
    reduction: str,
    all_positive: bool,
) -> Tensor:
    """A tensor without a dim; 0 for reduction "none". `all_positive`: no row is without a positive; else the states
    tell."""
    if reduction == "none":
        return image_loss.new_zeros(())
    of_images = image_loss.sum() * _weight(image_weight, image_loss.numel(), image_state, reduction, all_positive)
    of_texts = text_loss.sum() * _weight(1.0 - image_weight, text_loss.numel(), text_state, reduction, all_positive)
    return of_images + of_texts


def upstream(
    grad_loss: Tensor | None,
    grad_rows: Tensor | None,
    state: Tensor,
    weight: float,
    reduction: str,
    all_positive: bool,
) -> Tensor | None:
    """The gradient of each row's loss in one direction, [rows]: through the reduced loss, and `grad_rows`."""
    if grad_loss is None or reduction == "none":
        return grad_rows
    rows = state.shape[1]
    each = (grad_loss * _weight(weight, rows, state, reduction, all_positive)).expand(rows)
    return each if grad_rows is None else each + grad_rows


def _weight(weight: float, rows: int, state: Tensor, reduction: str, all_positive: bool) -> Tensor | float:
    """What each row's loss is multiplied by. For "mean" only rows that have a positive count."""
    if reduction == "sum":
        return weight
    if all_positive:  # a number: operators on tensors would cost more time than a small call's kernels
        return weight / rows
    return weight / (state[POSITIVES] > 0).sum().clamp(min=1)


def with_reduction(rows: Forward) -> Callable[..., Outputs]:
    """A backend's forward pass over rows as the op boundary wants it: the reduced loss in front."""

    def forward(*inputs: Any) -> Outputs:
        *given, image_weight, reduction, stats = inputs
        arguments = Arguments(*given)
        image_loss, text_loss, image_state, text_state, *ranks = rows(arguments, stats)
        loss = reduced(image_loss, text_loss, image_state, text_state, image_weight, reduction, arguments.all_positive)
        return loss, image_loss, text_loss, image_state, text_state, *ranks

    return forward


def with_upstream(rows: Backward) -> Callable[..., Outputs]:
    """A backend's backward pass from rows' gradients as the op boundary wants it: from the reduced loss's too."""

    def backward(*inputs: Any) -> Outputs:
        *tensors, image_state, text_state, grad_loss, grad_image_loss, grad_text_loss = inputs[:11]
        ignore, label_smoothing, image_weight, reduction, needs = inputs[11:]
        given = Arguments._make([*tensors, ignore, label_smoothing])
        of_images = upstream(grad_loss, grad_image_loss, image_state, image_weight, reduction, given.all_positive)
        of_texts = upstream(grad_loss, grad_text_loss, text_state, 1.0 - image_weight, reduction, given.all_positive)
        return rows(given, Upstream(image_state, text_state, of_images, of_texts, needs))

    return backward
