"""How well boxes agree."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.evaluation.checks import share
from mmkernels.runtime.checks import can_look, check_tensor


def box_iou(predicted: Tensor, target: Tensor) -> Tensor:
    """Returns the intersection over union of boxes, pair by pair.

    Shapes broadcast: ``box_iou(a[:, None], b)`` compares all pairs. Boxes are ``(x1, y1, x2, y2)`` in any unit, edges
    at real coordinates: a box from pixel 2 to pixel 5, both included, ends at 6. A predicted box may be anything that a
    model says: one with NaN or infinite coordinates, or whose second corner lies before the first, has IoU 0, and so
    has any box without area.

    Args:
        predicted: ``[..., 4]``, of numbers.
        target: ``[..., 4]``, of numbers; finite, ``x1 <= x2``, ``y1 <= y2`` (looked at on a CPU only).

    Returns:
        ``[...]``, from 0 to 1: float64 for integers and float64, else float32.

    Raises:
        TypeError: no tensor, or of bools or complex numbers. ValueError: a wrong shape or device, or a bad target.

    Source: the Jaccard index of boxes as in Everingham et al., "The Pascal Visual Object Classes (VOC) Challenge",
    2010, with real coordinates. The function in torchvision does the same for all pairs; mmkernels does not
    depend on torchvision.

    Example:
        >>> import torch
        >>> from mmkernels.evaluation import box_iou
        >>> box_iou(torch.tensor([[0.0, 0, 2, 2], [1, 1, 3, 3]]), torch.tensor([0.0, 0, 2, 2]))
        tensor([1.0000, 0.1429])
    """
    for name, x in (("predicted", predicted), ("target", target)):
        _check_boxes(name, x)
    if predicted.device != target.device:
        raise ValueError(f"target must be on predicted's device {predicted.device}, got {target.device}")
    try:
        shape = torch.broadcast_shapes(predicted.shape, target.shape)
    except RuntimeError as error:
        raise ValueError(
            f"target must have a shape that broadcasts with predicted's {tuple(predicted.shape)}, "
            f"got {tuple(target.shape)}"
        ) from error
    if target.device.type == "cpu" and can_look(target):
        _check_target(target)
    a, b = (_as_float(x).expand(shape) for x in (predicted, target))
    wide = torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32
    return _iou(a.to(wide), b.to(wide))


def box_accuracy(predicted: Tensor, target: Tensor, threshold: float = 0.5) -> float:
    """Returns the share of boxes whose IoU with their target is at least a threshold.

    Args:
        predicted, target: see `box_iou`.
        threshold: above 0 and at most 1.

    Raises:
        As `box_iou`; ValueError too if there is no box, or for a bad threshold.

    Source: Mao et al., "Generation and Comprehension of Unambiguous Object Descriptions", 2016, section 6: precision at
    0.5 of referring expressions.

    Example:
        >>> import torch
        >>> from mmkernels.evaluation import box_accuracy
        >>> box_accuracy(torch.tensor([[0.0, 0, 2, 2], [1, 1, 3, 3]]), torch.tensor([0.0, 0, 2, 2]))
        0.5
    """
    threshold = share("threshold", threshold)
    iou = box_iou(predicted, target)
    if iou.numel() == 0:
        raise ValueError("predicted must be at least one box, got none")
    return (iou >= threshold).double().mean().item()


def _check_boxes(name: str, x: Tensor) -> None:
    check_tensor(name, x)
    if x.dtype == torch.bool or x.is_complex():
        raise TypeError(f"{name} must be real numbers, got {x.dtype}")
    if x.dim() == 0 or x.shape[-1] != 4:
        raise ValueError(f"{name} must be [..., 4], got shape {tuple(x.shape)}")


def _check_target(target: Tensor) -> None:
    flat = target.reshape(-1, 4)
    wrong = ~(flat.isfinite().all(1) & (flat[:, 2:] >= flat[:, :2]).all(1))
    if wrong.any():
        first = int(wrong.int().argmax())
        raise ValueError(f"target must be finite, with x1 <= x2 and y1 <= y2, got {flat[first].tolist()} at {first}")


def _as_float(x: Tensor) -> Tensor:
    if not x.is_floating_point():
        return x.double()
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _iou(a: Tensor, b: Tensor) -> Tensor:
    """Returns [...] of two [..., 4] of one shape and dtype."""
    # In units of the power of two below the largest coordinate: no area overflows, and nothing is rounded.
    largest = torch.maximum(a.abs().amax(-1), b.abs().amax(-1)).clamp(min=torch.finfo(a.dtype).tiny)
    unit = (largest / (2 * torch.frexp(largest).mantissa))[..., None]
    a, b = a / unit, b / unit
    low, high = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
    both = (high - low).clamp(min=0).prod(-1)
    union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - both
    # A union of 0 or less: a second corner before the first, which leaves nothing of `both` either.
    return torch.where(a.isfinite().all(-1) & (union > 0), both / union, 0.0)
