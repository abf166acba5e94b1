"""LXMERT's losses of pre-training and of answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, cast

import torch.nn.functional as F
from torch import Tensor, nn

from mmkernels.objectives.checks import check_integers
from mmkernels.ops.common.dtypes import wide_dtype
from mmkernels.ops.linear.linear_cross_entropy import linear_cross_entropy
from mmkernels.runtime.checks import check_floating, check_range, check_tensor

RegionLabels = Mapping[str, tuple[Tensor, Tensor]]
"""What is predicted of regions -> targets ``[B, R]`` or ``[B, R, width]``, and weights ``[B, R]``."""


class Labels(NamedTuple):
    """The labels of a batch by what they are for; None: there are none. As `LXMERT.forward` takes them."""

    words: Tensor | None
    matching: Tensor | None
    regions: RegionLabels | None
    answers: Tensor | None


class LXMERTLosses(NamedTuple):
    """The losses of the labels that were given, scalars; None: there were no such labels.

    Attributes:
        words: of masked words.
        matching: of whether text and image belong together.
        regions: of what regions show, by the name of the head: "obj", "attr", "feat".
        answers: of the answers to questions.
    """

    words: Tensor | None
    matching: Tensor | None
    regions: dict[str, Tensor] | None
    answers: Tensor | None

    @property
    def total(self) -> Tensor:
        """Their sum, the loss of the paper's section 3.1."""
        given = [self.words, self.matching, *(self.regions or {}).values(), self.answers]
        first, *others = [loss for loss in given if loss is not None]
        return sum(others, first)


def region_losses(hidden: Tensor, heads: nn.ModuleDict, labels: RegionLabels, weight: float) -> dict[str, Tensor]:
    """Returns the loss of each head that predicts something of regions.

    Classes cost the cross-entropy, features the smooth L1 distance; a head's loss is the mean over all regions of the
    loss times its weight among `labels`, times `weight`; of no regions it is 0.

    Args:
        hidden: ``[B, R, d]``, what the heads get.
        heads: "obj", "attr", "feat", or some of them: the last layers.
        labels: of each head, checked by `check_region_labels`.

    Source: Tan and Bansal, "LXMERT", 2019, section 3.1.2; weights as in the authors' code.
    """
    found = {}
    for name, head in heads.items():
        target, confidence = labels[name]
        losses = (_feature_loss if name == "feat" else _class_loss)(hidden, cast(nn.Linear, head), target)  # [B, R]
        losses = losses * confidence.to(losses.dtype)
        found[name] = (losses.mean() if losses.numel() else losses.sum()) * weight
    return found


def _class_loss(hidden: Tensor, head: nn.Linear, target: Tensor) -> Tensor:
    return linear_cross_entropy(hidden, head.weight, target.long(), linear_bias=head.bias, reduction="none")


def _feature_loss(hidden: Tensor, head: nn.Linear, target: Tensor) -> Tensor:
    predicted = head(hidden)
    wide = wide_dtype(predicted)
    return F.smooth_l1_loss(predicted.to(wide), target.to(wide), reduction="none").mean(-1)


def check_region_labels(labels: RegionLabels, heads: Mapping[str, int], shape: tuple[int, int]) -> None:
    """Raises unless there are targets and weights for each head, and no others.

    Args:
        labels: of regions, as `LXMERT.forward` takes them.
        heads: the number of each head's outputs.
        shape: (B, R).
    """
    if not isinstance(labels, Mapping) or set(labels) != set(heads):
        got = ", ".join(map(str, labels)) if isinstance(labels, Mapping) else type(labels).__name__
        raise ValueError(f"obj_labels must be a dict with the labels of {', '.join(heads)}, got {got}")
    for key, size in heads.items():
        name, pair = f"obj_labels[{key!r}]", labels[key]
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise TypeError(f"{name} must be (targets, weights), got {type(pair).__name__}")
        target, confidence = pair
        if key == "feat":
            check_floating(f"{name}[0]", target)
            _check_shape(f"{name}[0]", target, (*shape, size))
        else:
            check_classes(f"{name}[0]", target, shape, size)
        check_tensor(f"{name}[1]", confidence)
        _check_shape(f"{name}[1]", confidence, shape)


def check_classes(name: str, x: Tensor, shape: tuple[int, ...], classes: int) -> None:
    """Raises unless labels are integers of a shape, below the number of classes or -100: ignored."""
    check_integers(name, x)
    _check_shape(name, x, shape)
    check_range(f"{name} other than -100", x.masked_fill(x == -100, 0), 0, classes - 1)


def _check_shape(name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name} must be {list(shape)}, got shape {tuple(x.shape)}")
