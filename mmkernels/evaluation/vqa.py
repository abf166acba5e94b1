"""Accuracy of visual question answering, against what several people answered."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from mmkernels.evaluation.checks import check_lengths, listed, texts

_MARKS = ';/[]"{}()=+\\_-><@`,?!'  # not the apostrophe, nor the colon of a time
_GROUPED = re.compile(r"\d,\d")  # 100,978
_FULL_STOP = re.compile(r"\.(?!\d)")  # not the point of 1.5
_ARTICLES = frozenset(("a", "an", "the"))
_UP_TO_TEN = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0"} | {word: str(n) for n, word in enumerate(_UP_TO_TEN)}
# What the official script restores where one apostrophe is missing.
_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
    he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've
    needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd
    somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've
    something'll that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't
    we'd've we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's
    who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll
    you're you've
"""
_RESTORED = {
    word[:place] + word[place + 1 :]: word
    for word in _CONTRACTED.split()
    for place, letter in enumerate(word)
    if letter == "'"
}


class VQAAccuracy(NamedTuple):
    """Accuracy over questions.

    Attributes:
        accuracy: the mean, from 0 to 1.
        per_question: of each question, from 0 to 1.
    """

    accuracy: float
    per_question: list[float]


def normalise_answer(answer: str) -> str:
    """Returns an answer as the official evaluation of VQA compares it.

    Lower case; number words up to ten as digits; no articles; no full stop, but for the point of a decimal number; a
    missing apostrophe of a contraction restored; no other punctuation, but for apostrophes and colons. A mark becomes a
    space, or nothing if it stands beside a space anywhere in the answer, or if the answer has a comma between digits.

    Raises:
        TypeError: `answer` is no string.

    Source: https://visualqa.org/evaluation.html and the script vqaEval.py that it links, whose mistakes are not
    repeated where a mistake can't change which answers are equal.

    Example:
        >>> from mmkernels.evaluation import normalise_answer
        >>> normalise_answer("The two dogs; they dont bark."), normalise_answer("100,978"), normalise_answer("1.5 m.")
        ("2 dogs they don't bark", '100978', '1.5 m')
    """
    if not isinstance(answer, str):
        raise TypeError(f"answer must be a string, got {type(answer).__name__}")
    text = answer = answer.replace("\n", " ").replace("\t", " ").strip()
    grouped = _GROUPED.search(answer) is not None
    for mark in _MARKS:
        beside_space = f"{mark} " in answer or f" {mark}" in answer
        text = text.replace(mark, "" if grouped or beside_space else " ")
    words = [_NUMBERS.get(word, word) for word in _FULL_STOP.sub("", text).lower().split()]
    return " ".join(_RESTORED.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(predictions: Iterable[str], answers: Iterable[Sequence[str]]) -> VQAAccuracy:
    """Returns the accuracy of answers to visual questions, each of which several people answered.

    An answer counts fully if three of the others gave it: its accuracy is the mean, over the choices of one person to
    leave out, of min(matches among the others / 3, 1). Both sides are normalised, see `normalise_answer`. (The official
    script leaves people's answers as they are where all are equal, which fails a prediction "Yes" against "yes";
    evaluation harnesses of today normalise always.) With fewer than four people for a question no answer to it reaches
    1; with one person there is nobody else, so that needs exact match instead.

    Args:
        predictions: one for each question.
        answers: for each question what people answered, ten in VQA, at least two.

    Raises:
        TypeError: an answer is no string. ValueError: there is no question, their numbers differ, or a question has
            fewer than two answers.

    Source: Antol et al., "VQA: Visual Question Answering", 2015; leaving one out:
    https://visualqa.org/evaluation.html.

    Example:
        >>> from mmkernels.evaluation import vqa_accuracy
        >>> people = [["yes"] * 8 + ["no"] * 2, ["2"] * 10]
        >>> vqa_accuracy(["No.", "two"], people).per_question
        [0.6, 1.0]
    """
    predicted = texts("predictions", predictions)
    people = listed("answers", answers, "sequences of strings")
    check_lengths("answers", people, "predictions", predicted)
    scores = [_score(text, texts(f"answers[{n}]", given), n) for n, (text, given) in enumerate(zip(predicted, people))]
    return VQAAccuracy(sum(scores) / len(scores), scores)


def _score(predicted: str, given: list[str], question: int) -> float:
    if len(given) < 2:
        raise ValueError(f"answers[{question}] must be at least 2, got {len(given)}")
    right = normalise_answer(predicted)
    equal = [normalise_answer(text) == right for text in given]
    found = sum(equal)
    return sum(min(found - same, 3) for same in equal) / (3 * len(given))
