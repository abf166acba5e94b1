"""Model types of transformers on ``"mmkernels"``, small by rule: `check_class` for one, `sweep` for many, guarded."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import GenerationMixin, PreTrainedModel  # imported here, once for all processes
from transformers.models.auto import modeling_auto

from mmkernels.integrations.transformers.support import NOT_SET, NOTHING, YES, Support, check, outcome, quiet
from mmkernels.integrations.transformers.support_compare import Comparison, one_line
from mmkernels.integrations.transformers.support_patched import Patched, check_patched
from mmkernels.integrations.transformers.support_speed import measure
from mmkernels.options import BadInput
from mmkernels.testing.any_inputs import PADDINGS, can_pad, candidates, padded
from mmkernels.testing.models import Family, Inputs, seeded
from mmkernels.testing.shrink import shrink

EQUAL, DIFFERS, REFUSED, NO_ATTENTION = "equal", "differs", "refused", "no attention"
NOT_BUILT, EAGER_FAILS, ENDED = "not built", "eager fails", "ended"
RESULTS = {
    EQUAL: "everything that was compared is equal",
    DIFFERS: "something is not equal",
    REFUSED: "`NotImplementedError`, or the model keeps its own attention; the note says why",
    NO_ATTENTION: "no module is an attention, so that there is nothing to run on mmkernels",
    NOT_BUILT: "the rule makes no configuration that the class takes, or packages are missing",
    EAGER_FAILS: "the class does not run on transformers' own attention with the inputs of the rule",
    ENDED: "the check took too long, too much memory, or ended the process",
}
"""What can be found, and what it means."""

SECONDS = 180.0
MEMORY = 6 * 2**30
PARAMETERS = 20_000_000
"""A class is given up beyond these: seconds, bytes of address space that it adds, parameters."""

MEASURED = 6
"""How much larger a model is that is measured: 384 channels, 72 tokens, as CLIP reads at most 77."""

_MAPPINGS = ("SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "IMAGE_TEXT_TO_TEXT", "CAUSAL_LM")
"""Kinds of classes that generate, in the order of preference; a model type without one is tried by its base class."""


@dataclass(frozen=True)
class Row:
    """What was found for one class: `result` is a key of `RESULTS`, the cells are as those of `Support`.

    Args:
        calls, syncs: calls and waits a layer, see `Trace`; `NOTHING` if the class did not run on ``"mmkernels"``.
        patched: the ops that it runs on after `mmkernels.patch`; `NOTHING` if there is nothing to replace.
        patched_forward, patched_gradients, patched_generation: as the cells of `Patched`.
        speed, memory: of a larger model after `mmkernels.patch` against before; `NOTHING` if it was not measured.
    """

    model_type: str
    model: str
    result: str
    forward: str = NOTHING
    gradients: str = NOTHING
    loading: str = NOTHING
    left: str = NOTHING
    right: str = NOTHING
    generation: str = NOTHING
    calls: str = NOTHING
    syncs: str = NOTHING
    patched: str = NOTHING
    patched_forward: str = NOTHING
    patched_gradients: str = NOTHING
    patched_generation: str = NOTHING
    speed: str = NOTHING
    memory: str = NOTHING
    note: str = ""


def model_types(names: Sequence[str] = ()) -> list[tuple[str, str]]:
    """Returns the installed model types, or those named, with the class by which each is tried, sorted.

    Raises:
        BadInput: there is no such model type.
    """
    chosen: dict[str, str] = {}
    for kind in (*(f"MODEL_FOR_{kind}" for kind in _MAPPINGS), "MODEL"):
        for model_type, classes in getattr(modeling_auto, f"{kind}_MAPPING_NAMES").items():
            chosen.setdefault(model_type, classes if isinstance(classes, str) else classes[0])
    for name in names:
        if name not in chosen:
            raise BadInput(f"model type must be one that transformers {transformers.__version__} has, got {name!r}")
    return sorted((name, chosen[name]) for name in names or chosen)


def check_class(model_type: str, name: str) -> Row:
    """Builds a class by rule and compares it, in this process."""
    row = Row(model_type, name, NOT_BUILT)
    with quiet(), torch.random.fork_rng(devices=()):
        try:
            family = family_by_rule(name)
            model, _ = family.build()
        except Exception as error:
            return replace(row, note=one_line(error))
        parameters = sum(p.numel() for p in model.parameters())
        if parameters > PARAMETERS:
            return replace(row, note=f"{parameters / 1e6:,.0f} million parameters by the rule")
        try:
            inputs = _accepted_inputs(model)
            compare = Comparison(replace(family, draw_inputs=lambda: inputs))
            _check_finite(compare)
        except Exception as error:
            return replace(row, result=EAGER_FAILS, note=one_line(error))
        return _compared(row, compare)


def measure_class(model_type: str, name: str) -> Row:
    """Builds a class by rule, compares it, and measures a larger one, in this process."""
    row = check_class(model_type, name)
    if row.patched == NOTHING:
        return row
    with quiet(), torch.random.fork_rng(devices=()):
        try:
            model, _ = family_by_rule(name, MEASURED).build()
            inputs = _accepted_inputs(model, MEASURED)
            model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
            found = measure(model, inputs)
        except Exception as error:
            return replace(row, note="; ".join(filter(None, (row.note, f"not measured: {one_line(error)}"))))
    memory = NOTHING if found.memory is None else f"{found.memory:.2f}"
    return replace(row, speed=f"{found.forward:.2f}, {found.step:.2f}", memory=memory)


def family_by_rule(name: str, times: int = 1) -> Family:
    """Returns a class with a small configuration, or one with larger sizes; its inputs are found by trying."""
    model_class: type[PreTrainedModel] = getattr(transformers, name)
    assert model_class.config_class is not None
    config = shrink(model_class.config_class().to_dict(), times) | {
        "experts_implementation": "eager"
    }  # others lack float64
    return Family(name, name, config, dict, only_forward=("decoder_input_ids",))


def _accepted_inputs(model: Any, times: int = 1) -> Inputs:
    """Returns the first inputs that a model takes on "eager".

    Raises:
        Exception: what the model raised for the first ones.
    """
    model.set_attn_implementation("eager")
    first: Exception | None = None
    with seeded(0):
        tried = list(candidates(model, times))
    for inputs in tried:
        try:
            with torch.no_grad(), seeded(1):
                model(**inputs)
            return inputs
        except Exception as error:
            first = first or error
    raise first or ValueError("the rule has no inputs for this class")


def _check_finite(compare: Comparison) -> None:
    """Computes truth and baseline.

    Raises:
        ValueError: there is nothing to compare.
    """
    outputs = compare.truth.outputs
    if not outputs or not compare.truth.grads or not compare.baseline:
        raise ValueError("no output or gradient to compare")
    for name, x in outputs.items():
        if not bool(x.isfinite().all()):
            raise ValueError(f"{name} is not finite")


def _compared(row: Row, compare: Comparison) -> Row:
    """Returns the row of a class as it is set to ``"mmkernels"``, and of what `mmkernels.patch` makes of it."""
    found = _compared_on_attention(row, compare)
    after = check_patched(compare.family, compare, ways=("greedy",))
    notes = [note for note in (found.note, *_notes_patched(after)) if note]
    result = DIFFERS if after.failures else found.result
    return replace(found, result=result, note="; ".join(notes), **_cells_patched(after))


def _cells_patched(after: Patched) -> dict[str, str]:
    cells = _short({"forward": after.forward, "gradients": after.gradients, **after.generation})
    return {
        "patched": ", ".join(after.modules) or NOTHING,
        "patched_forward": cells["forward"],
        "patched_gradients": cells["gradients"],
        "patched_generation": cells.get("greedy", NOTHING),
    }


def _notes_patched(after: Patched) -> Iterator[str]:
    for name, reason in after.failures.items():
        yield f"patched {name}: {reason}"


def _compared_on_attention(row: Row, compare: Comparison) -> Row:
    support = check(compare.family, compare, ways=())
    if support.refused:
        some = any("Attention" in type(module).__name__ for module in compare.model.modules())
        note = support.refused.partition("; use")[0] if some else ""
        return replace(row, result=REFUSED if some else NO_ATTENTION, note=note)
    if support.trace.inside:
        row = replace(row, calls=str(support.trace.calls_a_layer), syncs=str(support.trace.syncs_a_layer))
    cells = {"forward": support.forward, "gradients": support.gradients, "loading": support.loading}
    remarks = list[str]()
    unpadded = compare.inputs
    if support.built:
        compare = compare.by_building
        remarks.append(NOT_SET)
    if support.forward == YES:
        if can_pad(compare.model, unpadded):
            cells |= {side: _on_padding(compare.with_inputs(padded(unpadded, side))) for side in PADDINGS}
        if isinstance(compare.model, GenerationMixin):
            side = "left" if cells.get("left") == YES else ""
            cells["generation"] = outcome(
                (compare.with_inputs(padded(unpadded, side)) if side else compare).generation, "greedy"
            )
    notes = [f"{name}: {cell.removeprefix('no: ')}" for name, cell in cells.items() if cell.startswith("no: ")]
    refused = all("NotImplementedError" in note for note in notes)
    result = EQUAL if not notes else REFUSED if refused else DIFFERS
    return replace(row, result=result, note="; ".join([*notes, *remarks, *_remarks(support, cells)]), **_short(cells))


def _on_padding(compare: Comparison) -> str:
    """Returns the cell of forward and gradients on padded inputs."""
    try:
        _check_finite(compare)
    except Exception as error:
        return f"not offered: {one_line(error)}"
    forward = outcome(compare.forward)
    return forward if forward != YES else outcome(compare.gradients)


def _remarks(support: Support, cells: dict[str, str]) -> Iterator[str]:
    if support.trace.outside:
        yield f"modules with an attention of their own: {', '.join(sorted(support.trace.outside))}"
    for name, cell in cells.items():
        if cell.startswith("not offered: "):
            yield f"{name}, on transformers' own attention too: {cell.removeprefix('not offered: ')}"


def _short(cells: dict[str, str]) -> dict[str, str]:
    """Returns the cells without their reasons."""
    return {
        name: "no" if cell.startswith("no: ") else NOTHING if cell.startswith("not offered: ") else cell
        for name, cell in cells.items()
    }


# Many classes, each in a process of its own.


@dataclass
class _Running:
    row: Row
    process: BaseProcess
    results: Connection
    started: float

    def ended(self, seconds: float) -> Row | None:
        """Returns the row of a class whose process has answered, ended or run out of time; None: it still works."""
        if self.results.poll():
            try:
                return Row(**self.results.recv())
            except EOFError:
                self.process.join()
                code = self.process.exitcode
                return replace(self.row, note=f"the process ended with exit code {code}, for example out of memory")
        if time.monotonic() - self.started > seconds:
            return replace(self.row, note=f"took more than {seconds:.0f} seconds")
        return None

    def stop(self, patience: float = 0.0) -> None:
        """Ends the process; `patience`: seconds in which it may end by itself."""
        self.process.join(patience)
        self.process.kill()
        self.process.join()
        self.results.close()


def sweep(
    chosen: Sequence[tuple[str, str]],
    advance: Callable[[str], None] = lambda name: None,
    *,
    workers: int | None = None,
    seconds: float = SECONDS,
    check: Callable[[str, str], Row] = check_class,
) -> Iterator[Row]:
    """Yields the row of each model type as it is found.

    Each class has a process of its own, so that one that hangs, crashes or takes too much memory is a row too. Those
    that run are ended when the caller leaves the loop.

    Args:
        chosen: model types and their classes, see `model_types`.
        advance: called with the model type before it is checked.
        workers: processes at once; None: one for each core.
        check: what runs in the process; it must be importable.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    waiting, running = list(reversed(chosen)), list[_Running]()
    try:
        while waiting or running:
            while waiting and len(running) < (workers or len(os.sched_getaffinity(0))):
                model_type, name = waiting.pop()
                advance(model_type)
                results, child_end = context.Pipe(duplex=False)
                process = context.Process(target=_run, args=(check, model_type, name, child_end), daemon=True)
                process.start()
                child_end.close()
                running.append(_Running(Row(model_type, name, ENDED), process, results, time.monotonic()))
            wait([one.results for one in running], timeout=1.0)
            for one in list(running):
                row = one.ended(seconds)
                if row is not None:
                    running.remove(one)
                    one.stop(patience=0.0 if row.result == ENDED else 5.0)
                    yield row
    finally:
        for one in running:
            one.stop()


def _run(check: Callable[[str, str], Row], model_type: str, name: str, results: Connection) -> None:
    """Checks one class in a process that prints nothing and leaves Ctrl-C to its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    with _silence(), _limited_memory():
        row = check(model_type, name)
    results.send(asdict(row))


@contextmanager
def _silence() -> Iterator[None]:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    yield


@contextmanager
def _limited_memory() -> Iterator[None]:
    sizes = Path("/proc/self/statm")
    if sizes.exists():
        taken = int(sizes.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, resource.RLIM_INFINITY))
    yield
