"""Metrics of multimodal models, each with its source.

Plain functions: texts, bools, numbers or tensors in, numbers or a NamedTuple out. A metric that a well-kept library has
is computed by that library (scikit-learn, jsonschema, Pillow: the extra ``mmkernels[evaluation]``), any other by this
package. A function that is called without its library says what to install.
"""

from mmkernels.evaluation.binary import BinaryScores, binary_scores
from mmkernels.evaluation.boxes import box_accuracy, box_iou
from mmkernels.evaluation.calibration import (
    Calibration,
    RiskCoverage,
    brier_score,
    calibration_error,
    refusal_scores,
    risk_coverage,
)
from mmkernels.evaluation.corruptions import Corruption, blur, crop, cropped_boxes, jpeg, standard_corruptions
from mmkernels.evaluation.hallucination import (
    ClaimScores,
    PresenceQuestion,
    Region,
    claim_scores,
    pope_questions,
    pope_scores,
    says_yes,
)
from mmkernels.evaluation.retrieval import RetrievalRecall, retrieval_recall
from mmkernels.evaluation.robustness import Robustness, measure_robustness
from mmkernels.evaluation.structured import AnswerSchema, AnswerValidity, ParsedAnswer, answer_validity
from mmkernels.evaluation.vqa import VQAAccuracy, normalise_answer, vqa_accuracy

__all__ = [
    "AnswerSchema",
    "AnswerValidity",
    "BinaryScores",
    "Calibration",
    "ClaimScores",
    "Corruption",
    "ParsedAnswer",
    "PresenceQuestion",
    "Region",
    "RetrievalRecall",
    "RiskCoverage",
    "Robustness",
    "VQAAccuracy",
    "answer_validity",
    "binary_scores",
    "blur",
    "box_accuracy",
    "box_iou",
    "brier_score",
    "calibration_error",
    "claim_scores",
    "crop",
    "cropped_boxes",
    "jpeg",
    "measure_robustness",
    "normalise_answer",
    "pope_questions",
    "pope_scores",
    "refusal_scores",
    "retrieval_recall",
    "risk_coverage",
    "says_yes",
    "standard_corruptions",
    "vqa_accuracy",
]
