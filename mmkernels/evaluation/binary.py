"""Yes or no, against the truth."""

from __future__ import annotations

import math
from typing import NamedTuple

from mmkernels.evaluation.checks import Values, bools, check_lengths, imported


class BinaryScores(NamedTuple):
    """Scores of a decision. A share of nothing is NaN.

    Attributes:
        accuracy: the share of right decisions.
        precision: of what was decided to be positive, the share that is. NaN if nothing was.
        recall: of what is positive, the share that was found. NaN if nothing is.
        f1: the harmonic mean of the two, 2 TP / (2 TP + FP + FN); 0 if nothing was found.
        positive_rate: the share that was decided to be positive.
        false_positive_rate: of what is negative, the share that was decided to be positive. NaN if nothing is negative.
        total: all decisions.
    """

    accuracy: float
    precision: float
    recall: float
    f1: float
    positive_rate: float
    false_positive_rate: float
    total: int


def binary_scores(decided: Values, truth: Values) -> BinaryScores:
    """Returns accuracy, precision, recall, F1 and rates of yes-or-no decisions.

    Args:
        decided: bools, or 0 and 1, ``[N]``: a sequence, an array or a tensor.
        truth: the same of what is true.

    Raises:
        TypeError: something else than bools. ValueError: numbers that are not 0 or 1, none, or not as many of both.
        ImportError: scikit-learn is not installed.

    Source: van Rijsbergen, "Information Retrieval", 1979, chapter 7; computed by scikit-learn.

    Example:
        >>> from mmkernels.evaluation import binary_scores
        >>> scores = binary_scores([True, True, False, False], [True, False, True, False])
        >>> scores.precision, scores.recall, scores.positive_rate
        (0.5, 0.5, 0.5)
    """
    got, true = bools("decided", decided), bools("truth", truth)
    check_lengths("truth", true, "decided", got)
    metrics = imported("sklearn.metrics", "binary_scores")
    (tn, fp), (_, tp) = metrics.confusion_matrix(true, got, labels=[False, True]).tolist()
    precision, recall, f1, _ = metrics.precision_recall_fscore_support(
        true, got, average="binary", pos_label=True, zero_division=math.nan
    )
    return BinaryScores(
        accuracy=(tp + tn) / len(true),
        precision=float(precision),
        recall=float(recall),
        f1=float(f1),
        positive_rate=(tp + fp) / len(true),
        false_positive_rate=fp / (fp + tn) if fp + tn else math.nan,
        total=len(true),
    )
