"""Whether a model knows when it is wrong: risk against coverage, calibration, refusals."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mmkernels.evaluation.binary import BinaryScores, binary_scores
from mmkernels.evaluation.checks import (
    Bools,
    Floats,
    Values,
    bools,
    check_lengths,
    floats,
    imported,
    probabilities,
    whole,
)


class RiskCoverage(NamedTuple):
    """What answering only the surest questions costs and gains. The curve has a point for each distinct confidence.

    Attributes:
        confidence: ``[P]``, falling: everything at least as sure is answered.
        coverage: ``[P]``, the share of questions that are answered; the last is 1.
        risk: ``[P]``, of those the share that is answered wrong; the last is the error rate.
        area: the mean risk over all coverages 1/N to 1 (AURC), 0 is best. Equal confidences count as the mean over all
            orders of theirs, so the order of the input does not matter.
        excess_area: `area` without that of the best order, all right answers first (E-AURC): what a better confidence
            could gain, whatever the accuracy.
    """

    confidence: Floats
    coverage: Floats
    risk: Floats
    area: float
    excess_area: float


def risk_coverage(confidence: Values, correct: Values) -> RiskCoverage:
    """Returns the risk-coverage curve of a model that may refuse to answer, and its area.

    Args:
        confidence: finite numbers ``[N]`` on any scale, the higher the surer; of a sequence, its log-probability.
        correct: bools ``[N]``, whether each answer is right.

    Raises:
        TypeError: a wrong type. ValueError: none, not as many of both, or a confidence that is NaN or infinite.

    Source: El-Yaniv & Wiener, "On the Foundations of Noise-free Selective Classification", 2010; AURC = 1/N sum of the
    risk at coverage i/N, and E-AURC, as in Geifman, Uziel & El-Yaniv, "Bias-Reduced Uncertainty Estimation for Deep
    Neural Classifiers", 2019.

    Example:
        >>> from mmkernels.evaluation import risk_coverage
        >>> curve = risk_coverage([0.9, 0.8, 0.6, 0.2], [True, True, False, True])
        >>> curve.coverage.tolist(), curve.risk.round(2).tolist()
        ([0.25, 0.5, 0.75, 1.0], [0.0, 0.0, 0.33, 0.25])
        >>> round(curve.area, 4), round(curve.excess_area, 4)
        (0.1458, 0.0833)
    """
    sure, right = floats("confidence", confidence), bools("correct", correct)
    check_lengths("correct", right, "confidence", sure)
    values, group = np.unique(-sure, return_inverse=True)  # rising, so the surest first
    sizes = np.bincount(group)
    errors = np.bincount(group, weights=~right)
    answered, wrong = sizes.cumsum(), errors.cumsum()
    # Within a group of equal confidences each next answer is wrong with the group's error rate.
    steps = np.repeat(errors / sizes, sizes).cumsum()
    area = float((steps / np.arange(1, len(sure) + 1)).mean())
    best = np.sort(~right).cumsum() / np.arange(1, len(sure) + 1)
    return RiskCoverage(-values, answered / len(sure), wrong / answered, area, area - float(best.mean()))


class Calibration(NamedTuple):
    """A reliability diagram and its errors. Bins without an answer are left out.

    Attributes:
        error: the expected calibration error (ECE): the mean over answers of their bin's gap between confidence and
            accuracy, 0 is best.
        largest: the largest gap of a bin (MCE).
        confidence: ``[bins]``, the mean confidence of each bin.
        accuracy: ``[bins]``, the share of right answers of each bin.
        counts: int64 ``[bins]``, the answers in each bin.
    """

    error: float
    largest: float
    confidence: Floats
    accuracy: Floats
    counts: np.ndarray


def calibration_error(confidence: Values, correct: Values, *, bins: int = 15) -> Calibration:
    """Returns how far confidences are from the shares of right answers.

    For refusals `confidence` is the probability that the model gives to refusing, `correct` whether it should refuse.

    Args:
        confidence: probabilities ``[N]``, from 0 to 1.
        correct: bools ``[N]``.
        bins: of equal width, at least 1; each has its upper edge, the first also 0.

    Raises:
        TypeError: a wrong type. ValueError: none, not as many of both, or no probability.
        ImportError: scikit-learn is not installed.

    Source: Naeini, Cooper & Hauskrecht, "Obtaining Well Calibrated Probabilities Using Bayesian Binning", 2015; bins as
    in Guo et al., "On Calibration of Modern Neural Networks", 2017, section 2: ECE = sum over bins of
    n_bin / N |accuracy - confidence|; the diagram by scikit-learn.

    Example:
        >>> from mmkernels.evaluation import calibration_error
        >>> found = calibration_error([0.9, 0.9, 0.9, 0.9, 0.6, 0.6], [True, True, True, False, True, False], bins=5)
        >>> round(found.error, 4), round(found.largest, 4), found.counts.tolist()
        (0.1333, 0.15, [2, 4])
    """
    sure, right = _checked(confidence, correct)
    bins = whole("bins", bins, 1, 1_000_000)
    curve = imported("sklearn.calibration", "calibration_error").calibration_curve
    accuracy, mean = curve(right, sure, pos_label=True, n_bins=bins)
    edges = np.linspace(0, 1, bins + 1)
    counts = np.bincount(np.searchsorted(edges[1:-1], sure))
    counts = counts[counts > 0]
    gaps = np.abs(accuracy - mean)
    return Calibration(float(gaps @ counts / len(sure)), float(gaps.max()), mean, accuracy, counts)


def brier_score(confidence: Values, correct: Values) -> float:
    """Returns the mean squared distance of probabilities from what happened, 0 (best) to 1.

    Unlike the calibration error it is also large for a model that says the same of everything.

    Args:
        confidence: probabilities ``[N]``, from 0 to 1.
        correct: bools ``[N]``.

    Raises:
        As `calibration_error`.

    Source: Brier, "Verification of Forecasts Expressed in Terms of Probability", 1950, here of one class, so half of
    that paper's score; computed by scikit-learn.

    Example:
        >>> from mmkernels.evaluation import brier_score
        >>> brier_score([1.0, 0.5, 0.0], [True, True, False])
        0.08333333333333333
    """
    sure, right = _checked(confidence, correct)
    return float(imported("sklearn.metrics", "brier_score").brier_score_loss(right, sure, pos_label=True))


def refusal_scores(refused: Values, unanswerable: Values) -> BinaryScores:
    """Returns how well a model refuses: what it should refuse, and nothing else.

    `precision` is the share of refusals that are right, `recall` the share of unanswerable questions that are refused,
    so 1 - `recall` is the share that was answered with an invention; `false_positive_rate` is the share of answerable
    questions that are refused.

    Args:
        refused: bools ``[N]``, whether the model refused.
        unanswerable: bools ``[N]``, whether it should have.

    Raises:
        As `binary_scores`.

    Source: Rajpurkar, Jia & Liang, "Know What You Don't Know: Unanswerable Questions for SQuAD", 2018; computed by
    scikit-learn.

    Example:
        >>> from mmkernels.evaluation import refusal_scores
        >>> scores = refusal_scores(refused=[True, True, False, False], unanswerable=[True, False, False, True])
        >>> scores.precision, scores.recall, scores.false_positive_rate
        (0.5, 0.5, 0.5)
    """
    got, right = bools("refused", refused), bools("unanswerable", unanswerable)
    check_lengths("unanswerable", right, "refused", got)
    return binary_scores(got, right)


def _checked(confidence: Values, correct: Values) -> tuple[Floats, Bools]:
    sure, right = probabilities("confidence", confidence), bools("correct", correct)
    check_lengths("correct", right, "confidence", sure)
    return sure, right
