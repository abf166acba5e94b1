"""Which tokens are kept, in plain PyTorch: by score, in an order that is defined for equal and for NaN scores too.

Nothing waits for a device: shapes follow from lengths that the host knows.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from mmkernels.runtime.arguments import Sizes
from mmkernels.runtime.checks import in_graph

__all__ = ["best", "image_of", "on_device", "starts_of"]


def best(scores: Tensor, lengths: Sizes, keep: Sizes, over: str) -> Tensor:
    """Returns the places of the tokens with the best scores, int64 [kept], ascending.

    Of equal scores the first tokens are kept; NaN is the worst score.

    Args:
        scores: [tokens].
        keep: of each image, or one number for all of them.
        over: "image" or "batch".
    """
    if over == "batch":
        return _order(scores)[: keep[0]].sort().values
    order = _order(scores)
    order = order[image_of(lengths, scores.device)[order].argsort(stable=True)]
    gaps = [first - kept for first, kept in zip(starts_of(lengths), starts_of(keep), strict=True)]
    kept = sum(keep)
    shift = torch.repeat_interleave(on_device(gaps[:-1], order.device), on_device(keep, order.device), output_size=kept)
    return order[torch.arange(kept, device=order.device) + shift].sort().values


def _order(scores: Tensor) -> Tensor:
    """Returns all tokens, the best first."""
    nan = scores.isnan()
    order = scores.masked_fill(nan, -torch.inf).argsort(descending=True, stable=True)
    return order[nan[order].int().argsort(stable=True)]


def image_of(lengths: Sizes, device: torch.device) -> Tensor:
    """Returns the image of each token, int64 [tokens]."""
    return torch.repeat_interleave(on_device(lengths, device), output_size=sum(lengths))


def starts_of(sizes: Sizes) -> Sizes:
    """Returns where each image begins, and where the last one ends."""
    return tuple(accumulate(sizes, initial=0))


def on_device(values: Sizes | list[int], device: torch.device) -> Tensor:
    """Returns integers as a tensor, which must not be written.

    A GPU's queue is not waited for, and what was copied there once is kept: a CUDA graph that is captured after a first
    call of the same sizes holds no copy from the host.
    """
    if device.type == "cuda" and not in_graph():
        return _on_gpu(tuple(values), device)
    return torch.tensor(values, dtype=torch.int64, device=device)


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Returns a tensor of the host on a device. A GPU's queue is not waited for, whatever the size."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" and not in_graph() else x.to(device)


@lru_cache(maxsize=256)
def _on_gpu(values: Sizes, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.int64).pin_memory().to(device, non_blocking=True)
