"""What tests of single kinds of patches share: a kind applied without the rest of `mmkernels.patch`, and comparison."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmkernels.integrations.patching.changes import Change, Kind
from mmkernels.integrations.patching.classes import swap
from mmkernels.testing.models import seeded


def apply(find: Kind, model: nn.Module) -> list[Change]:
    """Applies the changes that a kind finds in a model, and returns them."""
    changes = [found for found in find(model) if isinstance(found, Change)]
    for change in changes:
        assert swap(change.module, change.methods)
    return changes


def compared(module: nn.Module, method: str, *args: Any, **keywords: Any) -> dict[str, Tensor]:
    """Returns what a method returns, and the gradients of its sum with random weights, by name."""
    args = tuple(x.detach().requires_grad_(x.is_floating_point()) if isinstance(x, Tensor) else x for x in args)
    module.zero_grad()
    out = getattr(module, method)(*args, **keywords)
    parts = {f"out {place}": x for place, x in enumerate(out if isinstance(out, list | tuple) else [out])}
    with seeded(1):
        sum((x * torch.randn(x.shape, dtype=x.dtype)).sum() for x in parts.values()).backward()  # type: ignore[union-attr]
    grads = {name: x.grad for name, x in module.named_parameters() if x.grad is not None}
    inputs = {f"argument {place}": x.grad for place, x in enumerate(args) if isinstance(x, Tensor) and x.requires_grad}
    return {name: x.detach() for name, x in parts.items()} | grads | inputs
