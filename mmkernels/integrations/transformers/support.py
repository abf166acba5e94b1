"""Runs a model family to find out whether ``"mmkernels"`` supports it: `check`, for the table and the tests."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import transformers

from mmkernels.integrations.transformers.registration import NAME, register
from mmkernels.integrations.transformers.support_compare import (
    WAYS,
    Comparison,
    NotEqual,
    NotOffered,
    one_line,
)
from mmkernels.integrations.transformers.support_trace import Trace, trace
from mmkernels.testing.models import Family

YES, NOTHING = "yes", "-"
BUILT_ONLY = "no: called where the model is built with it, but not where it is set"
NOT_SET = "transformers does not let set_attn_implementation change all of it: give the name when it is loaded"
"""What to say of a model of which a part keeps the attention that it is built with, whatever is set."""


class Ways:
    """What the cells of a row say of generation."""

    generation: dict[str, str]

    @property
    def not_offered(self) -> dict[str, str]:
        """Ways to generate that this model does not support on transformers' own attention either, with the reason."""
        start = "not offered: "
        return {way: cell.removeprefix(start) for way, cell in self.generation.items() if cell.startswith(start)}

    @property
    def equal(self) -> list[str]:
        """Ways to generate that gave the same tokens."""
        return [way for way, cell in self.generation.items() if cell == YES]


@dataclass(frozen=True)
class Support(Ways):
    """Results for one family.

    Args:
        name: the family's name.
        model: the model's class.
        trace: what one forward pass did.
        forward, gradients: `YES`, or "no: " and the reason; `NOTHING` if nothing was compared.
        loading: the same for ``from_pretrained`` and ``_from_config`` with ``attn_implementation="mmkernels"``.
        generation: the same for each of `WAYS`, or "not offered: " and why transformers' own attention does not support
            it; empty for a model that does not generate.
        refused: why nothing was compared, or "".
        built: a model was built for each implementation, because transformers lets none be set.
    """

    name: str
    model: str
    trace: Trace = field(default_factory=Trace)
    forward: str = NOTHING
    gradients: str = NOTHING
    loading: str = NOTHING
    generation: dict[str, str] = field(default_factory=dict)
    refused: str = ""
    built: bool = False

    @property
    def failures(self) -> dict[str, str]:
        """What is not equal, with the reason."""
        cells = {"forward": self.forward, "gradients": self.gradients, "loading": self.loading} | self.generation
        return {name: cell.removeprefix("no: ") for name, cell in cells.items() if cell.startswith("no: ")}


def check(family: Family, compare: Comparison | None = None, ways: Collection[str] = WAYS) -> Support:
    """Runs a family on ``"mmkernels"`` and on transformers' own attention, and compares.

    A family is refused if the attention function lacks something that it needs, or if no module calls the function,
    neither where it is set nor where the model is built with it. If more modules call it in a model that is built with
    it, and go on to do so where "eager" is set, transformers does not let them be set: built models are compared.

    Args:
        compare: of this family; None: a new one. Its truth and baseline are kept for later checks.
        ways: to generate.
    """
    register()
    with quiet():
        compare = compare or Comparison(family)
        model, inputs = compare.model, compare.inputs
        row = Support(family.name, type(model).__name__)
        model.set_attn_implementation(NAME)
        try:
            row = replace(row, trace=trace(model, inputs))
        except NotImplementedError as error:
            return replace(row, refused=one_line(error))
        except Exception as error:
            return replace(row, forward=_no(error))
        row = replace(row, built=_keeps_attention(compare, row.trace.calls.total))
        if row.built:
            compare = compare.by_building
            row = replace(row, trace=trace(compare.on(NAME), inputs))
        elif not row.trace.inside:
            return _uncalled(row, compare)
        return replace(
            row,
            forward=outcome(compare.forward),
            gradients=outcome(compare.gradients),
            loading=outcome(compare.loading),
            generation={way: outcome(compare.generation, way) for way in ways} if model.can_generate() else {},
        )


def _keeps_attention(compare: Comparison, calls: int) -> bool:
    """Returns whether more than these calls are made where the model is built, and "eager" can't be set there.

    Before transformers 5.20 parts of parts keep their attention, and parts that have a copy of the configuration (T5).
    """
    with suppress(Exception):  # `Comparison.loading` tells of a model that can't be built
        built = compare.built(NAME)
        if compare.counted(built)[1] > calls:
            built.set_attn_implementation("eager")
            return compare.counted(built)[1] > 0
    return False


def _uncalled(row: Support, compare: Comparison) -> Support:
    """Returns the row of a model that does not call ``"mmkernels"`` after it was set, by building the model with it."""
    model = compare.model
    own = f"transformers keeps its own attention, {model.config._attn_implementation}, where it is set"
    try:
        outputs, calls = compare.counted(compare.built(NAME))
    except NotImplementedError as error:
        return replace(row, refused=f"{own}; built with it: {one_line(error)}")
    if calls:
        return replace(row, forward=BUILT_ONLY)
    for name, expected in compare.counted(model)[0].items():
        if not torch.equal(outputs[name], expected):
            return replace(row, forward=f"no: {name} changes where the model is built with it")
    return replace(row, refused=f"{own}, and where the model is built with it")


def outcome(compare: Callable[..., None], *args: Any) -> str:
    """Returns the cell of a comparison. An exception becomes a cell too, so that the table is completed."""
    try:
        compare(*args)
    except NotEqual as error:
        return f"no: {error}"
    except NotOffered as error:
        return f"not offered: {error}"
    except Exception as error:
        return _no(error)
    return YES


def _no(error: Exception) -> str:
    return f"no: {one_line(error)}"


@contextmanager
def quiet() -> Iterator[None]:
    """Silences transformers: warnings about tiny models and classes that refuse an implementation, progress bars."""
    before = transformers.logging.get_verbosity()
    had_bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity(logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(before)
        if had_bars:
            transformers.logging.enable_progress_bar()
