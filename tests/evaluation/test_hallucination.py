"""Questions about what is and is not there, decisions against the truth, and claims that cite regions."""

from __future__ import annotations

import math
import sys
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmkernels.evaluation import (
    BinaryScores,
    PresenceQuestion,
    Region,
    binary_scores,
    claim_scores,
    pope_questions,
    pope_scores,
    refusal_scores,
    says_yes,
)
from mmkernels.evaluation.hallucination import STRATEGIES

SCENES = [
    ["cup", "table", "spoon"], ["table", "chair"], ["table", "chair", "cup"], ["dog"], ["dog", "table"],
    ["cup", "spoon"],
]  # fmt: skip
LABELS = {label for scene in SCENES for label in scene}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("per_image", [1, 2, 10])
def test_as_many_absent_as_present_and_all_true(strategy: str, per_image: int) -> None:
    questions = pope_questions(SCENES, strategy, per_image=per_image)
    for n, scene in enumerate(SCENES):
        asked = [question for question in questions if question.image == n]
        assert len({question.label for question in asked}) == len(asked)
        assert all(question.present == (question.label in scene) for question in asked)
        expected = min(per_image, len(scene), len(LABELS) - len(scene))
        assert Counter(question.present for question in asked) == {True: expected, False: expected}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_seed_repeats_and_another_one_does_not(strategy: str) -> None:
    as_sets = [set(scene) for scene in SCENES]
    draws = [pope_questions(as_sets, strategy, per_image=2, seed=seed) for seed in (0, 0, 1, 2, 3)]
    assert draws[0] == draws[1]
    assert any(draws[0] != other for other in draws[2:])


def test_the_order_within_a_set_does_not_matter() -> None:
    one, other = {0, 8}, {8, 0}
    assert list(one) != list(other)  # 0 and 8 collide, so the first one in comes first
    for seed in range(5):
        draws = [pope_questions([labels, [1]], per_image=1, seed=seed) for labels in (one, other)]
        assert draws[0] == draws[1]


def test_popular_ones_are_those_that_most_images_have() -> None:
    for seed in range(5):
        questions = pope_questions(SCENES, "popular", per_image=1, seed=seed)
        absent = {question.image: question.label for question in questions if not question.present}
        # table 4, cup 3, and of two each: spoon, chair, dog
        assert absent | {2: ""} == {0: absent[0], 1: "cup", 2: "", 3: "table", 4: "cup", 5: "table"}
        assert absent[0] in ("chair", "dog")


def test_adversarial_ones_are_those_that_stand_beside_what_is_there() -> None:
    scenes = [
        ["dog", "bone"],
        ["dog", "bone"],
        ["dog", "ball"],
        ["cup", "spoon"],
        ["cup", "table"],
        ["cup", "table"],
        ["dog"],
    ]
    for seed in range(5):
        questions = pope_questions(scenes, "adversarial", per_image=1, seed=seed)
        absent = {question.image: question.label for question in questions if not question.present}
        asked = {question.image: question.label for question in questions if question.present}
        assert absent[6] == "bone"  # beside a dog twice, a ball once
        assert absent[3] == ("table" if asked[3] == "cup" else absent[3])
        assert absent[0] == ("ball" if asked[0] == "dog" else absent[0])


def test_random_ones_are_spread_over_all() -> None:
    labels = range(20)
    questions = pope_questions([[0, 1, 2]] * 100, per_image=3, vocabulary=labels)
    absent = Counter(question.label for question in questions if not question.present)
    assert set(absent) == set(labels[3:])
    assert max(absent.values()) < 40  # of 300 by 17
    order = [question.label for question in questions if question.present and question.image < 20]
    assert order != [0, 1, 2] * 20


