"""ViLBERT's heads for downstream tasks, and its losses of pre-training."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkernels.models.blocks.two_streams import classifier
from mmkernels.models.vilbert_config import ViLBERTConfig
from mmkernels.objectives.checks import check_integers
from mmkernels.ops.common.dtypes import wide_dtype
from mmkernels.runtime.checks import check_floating, check_range, check_tensor

HIDDEN = -10_000.0
"""Added to the score of a region that is padding, as in the authors' code."""


class ViLBERTTasks(NamedTuple):
    """What the heads of downstream tasks say; which of them is of use depends on the task.

    Attributes:
        answers, gqa_answers: logits of the answers of VQA ``[B, num_answers]`` and GQA ``[B, num_gqa_answers]``.
        pairs: logits ``[B / 2, 2]`` of a statement about two images, which are rows 2 i and 2 i + 1 (NLVR2); None: it
            was not asked for.
        score: ``[B]``: how well text and image fit each other (retrieval; of several answers, VCR).
        entailment: logits ``[B, 3]`` of whether an image entails a text.
        regions: ``[B, R]``: how well the text fits each region (referring expressions).
        words: ``[B, L]``, likewise of the tokens.
    """

    answers: Tensor
    gqa_answers: Tensor
    pairs: Tensor | None
    score: Tensor
    entailment: Tensor
    regions: Tensor
    words: Tensor


class TaskHeads(nn.Module):
    """The heads of the model that was trained on twelve tasks.

    Source: Lu et al., "12-in-1: Multi-Task Vision and Language Representation Learning", 2020, section 3.
    """

    def __init__(self, config: ViLBERTConfig) -> None:
        super().__init__()
        c, width = config, config.shared_width
        self.answers = classifier(width, 2 * width, c.num_answers)
        self.gqa_answers = classifier(width, 2 * width, c.num_gqa_answers)
        self.pairs = classifier(2 * width, 2 * width, 2)
        self.score = nn.Linear(width, 1)
        self.entailment = nn.Linear(width, 3)
        self.regions = nn.Linear(c.vision_width, 1)
        self.words = nn.Linear(c.text_width, 1)
        self.dropout = nn.Dropout(c.fusion_dropout)

    def forward(
        self, fused: Tensor, text: Tensor, vision: Tensor, seen: Tensor | None, *, paired: bool
    ) -> ViLBERTTasks:
        """Returns what the heads say.

        Args:
            fused: what stands for text and image, ``[B, shared_width]``.
            text, vision: features ``[B, L, text_width]`` and ``[B, R, vision_width]``.
            seen: bool ``[B or 1, R]``, False: padding; None: there is none.
            paired: whether rows 2 i and 2 i + 1 are of one statement about two images.
        """
        fused = self.dropout(fused)
        regions = self.regions(self.dropout(vision))[..., 0]
        return ViLBERTTasks(
            self.answers(fused),
            self.gqa_answers(fused),
            self.pairs(fused.view(-1, 2 * fused.shape[1])) if paired else None,
            self.score(fused)[:, 0],
            self.entailment(fused),
            regions if seen is None else regions + (~seen).to(regions.dtype) * HIDDEN,
            self.words(self.dropout(text))[..., 0],
        )


class ViLBERTLosses(NamedTuple):
    """The losses of the labels that were given, scalars; None: there were no such labels.

    Attributes:
        words: of masked words.
        matching: of whether text and image belong together.
        regions: of what regions show.
    """

    words: Tensor | None
    matching: Tensor | None
    regions: Tensor | None

    @property
    def total(self) -> Tensor:
        """Their sum, the loss of Lu et al., "ViLBERT", 2019, section 2.2."""
        first, *others = [loss for loss in self if loss is not None]
        return sum(others, first)


def check_labels(
    matching: Tensor | None,
    label: Tensor | None,
    target: Tensor | None,
    batch: int,
    shape: tuple[int, int, int],
    kind: str,
) -> None:
    """Raises unless labels fit the inputs.

    Args:
        matching: whether text and image belong together, of `batch` rows.
        label, target: of what regions show, see `region_loss`.
        shape: of `target`, ``(B, R, target_width)``; B: of images, which may be 1 for many texts.
        kind: what is predicted of a region.
    """
    if matching is not None:
        check_integers("matched_label", matching)
        _check_shape("matched_label", matching, (batch,))
        check_range("matched_label other than -100", matching.masked_fill(matching == -100, 0), 0, 1)
    if (label is None) != (target is None):
        got = "region_target" if label is None else "region_label"
        raise ValueError(f"region_label and region_target must be given together, got {got} alone")
    if label is None or target is None:
        return
    if kind == "contrast":
        must = 'None where region_target of the configuration is "contrast"'
        raise ValueError(f"region_label must be {must}, got a tensor")
    check_tensor("region_label", label)
    check_floating("region_target", target)
    _check_shape("region_label", label, shape[:2])
    _check_shape("region_target", target, shape)


def _check_shape(name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name} must be {list(shape)}, got shape {tuple(x.shape)}")


def matching_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the cross-entropy of two-class logits ``[B, 2]`` for labels ``[B]``; -100: ignored."""
    return F.cross_entropy(logits.to(wide_dtype(logits)), labels.long())


def region_loss(predicted: Tensor, label: Tensor, target: Tensor, kind: str) -> Tensor:
    """Returns the loss of what is predicted of regions, a mean over those that have label 1; 0 if none has.

    Args:
        predicted: ``[B, R, target_width]``.
        label: bool or integers ``[B or 1, R]``.
        target: floating ``[B or 1, R, target_width]``.
        kind: "classes": the KL divergence of the prediction's softmax from `target`; "features": the squared distance.

    Source: Lu et al., "ViLBERT", 2019, section 2.2; the squared distance as in the authors' code.
    """
    wide = wide_dtype(predicted)
    predicted, target = predicted.to(wide), target.to(wide).expand_as(predicted)
    if kind == "classes":
        losses = F.kl_div(predicted.log_softmax(-1), target, reduction="none").sum(-1)
    else:
        losses = F.mse_loss(predicted, target, reduction="none").mean(-1)
    chosen = (label == 1).expand_as(losses)
    return torch.where(chosen, losses, 0.0).sum() / chosen.sum().clamp(min=1)
