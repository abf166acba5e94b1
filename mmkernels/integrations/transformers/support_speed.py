"""Times a model, and measures its memory, before and after `mmkernels.patch`: `measure`."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmkernels.integrations.patching import patch
from mmkernels.integrations.transformers.support import quiet
from mmkernels.integrations.transformers.support_patched import labels_for
from mmkernels.meters import peak_memory, time_alternating
from mmkernels.testing.models import Inputs, seeded

SECONDS = 2.0
"""For all rounds of one comparison."""


class Measured(NamedTuple):
    """What `patch` makes of a model.

    Args:
        forward: how many times as fast a forward pass without gradients is.
        step: the same of a forward and a backward pass, from a loss if the model has one.
        memory: the share of its peak memory that such a step still takes above the weights; None: not measured.
    """

    forward: float
    step: float
    memory: float | None


def measure(model: Any, inputs: Inputs) -> Measured:
    """Returns how a model compares with itself after `mmkernels.patch`, in this process, the two in turns.

    Args:
        model: in evaluation mode; it is not changed.

    Raises:
        ValueError: there is nothing to patch.
    """
    with quiet():
        after = copy.deepcopy(model)
        patch(after, verbose=False)
        models = {"before": copy.deepcopy(model), "after": after}
        runs = {name: _forward(each, inputs) for name, each in models.items()}
        trained = _with_labels(model, inputs)
        steps = {name: _step(each, trained) for name, each in models.items()}
        forward = time_alternating(runs, budget=SECONDS)
        step = time_alternating(steps, budget=SECONDS)
        peaks = {name: peak_memory(run) for name, run in steps.items()}
    memory = peaks["after"] / peaks["before"] if peaks["before"] and peaks["after"] is not None else None
    return Measured(_ratio(forward), _ratio(step), memory)


def _with_labels(model: Any, inputs: Inputs) -> Inputs:
    """Returns inputs with labels, or as they are if the model computes no loss from them."""
    labelled = inputs | labels_for(model, inputs)
    with torch.no_grad(), seeded(1), suppress(Exception):
        model(**labelled)
        return labelled
    return inputs


def _ratio(times: Any) -> float:
    return min(times["before"].samples) / min(times["after"].samples)


def _forward(model: Any, inputs: Inputs) -> Callable[[], None]:
    def run() -> None:
        with torch.no_grad(), seeded(1):
            model(**inputs)

    return run


def _step(model: Any, inputs: Inputs) -> Callable[[], None]:
    """Returns a training step without the optimiser; gradients are written over, not allocated anew."""
    options = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}

    def run() -> None:
        with seeded(1):
            output = model(**inputs, **options)
        loss = output.get("loss")
        if loss is None:
            parts = [x.float().mean() for x in output.values() if isinstance(x, Tensor) and x.requires_grad]
            loss = torch.stack(parts).sum()
        loss.backward()
        model.zero_grad(set_to_none=False)

    return run