def test_images_without_anything_or_with_everything_ask_nothing() -> None:
    questions = pope_questions([[], ["a", "b"], ["a", "a"]])
    assert questions == [PresenceQuestion(2, "a", True), PresenceQuestion(2, "b", False)]


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"objects": []}, ValueError, "objects must be at least one of collections of labels, got none"),
        ({"objects": ["cup"]}, TypeError, r"objects\[0\] must be a collection of labels, got str"),
        ({"objects": [[], []]}, ValueError, "objects must be such that an image has a label and lacks another"),
        ({"objects": [["a"]]}, ValueError, "objects must be such that an image has a label and lacks another"),
        ({"strategy": "hard"}, ValueError, "strategy must be one of random, popular, adversarial, got 'hard'"),
        ({"per_image": 0}, ValueError, "per_image must be >= 1, got 0"),
        ({"per_image": True}, TypeError, "per_image must be an integer, got bool"),
        ({"seed": -1}, ValueError, "seed must be >= 0, got -1"),
        ({"vocabulary": "cup"}, TypeError, "vocabulary must be labels, got str"),
    ],
)  # fmt: skip
def test_bad_input_of_questions(arguments: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        pope_questions(**({"objects": SCENES} | arguments))


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30))
def test_scores_against_counts(pairs: list[tuple[bool, bool]]) -> None:
    got, true = zip(*pairs)
    tp, fp = pairs.count((True, True)), pairs.count((True, False))
    fn, tn = pairs.count((False, True)), pairs.count((False, False))
    ratio = lambda a, b: a / b if b else math.nan
    expected = BinaryScores(
        accuracy=(tp + tn) / len(pairs), precision=ratio(tp, tp + fp), recall=ratio(tp, tp + fn),
        f1=ratio(2 * tp, 2 * tp + fp + fn), positive_rate=(tp + fp) / len(pairs),
        false_positive_rate=ratio(fp, fp + tn), total=len(pairs),
    )  # fmt: skip
    for scores in (binary_scores(got, true), refusal_scores(got, true)):
        assert scores == pytest.approx(expected, nan_ok=True)
        assert all(type(x) in (float, int) for x in scores)


def test_what_decisions_may_be() -> None:
    truth = [1, 0, 1]
    expected = binary_scores([True, False, False], truth)
    for decided in ([1, 0, 0], [1.0, 0.0, 0.0], np.array([1, 0, 0]), torch.tensor([True, False, False])):
        assert binary_scores(decided, torch.tensor(truth)) == expected
    assert binary_scores(torch.tensor([1, 0, 0], dtype=torch.bfloat16, requires_grad=True), truth) == expected


