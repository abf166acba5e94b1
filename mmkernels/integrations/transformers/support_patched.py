"""Compares a model family after `mmkernels.patch` with itself before it: `check_patched`, for the table and the tests.

The budgets are those of `mmkernels.integrations.transformers.support_compare`. A model that has a loss is given labels,
so that loss and outputs are compared, and their gradients.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mmkernels.integrations.patching import deferred, patch
from mmkernels.integrations.transformers.support import NOTHING, Ways, outcome, quiet
from mmkernels.integrations.transformers.support_compare import Comparison, one_line
from mmkernels.testing.models import Family, Inputs

PATCHED_WAYS = ("greedy", "beam", "assisted")
"""Ways to generate whose steps differ most: one position a step, a cache that is reordered, several positions."""

IGNORED = -100
"""A label that takes no part in a loss."""


@dataclass(frozen=True)
class Patched(Ways):
    """Results for one family.

    Args:
        name: the family's name.
        modules: how many of the model's modules were changed, by the op that they run on.
        forward, gradients, generation: as those of `mmkernels.integrations.transformers.support.Support`.
        loss: a loss was among what was compared.
        refused: why `patch` changed nothing, or "".
    """

    name: str
    modules: dict[str, int] = field(default_factory=dict)
    forward: str = NOTHING
    gradients: str = NOTHING
    generation: dict[str, str] = field(default_factory=dict)
    loss: bool = False
    refused: str = ""

    @property
    def failures(self) -> dict[str, str]:
        """What is not equal, with the reason."""
        cells = {"forward": self.forward, "gradients": self.gradients} | self.generation
        return {name: cell.removeprefix("no: ") for name, cell in cells.items() if cell.startswith("no: ")}


def check_patched(family: Family, compare: Comparison | None = None, ways: Collection[str] = PATCHED_WAYS) -> Patched:
    """Runs a family before and after `mmkernels.patch`, and compares.

    Args:
        compare: of this family; None: a new one.
        ways: to generate, of `mmkernels.integrations.transformers.support_compare.WAYS`.
    """
    with quiet(), _every_logit_deferred():
        compare = compare or Comparison(family)
        row = Patched(family.name)
        model = compare.unpatched()
        try:
            report = patch(model, verbose=False)
        except ValueError as error:
            return replace(row, refused=one_line(error))
        except Exception as error:
            return replace(row, forward=f"no: {one_line(error)}")
        row = replace(row, modules=report.ops)
        if not report.ops:
            return replace(row, refused="nothing in it is mmkernels' to replace")
        compare, plain = _with_loss(compare), compare
        after, generating = compare.with_patched(model), plain.with_patched(model)
        return replace(
            row,
            loss="loss" in compare.truth.outputs,
            forward=outcome(after.forward),
            gradients=outcome(after.gradients),
            generation={way: outcome(generating.generation, way) for way in ways} if model.can_generate() else {},
        )


@contextmanager
def _every_logit_deferred() -> Iterator[None]:
    """Lets the losses of models as small as these run on mmkernels too, where it is slower."""
    before, deferred.LEAST_LOGITS = deferred.LEAST_LOGITS, 0
    try:
        yield
    finally:
        deferred.LEAST_LOGITS = before


def _with_loss(compare: Comparison) -> Comparison:
    """Returns the comparison on inputs with labels, or as it is if the model takes none."""
    more = labels_for(compare.model, compare.inputs)
    if more:
        with suppress(Exception):
            labelled = compare.with_inputs(compare.inputs | more)
            if bool(labelled.truth.outputs["loss"].isfinite()):
                return labelled
    return compare


def labels_for(model: Any, inputs: Inputs) -> Inputs:
    """Returns what a model's forward pass takes beside these inputs to compute a loss; empty: it has none.

    The labels are the tokens themselves. Padding, the token behind it and every third token are ignored.
    """
    takes = inspect.signature(model.forward).parameters
    if "return_loss" in takes:
        return {"return_loss": True}
    name = "decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids"
    ids = inputs.get(name)
    if "labels" not in takes or not isinstance(ids, Tensor) or ids.dim() != 2:
        return {}
    shown = torch.arange(ids.shape[1]) % 3 > 0
    mask = inputs.get(name.replace("input_ids", "attention_mask"))
    if isinstance(mask, Tensor) and mask.shape == ids.shape:
        before = torch.nn.functional.pad(mask.bool(), (1, 0))[:, :-1]
        shown = shown & mask.bool() & before  # what a model predicts at padding is arbitrary
    return {"labels": torch.where(shown, ids, IGNORED)}
