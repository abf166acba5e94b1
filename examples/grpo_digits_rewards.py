"""What an answer of `grpo_digits.py` earns: the whole design of the reward.

A question asks which digit is at a place, or where a digit is. A program can check the answer, so no model judges
it. Its reward is a weighted sum of terms, each from 0 to 1:

===========  ========================================================== ================================================
term         1 for                                                      without it, nothing stops
===========  ========================================================== ================================================
format       one JSON value of the schema, and nothing beside it        answers that a program can't read
correctness  the right digit; what is not in the scene is refused       a digit at a place where there is none
grounding    a box that is the digit's: intersection over union (IoU)   a right digit with a box that lies elsewhere
===========  ========================================================== ================================================

- Each term looks at one thing, so that leaving one out shows what it did: `read` understands prose too, so correctness
  and grounding don't ask for JSON; grounding does not ask for the right digit.
- Nothing is earned twice, and no term can be had for free: a refusal has no box, so it earns no grounding; a box where
  nothing is earns none either, whatever it lies on.
- A text that is cut off or goes on behind its end says nothing: it earns 0, as in evaluation.
- `coverage`, the share of the digit that the box covers, looks as good as the IoU, but a box of the whole scene covers
  every digit. It is here for one run of the ablation. Boxes grow by some per cent then and no further: one that covers
  its digit earns no more.

Source: the first two terms are DeepSeek-R1's rules (Guo et al., 2025, section 2.2.2: accuracy and format rewards); IoU
as a reward: Liu et al., "Visual-RFT", 2025, section 3.2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from grpo_digits_data import read
from read_digits_answers import numbers, parse
from torch import Tensor

from mmkernels.evaluation import box_iou


class Weights(NamedTuple):
    """What each term of the reward counts."""

    format: float = 0.2
    correctness: float = 0.5
    grounding: float = 0.3
    coverage: float = 0.0


ABLATION = {
    "all terms": Weights(),
    "no format": Weights(format=0.0),
    "no correctness": Weights(correctness=0.0),
    "no grounding": Weights(grounding=0.0),
    "coverage for IoU": Weights(grounding=0.0, coverage=0.3),
}
"""The runs: the reward as it is, without one term each, and with a grounding that can be exploited."""


class Judgement(NamedTuple):
    """What a verifier finds in N answers, each a tensor [N]: the terms, float32, and what the report tells besides.

    Attributes:
        format, correctness, grounding, coverage: the terms, from 0 to 1.
        there: bool, whether what was asked for is in the scene.
        boxed: bool, whether the answer names a box.
        area: float32, of the box over that of the right one; 0 without either.
    """

    format: Tensor
    correctness: Tensor
    grounding: Tensor
    coverage: Tensor
    there: Tensor
    boxed: Tensor
    area: Tensor

    def reward(self, weights: Weights) -> Tensor:
        """Returns what each answer earns, float32 [N]."""
        terms = torch.stack(self[: len(weights)], 1)
        return terms @ torch.tensor(weights)


def judge(texts: list[str], digits: Tensor, boxes: Tensor) -> Judgement:
    """Checks N answers.

    Args:
        texts: the answers.
        digits, boxes: int64 [N] and [N, 4] of what was asked for; a digit of -1: it is not in the scene.
    """
    said = [read(text) for text in texts]
    refused = torch.tensor([x is not None and "absent" in x for x in said])
    there = digits >= 0
    given, true = numbers(said), boxes.float()
    box, digit = given[:, 1:], given[:, 0]
    boxed = digit >= 0
    inside = torch.cat([torch.maximum(box[:, :2], true[:, :2]), torch.minimum(box[:, 2:], true[:, 2:])], 1)
    size = torch.where(there, area(true), 1)  # of a box that is not there: none
    return Judgement(
        format=torch.tensor([float(parse(text) is not None) for text in texts]),
        correctness=torch.where(there, digit == digits, refused).float(),
        grounding=there * box_iou(box, true),
        coverage=there * area(inside) / size,
        there=there,
        boxed=boxed,
        area=there * boxed * area(box) / size,
    )


def area(boxes: Tensor) -> Tensor:
    """Returns the areas [N] of boxes [N, 4]; 0 where the second corner lies before the first."""
    sides = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0)
    return sides[:, 0] * sides[:, 1]
