"""Models with one kind of patch, and what their losses and gradients are."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmkernels.integrations.patching.changes import Change, Kind
from mmkernels.integrations.patching.classes import swap
from mmkernels.integrations.patching.deferred_tensor import Source


def patched(model: Any, kind: Kind) -> Any:
    """Returns a copy of a model with what one kind of patch finds."""
    found = copy.deepcopy(model)
    changes = [each for each in kind(found) if isinstance(each, Change)]
    assert changes
    for change in changes:
        swap(change.module, change.methods)
    return found


@contextmanager
def no_logits() -> Iterator[None]:
    """Inside, logits that are computed are an error."""

    def compute(self: Source) -> Tensor:
        raise AssertionError("the logits were computed")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Source, "compute", compute)
        yield


def loss_and_gradients(model: nn.Module, **inputs: Any) -> tuple[Any, dict[str, Tensor]]:
    """Returns a model's outputs, and the gradients of its loss."""
    model.zero_grad(set_to_none=True)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        outputs = model(**inputs)
    outputs.loss.backward()
    return outputs, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(ours: Any, theirs: Any, tolerance: float) -> None:
    """Compares what `loss_and_gradients` returns of two models."""
    (ours, our_grads), (theirs, their_grads) = ours, theirs
    error = (ours.loss - theirs.loss).abs() / theirs.loss.abs()
    assert error < 3 * tolerance and ours.loss.dtype == theirs.loss.dtype and ours.loss.shape == theirs.loss.shape
    assert our_grads.keys() == their_grads.keys()
    total = float(torch.stack([grad.norm() for grad in their_grads.values()]).norm())
    for name, grad in their_grads.items():
        error = (our_grads[name] - grad).norm() / grad.norm().clamp(min=1e-3 * total)
        assert float(error) < 20 * tolerance, name
