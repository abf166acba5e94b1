"""Asking a model of `read_digits.py` about scenes, and checking what it says against them."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from read_digits_data import (
    ABSENT,
    ANSWER,
    END,
    KINDS,
    PAD,
    SENTENCE,
    SIDE,
    Scenes,
    prompts,
    requests,
    spell,
)
from torch import Tensor
from torch.nn.functional import pad

from mmkernels.evaluation import (
    AnswerSchema,
    Corruption,
    PresenceQuestion,
    Region,
    Robustness,
    box_iou,
    calibration_error,
    claim_scores,
    measure_robustness,
    pope_scores,
    refusal_scores,
    standard_corruptions,
)
from mmkernels.models import BLIP2
from mmkernels.models.blocks.visual import Visual

ASKED_AT_ONCE = 100  # scenes of a batch in evaluation
SEVERITY = 2  # of the report's corruptions, from 1 to 5: a blur of 0.9 pixels, 90 % of each side, JPEG quality 18
SCHEMA = AnswerSchema(
    {
        "oneOf": [
            {
                "type": "object",
                "properties": {
                    "digit": {"type": "integer", "minimum": 0, "maximum": 9},
                    "box": {"type": "array", "items": {"type": "integer"}, "minItems": 4, "maxItems": 4},
                },
                "required": ["digit", "box"],
                "additionalProperties": False,
            },
            {
                "type": "object",
                "properties": {"absent": {"const": True}},
                "required": ["absent"],
                "additionalProperties": False,
            },
        ]
    }
)
CLAIM = re.compile(r"(\d) at \[(\d+),(\d+),(\d+),(\d+)\]")

# What an answer earns: for JSON of the right form; for the right digit, and for its box by its IoU; for a right
# refusal. A wrong digit, a refusal where a digit is, and a digit where none is earn no more than the form.
FORM, READ, BOXED, REFUSED = 0.1, 0.5, 0.4, 0.9


# The verifier.


class Verdicts(NamedTuple):
    """What a verifier finds in N answers: each a tensor [N], `overlap` float32, the others bool.

    Attributes:
        valid: JSON of the right form.
        refused: the refusal.
        read: the right digit.
        overlap: the IoU of its box with the right one; 0 without a box.
        there: what was asked for is in the scene.
    """

    valid: Tensor
    refused: Tensor
    read: Tensor
    overlap: Tensor
    there: Tensor

    def reward(self) -> Tensor:
        """Returns what each answer earns, from 0 to 1, float32 [N]."""
        of_digit = self.read * (READ + BOXED * self.overlap)
        return FORM * self.valid + torch.where(self.there, of_digit, REFUSED * self.refused)


@lru_cache(maxsize=100_000)
def parse(text: str) -> dict[str, Any] | None:
    """Returns what an answer says; None: it is not JSON of the right form."""
    value: dict[str, Any] | None = SCHEMA.parse(text).value
    return value


def verify(texts: list[str], digits: Tensor, boxes: Tensor) -> Verdicts:
    """Checks N answers.

    Args:
        texts: the answers.
        digits, boxes: [N] and [N, 4] of what was asked for; a digit of -1: it is not in the scene.
    """
    found = [parse(text) for text in texts]
    given = numbers(found)
    there = digits >= 0
    return Verdicts(
        torch.tensor([x is not None for x in found]),
        torch.tensor([x is not None and "absent" in x for x in found]),
        there & (given[:, 0] == digits),
        box_iou(given[:, 1:], boxes.float()),
        there,
    )


def numbers(found: list[dict[str, Any] | None]) -> Tensor:
    """Returns the digit and the box that each answer names, float32 [N, 5]; -1 where it names none."""
    rows = [[-1] * 5 if x is None or "absent" in x else [x["digit"], *x["box"]] for x in found]
    return torch.tensor(rows, dtype=torch.float32)


def wanted(scenes: Scenes) -> tuple[Tensor, Tensor]:
    """Returns digits int64 [N * KINDS] and boxes [N * KINDS, 4] of what is asked for, a digit of -1: none is there."""
    rows, region = torch.arange(len(scenes.shown))[:, None], scenes.regions
    digits = torch.where(region >= 0, scenes.shown[rows, region], -1)
    return digits.flatten(), scenes.boxes[rows, region].flatten(0, 1)


# Asking.


class Asked(NamedTuple):
    """What a model says of N scenes.

    Attributes:
        answers: tokens int64 [N, KINDS, L], each question asked alone.
        refusal: the probability that it gave to the refusal, float32 [N, KINDS].
        sentences: tokens int64 [N, L].
    """

    answers: Tensor
    refusal: Tensor
    sentences: Tensor


def repeated(images: Visual, times: int) -> Visual:
    """Returns encoded images, each `times` in a row: what several prompts about each one take, encoded once."""
    tokens = images.tokens.unflatten(0, (len(images.lengths), -1)).repeat_interleave(times, 0).flatten(0, 1)
    return images._replace(tokens=tokens, lengths=images.lengths * times, marked=images.marked * times)


def first(images: Visual, count: int) -> Visual:
    """Returns the first of encoded images."""
    tokens = images.tokens[: sum(images.lengths[:count])]
    return images._replace(tokens=tokens, lengths=images.lengths[:count], marked=images.marked[:count])


@torch.no_grad()
def ask(model: BLIP2, scenes: Scenes) -> Asked:
    """Returns the most likely answers and descriptions."""
    parts = [_ask(model, scenes.part(slice(i, i + ASKED_AT_ONCE))) for i in range(0, len(scenes.shown), ASKED_AT_ONCE)]
    return Asked(*(torch.cat(x) for x in zip(*parts)))


def _ask(model: BLIP2, scenes: Scenes) -> Asked:
    count, queries = len(scenes.shown), model.config.num_queries
    images = model.encode(scenes.pixels)
    asked, several = prompts(scenes.questions, queries), repeated(images, len(KINDS))
    scores = model(asked, images=several, last_logits_only=True).logits[:, 0]
    answers = model.generate(asked, images=several, max_new_tokens=ANSWER, eos_token_id=END).tokens
    sentences = model.generate(
        prompts(requests(count), queries), images=images, max_new_tokens=SENTENCE, eos_token_id=END
    ).tokens
    return Asked(
        _padded(answers, ANSWER).view(count, len(KINDS), ANSWER),
        scores.softmax(-1)[:, ABSENT].view(count, len(KINDS)),
        _padded(sentences, SENTENCE),
    )


def _padded(tokens: Tensor, length: int) -> Tensor:
    return pad(tokens, (0, length - tokens.shape[1]), value=PAD)


# Figures.


class Figures(NamedTuple):
    """How well a model reads scenes. All are shares, from 0 to 1.

    Attributes:
        validity: answers that are JSON of the right form.
        digit: of questions what is at a place, where a digit is: those answered with this digit.
        overlap: the mean IoU of boxes over all questions about what is there; 0 without a box.
        precision, recall, f1: of the refusals.
        hallucinated: of questions where an absent digit is: those answered with a place (POPE's false positives).
        supported: of the claims in descriptions: those whose box lies on the digit that they name.
        coverage: of the digits in scenes: those that a supported claim is about.
        calibration: the expected calibration error of the refusals' probabilities.
    """

    validity: float
    digit: float
    overlap: float
    precision: float
    recall: float
    f1: float
    hallucinated: float
    supported: float
    coverage: float
    calibration: float


LABELS = Figures(
    "JSON validity", "digit accuracy", "box IoU", "refusal precision", "refusal recall", "refusal F1",
    "hallucination rate", "claims with evidence", "digits described", "calibration error",
)  # fmt: skip


def figures(scenes: Scenes, asked: Asked) -> Figures:
    """Returns the figures of what a model said of scenes."""
    found = verify(spell(asked.answers.flatten(0, 1)), *wanted(scenes))
    by_kind = Verdicts(*(x.view(-1, len(KINDS)) for x in found))
    refusals = refusal_scores(found.refused, ~found.there)
    presence = [
        PresenceQuestion(n, "digit", there) for n, row in enumerate(by_kind.there.tolist()) for there in row[2:]
    ]
    pope = pope_scores((by_kind.valid & ~by_kind.refused)[:, 2:].flatten(), presence)
    claims = claim_scores([claims_of(text) for text in spell(asked.sentences)], regions_of(scenes))
    return Figures(
        validity=_mean(found.valid),
        digit=_mean(by_kind.read[:, 0]),
        overlap=_mean(found.overlap[found.there]),
        precision=refusals.precision,
        recall=refusals.recall,
        f1=refusals.f1,
        hallucinated=pope.false_positive_rate,
        supported=1 - claims.unsupported_rate,
        coverage=claims.coverage,
        calibration=calibration_error(asked.refusal.flatten(), ~found.there).error,
    )


def _mean(x: Tensor) -> float:
    return x.double().mean().item()


def claims_of(sentence: str) -> list[Region]:
    """Returns what a sentence claims to see, and where."""
    found = [[int(word) for word in match.groups()] for match in CLAIM.finditer(sentence)]
    return [Region(digit, box) for digit, *box in found]


def regions_of(scenes: Scenes) -> list[list[Region]]:
    """Returns the digits of each scene with their boxes."""
    return [
        [Region(digit, box) for digit, box in zip(shown, boxes) if digit >= 0]
        for shown, boxes in zip(scenes.shown.tolist(), scenes.boxes.tolist())
    ]


def robustness(model: BLIP2, scenes: Scenes) -> Robustness:
    """Returns the figures of scenes as they are, and blurred, cropped and with JPEG's noise."""

    def evaluate(pixels: Tensor, corruption: Corruption | None) -> dict[str, float]:
        moved = scenes.boxes if corruption is None else corruption.boxes(scenes.boxes, (SIDE, SIDE))
        worse = scenes._replace(pixels=pixels, boxes=moved)
        return figures(worse, ask(model, worse))._asdict()

    return measure_robustness(evaluate, scenes.pixels, standard_corruptions(severities=[SEVERITY]))
