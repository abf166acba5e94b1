"""Intersection over union against another library's, and of boxes that no detector should give."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mmkernels.evaluation import box_accuracy, box_iou

NAN, INF = math.nan, math.inf
BOX = torch.tensor([1.0, 2, 3, 6])


def boxes(n: int) -> Tensor:
    corner = 10 * torch.rand(n, 2, dtype=torch.float64)
    return torch.cat([corner, corner + 10 * torch.rand(n, 2, dtype=torch.float64)], 1)


def test_all_pairs_against_transformers() -> None:
    loss = pytest.importorskip("transformers.loss.loss_for_object_detection")
    a, b = boxes(30), boxes(20)
    expected, _ = loss.box_iou(a, b)
    torch.testing.assert_close(box_iou(a[:, None], b), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(box_iou(a[:20], b), expected[:20].diagonal(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("box", "iou"),
    [
        ([1, 2, 3, 6], 1), ([1, 2, 2, 6], 0.5), ([2, 2, 4, 6], 1 / 3), ([3, 2, 5, 6], 0), ([7, 7, 9, 9], 0),
        ([0, 0, 10, 10], 0.08), ([1, 2, 1, 6], 0), ([3, 6, 1, 2], 0), ([3, 2, 1, 6], 0),
        ([NAN] * 4, 0), ([1, 2, 3, NAN], 0), ([-INF, 2, 3, 6], 0), ([1, 2, INF, INF], 0), ([1e300, 2, 3, 6], 0),
        ([-1e30, -1e30, 1e30, 1e30], 0), ([-1e38, -1e38, 1e38, 1e38], 0),
    ],
)  # fmt: skip
def test_what_a_model_may_say(box: list[float], iou: float) -> None:
    found = box_iou(torch.tensor(box), BOX)
    assert found.item() == pytest.approx(iou, abs=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e18, 1e30, 5e37])
def test_no_size_overflows_or_vanishes(scale: float) -> None:
    target = BOX * scale
    assert box_iou(target, target).item() == 1
    assert box_iou(target * torch.tensor([1, 1, 0.75, 1]), target).item() == pytest.approx(0.625)


def test_target_without_area() -> None:
    point = torch.tensor([1.0, 1, 1, 1])
    assert box_iou(point, point).item() == 0
    assert box_iou(torch.zeros(4), torch.zeros(4)).item() == 0
    assert box_iou(BOX, point).item() == 0
    assert box_iou(torch.tensor([0, 0, 1e-30, 1e-30]), point).item() == 0  # an area that is no float32


@pytest.mark.parametrize(
    ("dtype", "out"),
    [
        (torch.int64, torch.float64), (torch.uint8, torch.float64), (torch.float64, torch.float64),
        (torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float16, torch.float32),
    ],
)  # fmt: skip
def test_dtypes(dtype: torch.dtype, out: torch.dtype) -> None:
    found = box_iou(torch.tensor([1, 2, 2, 6], dtype=dtype), BOX.to(dtype))
    assert found.dtype == out
    assert found.item() == 0.5


def test_shapes_broadcast() -> None:
    assert box_iou(BOX.expand(3, 1, 4), BOX.expand(5, 4)).shape == (3, 5)
    assert box_iou(BOX, BOX).shape == ()
    assert box_iou(torch.zeros(0, 4), BOX).shape == (0,)


def test_accuracy_counts_the_threshold_itself() -> None:
    predicted = torch.tensor([[1.0, 2, 3, 6], [1, 2, 2, 6], [1, 2, 1.5, 6], [NAN] * 4])
    assert box_accuracy(predicted, BOX) == 0.5
    assert box_accuracy(predicted, BOX, threshold=0.25) == 0.75
    assert box_accuracy(predicted, BOX, threshold=1) == 0.25


@pytest.mark.parametrize(
    ("predicted", "target", "error", "match"),
    [
        ([1, 2, 3, 4], BOX, TypeError, "predicted must be a tensor, got list"),
        (BOX, BOX > 2, TypeError, "target must be real numbers, got torch.bool"),
        (BOX * 1j, BOX, TypeError, "predicted must be real numbers, got torch.complex64"),
        (BOX[:3], BOX, ValueError, r"predicted must be \[..., 4\], got shape \(3,\)"),
        (BOX.sum(), BOX, ValueError, r"predicted must be \[..., 4\], got shape \(\)"),
        (BOX.expand(2, 4), BOX.expand(3, 4), ValueError, "target must have a shape that broadcasts with"),
        (BOX, BOX.flip(0), ValueError, r"target must be .* x1 <= x2 and y1 <= y2, got \[6.0, 3.0, 2.0, 1.0\] at 0"),
        (BOX, torch.stack([BOX, BOX * NAN]), ValueError, "target must be finite, .* at 1"),
        (BOX, BOX.to("meta"), ValueError, "target must be on predicted's device cpu, got meta"),
    ],
)  # fmt: skip
def test_bad_input(predicted: Tensor, target: Tensor, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        box_iou(predicted, target)


def test_bad_input_of_accuracy() -> None:
    with pytest.raises(ValueError, match="threshold must be above 0 and at most 1, got 0"):
        box_accuracy(BOX, BOX, threshold=0)
    with pytest.raises(ValueError, match=r"threshold must be above 0 and at most 1, got 1.5"):
        box_accuracy(BOX, BOX, threshold=1.5)
    with pytest.raises(ValueError, match="predicted must be at least one box, got none"):
        box_accuracy(torch.zeros(0, 4), BOX)
