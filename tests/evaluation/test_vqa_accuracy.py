"""Answers of people and of a model, compared as VQA's official evaluation does."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmkernels.evaluation import normalise_answer, vqa_accuracy

# As the official script's functions process them.
NORMALISED = {
    "": "", "  \n\t": "", "Yes": "yes", "YES.": "yes", "a cat": "cat", "An apple on the table": "apple on table",
    "the": "", "A": "", "none": "0", "None.": "0", "zero": "0", "Two": "2", "ten": "10", "eleven": "eleven",
    "2.": "2", "1.5": "1.5", ".5": ".5", "$3.50": "$3.50", "U.S.A.": "usa", "10:30": "10:30", "a.m.": "am",
    "100,978": "100978", "1, 2": "1 2", "red,blue": "red blue", "red, blue": "red blue", "red ,blue": "red blue",
    "yes/no": "yes no", "yes / no": "yes no", "t-shirt": "t shirt", "t- shirt": "t shirt",
    "semi-detached 1,000": "semidetached 1000",
    "x-ray -y": "xray y", "x-ray- y": "xray y", "x-y;-z": "x y z",
    "what?!": "what", "(left)": "left", "dog's": "dog's", "dont": "don't", "don't": "don't", "DONT": "don't",
    "couldntve": "couldntve", "couldnt've": "couldn't've", "couldn'tve": "couldn't've", "yall'd've": "y'all'd've",
    "twas": "'twas", "oclock": "o'clock", "lets": "lets", "well": "well", "its": "its", "ill": "ill",
    "snow\nboard": "snow board", "a_b": "b", "two\ttwo": "2 2", "the one": "1", "Ünïcode": "ünïcode",
}  # fmt: skip


@pytest.mark.parametrize(("answer", "normal"), NORMALISED.items())
def test_normalised(answer: str, normal: str) -> None:
    assert normalise_answer(answer) == normal


@given(st.text(st.sampled_from("aA tTnN'.,;10!-\n"), max_size=12))
def test_case_and_outer_space_do_not_matter(answer: str) -> None:
    assert (
        normalise_answer(answer)
        == normalise_answer(f" {answer.swapcase()}\n".lower())
        == normalise_answer(answer.upper())
    )


def brute_force(predicted: str, people: list[str]) -> float:
    """The definition: each choice of all people but one."""
    others = list(combinations(people, len(people) - 1))
    matches = [sum(normalise_answer(x) == normalise_answer(predicted) for x in group) for group in others]
    return sum(min(n / 3, 1) for n in matches) / len(others)


@given(st.lists(st.sampled_from(["yes", "Yes.", "no", "the no", "2"]), min_size=2, max_size=10))
def test_leave_one_out_against_the_definition(people: list[str]) -> None:
    for predicted in ("yes", "No", "two", "maybe"):
        assert vqa_accuracy([predicted], [people]).accuracy == pytest.approx(brute_force(predicted, people))


@pytest.mark.parametrize(("matches", "accuracy"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_known_values_of_ten_people(matches: int, accuracy: float) -> None:
    found = vqa_accuracy(["cat"], [["cat"] * matches + ["dog"] * (10 - matches)])
    assert found.accuracy == pytest.approx(accuracy)
    assert isinstance(found.accuracy, float)


def test_mean_over_questions() -> None:
    found = vqa_accuracy(["cat", "dog"], iter([["cat"] * 10, ["cat"] * 9 + ["dog"]]))
    assert found.per_question == pytest.approx([1, 0.3])
    assert found.accuracy == pytest.approx(0.65)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="predictions must be at least one of strings, got none"):
        vqa_accuracy([], [])
    with pytest.raises(ValueError, match="answers must be 1, one for each of predictions, got 2"):
        vqa_accuracy(["a"], [["a"] * 10] * 2)
    with pytest.raises(ValueError, match=r"answers\[1\] must be at least 2, got 1"):
        vqa_accuracy(["a", "b"], [["a", "b"], ["b"]])
    with pytest.raises(TypeError, match=r"answers\[0\] must be strings, got str"):
        vqa_accuracy(["a"], ["aaaaaaaaaa"])
    with pytest.raises(TypeError, match=r"answers\[0\] must be strings, got int at 1"):
        vqa_accuracy(["a"], [["a", 2]])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="predictions must be strings, got int at 0"):
        vqa_accuracy([7], [["a"] * 10])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="answer must be a string, got NoneType"):
        normalise_answer(None)  # type: ignore[arg-type]
