"""What a model says is there and is not: questions about presence, and sentences whose claims cite regions."""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Collection, Hashable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mmkernels.evaluation.binary import BinaryScores, binary_scores
from mmkernels.evaluation.boxes import box_iou
from mmkernels.evaluation.checks import Values, check_lengths, listed, share, whole
from mmkernels.nn.checks import check_choice

STRATEGIES = ("random", "popular", "adversarial")


class PresenceQuestion(NamedTuple):
    """Is there a `label` in the image?

    Attributes:
        image: its place in the list of images.
        label: what is asked for.
        present: the right answer.
    """

    image: int
    label: Hashable
    present: bool


def pope_questions(
    objects: Iterable[Collection[Hashable]],
    strategy: str = "random",
    *,
    per_image: int = 3,
    vocabulary: Iterable[Hashable] | None = None,
    seed: int = 0,
) -> list[PresenceQuestion]:
    """Returns questions about what is and what is not in images, as many of each.

    Which absent labels are asked for decides how hard that is:

    - "random": any of the vocabulary;
    - "popular": those that most images have;
    - "adversarial": for each present label that is asked for, the one that occurs most often beside it; where none is
      left that ever did, any.

    Args:
        objects: for each image the labels of what is in it.
        strategy: "random", "popular" or "adversarial".
        per_image: how many present labels, and as many absent ones, are asked for. An image that has fewer of either
            has fewer questions; one with no object, or with every label, has none.
        vocabulary: labels that may be asked for; None: all that occur in `objects`. What occurs is always asked for.
        seed: of the random choices; one seed gives the same questions again.

    Raises:
        TypeError: a wrong type. ValueError: no image, an unknown strategy, or no question can be asked.

    Source: Li et al., "Evaluating Object Hallucination in Large Vision-Language Models" (POPE), 2023, section 5.1; the
    adversarial choice by each asked label as in the authors' code.

    Example:
        >>> from mmkernels.evaluation import pope_questions
        >>> scenes = [{"cup", "table"}, {"table", "chair"}, {"table", "chair"}, {"dog"}]
        >>> for question in pope_questions(scenes, "adversarial", per_image=1)[:2]:
        ...     print(question)
        PresenceQuestion(image=0, label='table', present=True)
        PresenceQuestion(image=0, label='chair', present=False)
    """
    check_choice("strategy", strategy, STRATEGIES)
    per_image = whole("per_image", per_image, 1)
    draw = random.Random(whole("seed", seed, 0))
    images = [_labels(n, found) for n, found in enumerate(listed("objects", objects, "collections of labels"))]
    known = dict.fromkeys(() if vocabulary is None else listed("vocabulary", vocabulary, "labels"))
    known |= dict.fromkeys(label for labels in images for label in labels)
    choose = _Negatives(images, list(known))
    questions = []
    for n, labels in enumerate(images):
        absent = [label for label in known if label not in labels]
        draw.shuffle(absent)
        asked = draw.sample(list(labels), min(per_image, len(labels), len(absent)))
        for label, other in zip(asked, choose(strategy, asked, absent)):
            questions += [PresenceQuestion(n, label, True), PresenceQuestion(n, other, False)]
    if not questions:
        raise ValueError("objects must be such that an image has a label and lacks another, got none")
    return questions


def _labels(image: int, found: Collection[Hashable]) -> dict[Hashable, None]:
    """Returns the labels of an image, each once, in an order that does not depend on hashes."""
    if isinstance(found, str) or not isinstance(found, Collection):
        raise TypeError(f"objects[{image}] must be a collection of labels, got {type(found).__name__}")
    ordered = sorted(found, key=repr) if isinstance(found, set | frozenset) else found
    return dict.fromkeys(ordered)