@pytest.mark.parametrize(
    ("decided", "truth", "error", "match"),
    [
        ([], [], ValueError, "decided must be at least one, got none"),
        ([True], [True, False], ValueError, "truth must be 1, one for each of decided, got 2"),
        ([True, 2], [1, 0], ValueError, "decided must be bools, or 0 and 1, got 2 at 1"),
        ([0.0, math.nan], [1, 0], ValueError, "decided must be bools, or 0 and 1, got nan at 1"),
        ([0, 1], ["no", "yes"], TypeError, "truth must be bools, got <U3"),
        ([0, 1], [None, True], TypeError, "truth must be bools, got object"),
        ([[0], [1]], [0, 1], ValueError, r"decided must be bools \[N\], got shape \(2, 1\)"),
        ([[0], [1, 1]], [0, 1], ValueError, r"decided must be bools \[N\], got sequences of several lengths"),
        (True, [0, 1], ValueError, r"decided must be bools \[N\], got shape \(\)"),
    ],
)  # fmt: skip
def test_bad_decisions(decided: Any, truth: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        binary_scores(decided, truth)
    with pytest.raises(error, match=match.replace("decided", "refused").replace("truth", "unanswerable")):
        refusal_scores(decided, truth)


def test_without_scikit_learn_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    with pytest.raises(ImportError, match=r'binary_scores needs scikit-learn: pip install "mmkernels\[evaluation\]"'):
        binary_scores([True], [True])


def test_scores_of_answers_about_presence() -> None:
    questions = pope_questions(SCENES, per_image=2)
    always = pope_scores([True] * len(questions), questions)
    assert (always.accuracy, always.recall, always.positive_rate, always.false_positive_rate) == (0.5, 1, 1, 1)
    right = pope_scores([question.present for question in questions], questions)
    assert (right.accuracy, right.f1, right.positive_rate, right.false_positive_rate) == (1, 1, 0.5, 0)
    never = pope_scores([False] * len(questions), questions)
    assert math.isnan(never.precision)
    assert (never.f1, never.false_positive_rate) == (0, 0)
    with pytest.raises(TypeError, match="questions must be PresenceQuestions, got str at 0"):
        pope_scores([True], ["cup"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=f"truth must be 1, one for each of decided, got {len(questions)}"):
        pope_scores([True], questions)


@pytest.mark.parametrize(
    ("answer", "yes"),
    [
        ("Yes", True), ("yes, there is a cup", True), ("No", False), ("No, there is none", False), ("NO!", False),
        ("There is not a cup", False), ("Yes. It is not a glass.", True), ("Nothing", True), ("a note", True),
        ("", True), ("no.", False), ("There isn't", True),
    ],
)  # fmt: skip
def test_free_answers(answer: str, yes: bool) -> None:
    assert says_yes(answer) == yes


SCENE = [Region("7", (0, 0, 8, 8)), Region("2", (8, 0, 16, 8)), Region("7", (20, 20, 28, 28))]


def test_claims_with_evidence_and_without() -> None:
    sentences = [
        [Region("7", (0, 0, 8, 8)), Region("7", (20, 20, 28, 27)), Region("7", (0, 0, 8, 7))],  # two about one object
        [Region("7", (8, 0, 16, 8)), Region("3", (0, 0, 8, 8)), Region("2")],  # a wrong place, a wrong label, no place
        [],
        [Region("2", (8, 0, 12, 8))],  # IoU 0.5
    ]
    found = claim_scores(sentences, [SCENE] * 4)
    assert found.total == 7
    assert found.unsupported_rate == pytest.approx(3 / 7)
    assert found.sentence_rate == 0.25
    assert found.absent_rate == pytest.approx(1 / 7)
    assert found.coverage == pytest.approx(3 / 12)
    assert claim_scores(sentences, [SCENE] * 4, iou_threshold=0.6).unsupported_rate == pytest.approx(4 / 7)
    labels = claim_scores(sentences, [SCENE] * 4, iou_threshold=None)
    assert (labels.unsupported_rate, labels.absent_rate) == (pytest.approx(1 / 7), pytest.approx(1 / 7))
    assert labels.coverage == pytest.approx((2 + 3 + 0 + 1) / 12)


def test_labels_alone_need_no_boxes() -> None:
    found = claim_scores([[Region("cup"), Region("dog")]], [[Region("cup"), Region("table")]], iou_threshold=None)
    assert (found.unsupported_rate, found.coverage) == (0.5, 0.5)


def test_a_share_of_nothing_is_nan() -> None:
    found = claim_scores([[]], [[]])
    assert math.isnan(found.unsupported_rate)
    assert math.isnan(found.coverage)
    assert (found.sentence_rate, found.total) == (0, 0)
    assert claim_scores([[Region("7", (0, 0, 1, 1))]], [[]]).unsupported_rate == 1


def test_boxes_that_are_none_support_nothing() -> None:
    odd = [Region("7", (math.nan,) * 4), Region("7", (8, 8, 0, 0)), Region("7", torch.tensor([0, 0, 8, 8]))]
    assert claim_scores([odd], [SCENE]).unsupported_rate == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("claims", "scenes", "error", "match"),
    [
        ([], [], ValueError, "claims must be at least one of sequences of Regions, got none"),
        ([[]], [[], []], ValueError, "scenes must be 1, one for each of claims, got 2"),
        ([[("7", (0, 0, 8, 8))]], [[]], TypeError, r"claims\[0\] must be Regions, got tuple at 0"),
        ([Region("7")], [SCENE], TypeError, r"claims\[0\] must be a sequence of Regions, got Region"),
        ([[]], [[Region("7")]], ValueError, r"scenes\[0\]\[0\] must have a box, got none"),
        ([[]], [[Region("7", (0, 0, 8))]], ValueError, r"scenes\[0\]\[0\] must have a box of 4 numbers, got 3"),
        ([[Region("7", "here")]], [SCENE], TypeError, r"claims\[0\]\[0\] must have a box of numbers, got 'here'"),
        ([[Region("7", 8)]], [SCENE], TypeError, r"claims\[0\]\[0\] must have a box of numbers, got 8"),
        (
            [[Region("7", (0, 0, 8, 8))]], [[Region("7", (8, 8, 0, 0))]], ValueError,
            r"scenes\[0\] must have valid boxes: target must be finite, with x1 <= x2",
        ),
    ],
)  # fmt: skip
def test_bad_claims(claims: Any, scenes: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        claim_scores(claims, scenes)
