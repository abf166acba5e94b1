"""Risk, coverage and calibration against their definitions."""

from __future__ import annotations

import math
from itertools import pairwise, permutations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmkernels.evaluation import brier_score, calibration_error, risk_coverage

ANSWERS = st.lists(st.tuples(st.sampled_from([0.0, 0.1, 0.2, 0.5, 0.75, 1.0]), st.booleans()), min_size=1, max_size=6)


def area_of(order: tuple[tuple[float, bool], ...]) -> float:
    """The mean risk of the first 1, 2, ... N answers."""
    wrong = np.cumsum([not right for _, right in order])
    return float(np.mean(wrong / np.arange(1, len(order) + 1)))


@given(ANSWERS)
def test_the_area_is_the_mean_over_all_orders_of_equal_confidences(answers: list[tuple[float, bool]]) -> None:
    orders = [p for p in permutations(answers) if all(a[0] >= b[0] for a, b in pairwise(p))]
    curve = risk_coverage(*zip(*answers))
    assert curve.area == pytest.approx(np.mean([area_of(order) for order in orders]))
    best = min(area_of(order) for order in permutations(answers))
    assert curve.excess_area == pytest.approx(curve.area - best)


@given(ANSWERS)
def test_the_curve_is_the_risk_of_what_is_at_least_as_sure(answers: list[tuple[float, bool]]) -> None:
    curve = risk_coverage(*zip(*answers))
    assert curve.confidence.tolist() == sorted({sure for sure, _ in answers}, reverse=True)
    for threshold, coverage, risk in zip(curve.confidence, curve.coverage, curve.risk):
        kept = [right for sure, right in answers if sure >= threshold]
        assert coverage == pytest.approx(len(kept) / len(answers))
        assert risk == pytest.approx(kept.count(False) / len(kept))


def test_confidences_of_any_scale() -> None:
    logs = torch.tensor([-0.1, -3.0, -800.0], dtype=torch.bfloat16, requires_grad=True)
    assert risk_coverage(logs, [True, False, True]).risk.tolist() == [0, 0.5, pytest.approx(1 / 3)]
    perfect = risk_coverage([3, 2, 1], [True, True, False])
    assert (perfect.area, perfect.excess_area) == (pytest.approx(1 / 9), 0)


def bins_of(answers: list[tuple[float, bool]], bins: int) -> list[list[tuple[float, bool]]]:
    """The members of each bin that has some: the first one has both edges, each other its upper one."""
    place = lambda sure: max(math.ceil(round(sure * bins, 9)) - 1, 0)
    return [found for n in range(bins) if (found := [x for x in answers if place(x[0]) == n])]


@given(ANSWERS, st.sampled_from([1, 2, 5, 10, 15]))
def test_calibration_against_the_definition(answers: list[tuple[float, bool]], bins: int) -> None:
    found = calibration_error(*zip(*answers), bins=bins)
    groups = bins_of(answers, bins)
    gaps = [abs(np.mean([sure for sure, _ in group]) - np.mean([right for _, right in group])) for group in groups]
    assert found.counts.tolist() == [len(group) for group in groups]
    assert found.error == pytest.approx(sum(gap * len(group) for gap, group in zip(gaps, groups)) / len(answers))
    assert found.largest == pytest.approx(max(gaps))
    assert found.accuracy == pytest.approx([np.mean([right for _, right in group]) for group in groups])


@given(ANSWERS)
def test_brier_score_against_the_definition(answers: list[tuple[float, bool]]) -> None:
    expected = np.mean([(sure - right) ** 2 for sure, right in answers])
    assert brier_score(*zip(*answers)) == pytest.approx(expected)


def test_one_class_alone() -> None:
    for right in (True, False):
        assert calibration_error([0.25, 0.25], [right] * 2).error == pytest.approx(0.75 if right else 0.25)
        assert brier_score([0.25, 0.25], [right] * 2) == pytest.approx(0.5625 if right else 0.0625)


def test_numbers_that_come_out_are_plain() -> None:
    found = calibration_error(torch.tensor([0.5, 1.0]), torch.tensor([True, True]))
    assert type(found.error) is type(found.largest) is type(brier_score([0.5], [1])) is float
    assert type(risk_coverage([0.5], [1]).area) is type(risk_coverage([0.5], [1]).excess_area) is float


@pytest.mark.parametrize(
    ("confidence", "correct", "error", "match"),
    [
        ([], [], ValueError, "confidence must be at least one, got none"),
        ([0.5, math.nan], [True, True], ValueError, "confidence must be .*, got nan at 1"),
        ([math.inf, 0.5], [True, True], ValueError, "confidence must be .*, got inf at 0"),
        ([0.5], [True, False], ValueError, "correct must be 1, one for each of confidence, got 2"),
        ([0.5], [0.5], ValueError, "correct must be bools, or 0 and 1, got 0.5 at 0"),
        (["high"], [True], TypeError, "confidence must be .*, got <U4"),
        (torch.ones(2, 2), [True, True], ValueError, r"confidence must be .* \[N\], got shape \(2, 2\)"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("metric", [risk_coverage, calibration_error, brier_score])
def test_bad_input(metric: Any, confidence: Any, correct: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        metric(confidence, correct)


def test_what_is_no_probability() -> None:
    for metric in (calibration_error, brier_score):
        with pytest.raises(ValueError, match=r"confidence must be probabilities from 0 to 1, got -3.0 at 1"):
            metric([0.5, -3.0], [True, True])
    with pytest.raises(ValueError, match="bins must be from 1 to 1000000, got 0"):
        calibration_error([0.5], [True], bins=0)