class _Negatives:
    """Chooses absent labels, by how often labels occur, alone and beside each other."""

    def __init__(self, images: list[dict[Hashable, None]], known: list[Hashable]) -> None:
        self.count = Counter(label for labels in images for label in labels)
        self.beside: dict[Hashable, Counter[Hashable]] = defaultdict(Counter)
        for labels in images:
            for label in labels:
                self.beside[label].update(other for other in labels if other != label)

    def __call__(self, strategy: str, asked: list[Hashable], absent: list[Hashable]) -> list[Hashable]:
        """Returns one absent label for each asked one; `absent` is in random order, which decides between equals."""
        if strategy == "random":
            return absent[: len(asked)]
        if strategy == "popular":
            return sorted(absent, key=lambda label: -self.count[label])[: len(asked)]
        chosen: list[Hashable] = []
        for label in asked:
            left = [other for other in absent if other not in chosen]
            chosen.append(max(left, key=lambda other: self.beside[label][other]))
        return chosen


def pope_scores(answers: Values, questions: Sequence[PresenceQuestion]) -> BinaryScores:
    """Returns the scores of answers to questions about presence.

    `false_positive_rate` is the hallucination rate: of the questions about absent things, the share that was answered
    yes. `positive_rate` is POPE's yes-ratio, which is 0.5 for a model without a bias.

    Args:
        answers: bools ``[N]``, True: yes. Of free text see `says_yes`.
        questions: as of `pope_questions`.

    Raises:
        As `binary_scores`.

    Source: Li et al. (POPE), 2023, section 5.1; computed by scikit-learn.

    Example:
        >>> from mmkernels.evaluation import pope_questions, pope_scores
        >>> questions = pope_questions([{"cup", "table"}, {"table", "chair"}], per_image=1)
        >>> scores = pope_scores([True] * len(questions), questions)
        >>> scores.accuracy, scores.positive_rate, scores.false_positive_rate
        (0.5, 1.0, 1.0)
    """
    asked = listed("questions", questions, "PresenceQuestions")
    for place, question in enumerate(asked):
        if not isinstance(question, PresenceQuestion):
            raise TypeError(f"questions must be PresenceQuestions, got {type(question).__name__} at {place}")
    return binary_scores(answers, [question.present for question in asked])


def says_yes(answer: str) -> bool:
    """Returns whether a free answer to a question about presence is a yes, by POPE's rule.

    It is a no if the first sentence has the word no or not, else a yes: "There isn't" is a yes to this rule.

    Raises:
        TypeError: `answer` is no string.

    Source: the evaluation script of POPE's authors; here in any case of letters, and with any mark around words.

    Example:
        >>> from mmkernels.evaluation import says_yes
        >>> says_yes("Yes, there is a cup."), says_yes("No."), says_yes("There is not. It is a glass.")
        (True, False, False)
    """
    if not isinstance(answer, str):
        raise TypeError(f"answer must be a string, got {type(answer).__name__}")
    words = "".join(c if c.isalnum() or c == "'" else " " for c in answer.partition(".")[0].lower()).split()
    return not {"no", "not"} & set(words)


class Region(NamedTuple):
    """A label and where it is: of an object in a scene, or of a claim about one.

    Attributes:
        label: what it is.
        box: ``(x1, y1, x2, y2)``; None: the claim cites no region.
    """

    label: Hashable
    box: Sequence[float] | None = None


class ClaimScores(NamedTuple):
    """How many claims have no evidence. A share of nothing is NaN.

    Attributes:
        unsupported_rate: of all claims, the share without evidence: CHAIR's share of instances.
        sentence_rate: of all sentences, the share with such a claim: CHAIR's share of sentences.
        absent_rate: of all claims, the share whose label is nowhere in the scene. The other unsupported ones cite a
            wrong place, or none.
        coverage: of all objects, the share that a supported claim is about.
        total: all claims.
    """

    unsupported_rate: float
    sentence_rate: float
    absent_rate: float
    coverage: float
    total: int


