"""Argument checks that the contrastive ops share."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.ops.common.dtypes import wide_dtype
from mmkernels.runtime.checks import as_float, autocast_dtype, check_floating, check_tensor, is_known

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_features(image: Tensor, text: Tensor, least: int = 1) -> None:
    """Raise unless image is [N, d] or [N, Q, d] and text [M, d] of one dtype and device; `least`: of N and M."""
    check_floating("image", image)
    shape = image.shape
    if len(shape) not in (2, 3) or 0 in shape[1:] or is_known(shape[0] < least):
        of_rows = "" if least else " but N"
        raise ValueError(f"image must be [N, d] or [N, Q, d] with no dim of 0{of_rows}, got shape {tuple(shape)}")
    check_more_features("text", text, image, least=least)


def check_more_features(name: str, x: Tensor, image: Tensor, of: str = "image", least: int = 1) -> None:
    """Raise unless x is [M, d] with M >= `least`, and has the channels, dtype and device of the image features.

    Args:
        of: the name of the image features.
    """
    check_tensor(name, x)
    dim, shape = image.shape[-1], x.shape
    if len(shape) != 2 or shape[1] != dim or is_known(shape[0] < least):
        size = "K" if least == 0 else f"M >= {least}"
        raise ValueError(f"{name} must be [{size}, {dim}], as {of} has {dim} channels, got shape {tuple(shape)}")
    if x.dtype is not image.dtype:
        raise TypeError(f"{name} must have {of}'s dtype {image.dtype}, got {x.dtype}")
    if not (x.is_cpu and image.is_cpu) and x.device != image.device:
        raise ValueError(f"{name} must be on {of}'s device {image.device}, got {x.device}")


def check_scalar(name: str, x: Tensor | float, image: Tensor) -> Tensor:
    """Returns x as a tensor of one element on image's device, in image's dtype or float32.

    A number, and a tensor of another real dtype, is converted to `wide_dtype`: as in PyTorch's own arithmetic it does
    not widen the features, and its gradient comes back in its own dtype.
    """
    if not isinstance(x, Tensor):
        number, dtype = as_float(name, x, "a tensor of one element or a number"), wide_dtype(image)
        if torch.compiler.is_compiling() or type(number) is not float:  # `torch.full` would make a constant of it
            return torch.ones((), dtype=dtype, device=image.device) * number
        return torch.full((), number, dtype=dtype, device=image.device)
    check_tensor(name, x)
    if x.numel() != 1 or x.dim() > 1:
        raise ValueError(f"{name} must have one element, got shape {tuple(x.shape)}")
    if x.dtype in (torch.float16, torch.bfloat16) and autocast_dtype(image) is not None:
        x = x.float()
    if x.dtype not in (image.dtype, torch.float32):
        if x.dtype == torch.bool or x.is_complex() or x.is_quantized:
            raise TypeError(f"{name} must be a tensor of a real dtype, got {x.dtype}")
        x = x.to(wide_dtype(image))
    if not (x.is_cpu and image.is_cpu) and x.device != image.device:
        if x.dim() or x.device.type != "cpu":
            raise ValueError(
                f"{name} must be on image's device {image.device}, or on the CPU without a dim; got {x.device}"
            )
        x = x.to(image.device, non_blocking=True)
    return x


def check_ids(
    image_ids: Tensor | None, text_ids: Tensor | None, image: Tensor, text: Tensor, paired: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Returns both ids as int64, or None for both. If only one is given, it serves as both; without ids N must be M.

    Args:
        paired: text i is image i's positive, whatever the ids are.
    """
    n, m = image.shape[0], text.shape[0]
    if n != m and (paired or image_ids is None or text_ids is None):
        why = "text i is image i's positive" if paired else "without image_ids and text_ids text i is image i's"
        raise ValueError(f"text must have as many rows as image, {n}, as {why}; got {m}")
    if image_ids is None and text_ids is None:
        return None, None
    for name, ids, count in (("image_ids", image_ids, n), ("text_ids", text_ids, m)):
        if ids is not None:
            _check_ids(name, ids, count, image)
    image_ids, text_ids = (text_ids if image_ids is None else image_ids), (image_ids if text_ids is None else text_ids)
    assert image_ids is not None and text_ids is not None
    return image_ids.to(torch.int64), text_ids.to(torch.int64)


def check_hard_ids(ids: Tensor, hard_texts: Tensor | None, image_ids: Tensor | None, image: Tensor) -> Tensor:
    """Returns the ids of hard texts as int64.

    Args:
        image_ids: as `check_ids` returns them.
    """
    if hard_texts is None:
        raise ValueError("hard_texts must be given with hard_text_ids, got None")
    if image_ids is None:
        raise ValueError("image_ids or text_ids must be given with hard_text_ids, which are compared to them; got None")
    _check_ids("hard_text_ids", ids, hard_texts.shape[0], image)
    return ids.to(torch.int64)


def _check_ids(name: str, ids: Tensor, count: int, image: Tensor) -> None:
    check_tensor(name, ids)
    if ids.dtype not in _INTEGERS:
        raise TypeError(f"{name} must be integers, got {ids.dtype}")
    if tuple(ids.shape) != (count,):
        raise ValueError(f"{name} must be [{count}], an id for each row, got shape {tuple(ids.shape)}")
    if ids.device != image.device:
        raise ValueError(f"{name} must be on image's device {image.device}, got {ids.device}")