def claim_scores(
    claims: Iterable[Sequence[Region]], scenes: Iterable[Sequence[Region]], *, iou_threshold: float | None = 0.5
) -> ClaimScores:
    """Returns how many claims of sentences have no evidence in the scenes that they are about.

    A claim is supported if the scene has an object of its label, whose box agrees with the region that the claim cites.
    Two claims may be about one object. A sentence that claims nothing has no unsupported claim, so read the coverage
    too.

    Args:
        claims: for each sentence its claims.
        scenes: for each sentence the objects of the scene, all with boxes.
        iou_threshold: the least IoU at which boxes agree, above 0 and at most 1; None: labels alone count, as in CHAIR.

    Raises:
        TypeError: a wrong type. ValueError: no sentence, not as many scenes, or a scene's box that is none.

    Source: Rohrbach et al., "Object Hallucination in Image Captioning" (CHAIR), 2018, section 2.1, here with regions;
    coverage as in Wang et al., "AMBER: An LLM-free Multi-dimensional Benchmark for MLLMs Hallucination Evaluation",
    2023.

    Example:
        >>> from mmkernels.evaluation import Region, claim_scores
        >>> scene = [Region("7", (0, 0, 8, 8)), Region("2", (8, 0, 16, 8))]
        >>> said = [Region("7", (0, 0, 8, 7)), Region("2", (0, 8, 8, 16)), Region("5", (0, 0, 8, 8))]
        >>> scores = claim_scores([said], [scene])
        >>> round(scores.unsupported_rate, 2), round(scores.absent_rate, 2), scores.coverage
        (0.67, 0.33, 0.5)
    """
    said, seen = listed("claims", claims, "sequences of Regions"), listed("scenes", scenes, "sequences of Regions")
    check_lengths("scenes", seen, "claims", said)
    if iou_threshold is not None:
        iou_threshold = share("iou_threshold", iou_threshold)
    count = unsupported = sentences = absent = objects = covered = 0
    for n, (sentence, scene) in enumerate(zip(said, seen)):
        pairs = _evidence(n, sentence, scene, iou_threshold)  # claims x objects
        held = [any(row) for row in pairs]
        labels = {region.label for region in scene}
        count, unsupported, sentences = count + len(held), unsupported + held.count(False), sentences + (not all(held))
        absent += sum(claim.label not in labels for claim in sentence)
        objects, covered = objects + len(scene), covered + sum(any(row[k] for row in pairs) for k in range(len(scene)))
    return ClaimScores(
        unsupported_rate=unsupported / count if count else math.nan,
        sentence_rate=sentences / len(said),
        absent_rate=absent / count if count else math.nan,
        coverage=covered / objects if objects else math.nan,
        total=count,
    )


def _evidence(n: int, claims: Sequence[Region], scene: Sequence[Region], threshold: float | None) -> list[list[bool]]:
    """Returns whether each object of a scene is evidence for each claim."""
    cited, places = _boxes(f"claims[{n}]", claims), _boxes(f"scenes[{n}]", scene, needed=threshold is not None)
    same = [[claim.label == region.label for region in scene] for claim in claims]
    if threshold is None:
        return same
    try:
        near = box_iou(cited[:, None], places) >= threshold
    except ValueError as error:
        raise ValueError(f"scenes[{n}] must have valid boxes: {error}") from error
    return [[a and b for a, b in zip(*rows)] for rows in zip(same, near.tolist())]


def _boxes(name: str, regions: Sequence[Region], *, needed: bool = False) -> Tensor:
    """Returns the boxes of regions, float64 [R, 4], NaN for none; raises unless all are Regions."""
    if isinstance(regions, Region) or not isinstance(regions, Sequence):
        raise TypeError(f"{name} must be a sequence of Regions, got {type(regions).__name__}")
    rows = []
    for place, region in enumerate(regions):
        if not isinstance(region, Region):
            raise TypeError(f"{name} must be Regions, got {type(region).__name__} at {place}")
        if region.box is None and needed:
            raise ValueError(f"{name}[{place}] must have a box, got none")
        rows.append((math.nan,) * 4 if region.box is None else _numbers(f"{name}[{place}]", region.box))
    return torch.tensor(rows, dtype=torch.float64).view(-1, 4)


def _numbers(name: str, box: Sequence[float]) -> tuple[float, ...]:
    try:
        numbers = tuple(float(x) for x in box)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must have a box of numbers, got {box!r:.100}") from error
    if len(numbers) != 4:
        raise ValueError(f"{name} must have a box of 4 numbers, got {len(numbers)}")
    return numbers
