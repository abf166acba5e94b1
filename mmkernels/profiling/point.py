"""One number of visual tokens, or one reducer: measures every stage, backend and pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor

from mmkernels.meters import peak_memory, time_alternating
from mmkernels.profiling.adapter import Adapter, ReducingAdapter, Reduction, Stage
from mmkernels.profiling.options import Options, Row, baseline_of, name_of, title_of
from mmkernels.runtime.dispatch import use_backend
from mmkernels.runtime.eager import stub_ops

REMOVED = "removed"
"""The candidate in which every op returns zeros at once: its time is the Amdahl bound."""

_BUDGET = 1.0  # seconds of counted rounds for one stage, all candidates together
_LEAST_ROUNDS = 3
_LIMIT = 6.0  # seconds after which one round is enough, on a slow or busy machine

Cell = dict[str, Any]


@dataclass(frozen=True)
class Exact:
    """The outputs from which drift is measured, float32; None: there are none.

    Args:
        same: in the dtype that is profiled.
        wide: in float32, where another dtype is profiled.
    """

    same: Tensor | None
    wide: Tensor | None


def steps_of_point(options: Options, adapter: Adapter) -> int:
    """Returns how often `measure_point` reports progress."""
    memory, stages = len(options.backends), len(adapter.stages)
    return 1 + memory + stages + (memory + 1) * options.train


@dataclass(frozen=True)
class Point:
    """What `measure_point` finds.

    Args:
        cells: the results of each backend, all on the same weights and inputs.
        reduction: what the reducer makes of the first image, where the row is one.
        exact: that of later rows, where all rows are compared with the first.
    """

    cells: list[Cell]
    reduction: Reduction | None
    exact: Exact


def measure_point(
    adapter: Adapter,
    options: Options,
    row: Row,
    photos: list[Image.Image],
    progress: Callable[[str], None],
    exact: Exact | None = None,
) -> Point:
    """Measures one row of the profile.

    Args:
        exact: what drift is measured from; None: this row's own naive outputs, or for a reducer, without them, those of
            the first backend.
    """
    return _Measurement(adapter, options, row, photos, progress, exact).measure()


@contextmanager
def running_as(candidate: str) -> Iterator[None]:
    """Runs every op as this candidate does: "fused" (the automatic choice), a forced backend, or `REMOVED`."""
    with ExitStack() as stack:
        if candidate == REMOVED:  # by the automatic choice: "reference" would not pass the op boundary
            stack.enter_context(stub_ops())
        stack.enter_context(use_backend("" if candidate in ("fused", REMOVED) else candidate))
        yield


class _Measurement:
    def __init__(
        self,
        adapter: Adapter,
        options: Options,
        row: Row,
        photos: list[Image.Image],
        progress: Callable[[str], None],
        exact: Exact | None,
    ) -> None:
        self.adapter, self.options, self.exact = adapter, options, exact
        self.device = torch.device(options.device)
        self.progress = lambda what: progress(f"{title_of(row)}: {what}")
        self.progress("weights, inputs, warm-up")
        self.model: Any = adapter.build(options, row).to(self.device)
        self.wide = None
        if exact is None and options.torch_dtype != torch.float32 and "reference" in options.backends:
            self.wide = self._logits("reference", adapter.inputs(options, self.model, photos))
        self.model.to(options.torch_dtype)
        self.inputs = adapter.inputs(options, self.model, photos)
        self.reduction: Reduction | None = None
        if isinstance(row, int):
            tokens = row
        else:
            with torch.inference_mode():
                self.reduction = cast(ReducingAdapter, adapter).reduction(self.model, self.inputs)
            tokens = self.reduction.tokens
        self.cells: dict[str, Cell] = {
            backend: {
                "reducer": None if isinstance(row, int) else row,
                "tokens_per_image": tokens,
                "visual_tokens": tokens * options.images,
                "backend": backend,
                "failed": None,
                "seconds": {},
                "samples_seconds": {},
                "peak_memory_bytes": None,
                "train_peak_memory_bytes": None,
                "drift": None,
                "amdahl": {},
            }
            for backend in options.backends
        }
        self.seconds = {backend: cell["seconds"] for backend, cell in self.cells.items()} | {REMOVED: {}}

    def measure(self) -> Point:
        exact = self._measure_drift()  # first, as it also warms up every backend
        with torch.inference_mode():
            for backend in self._able():
                self.progress(f"peak memory, {name_of(backend)}")
                self.cells[backend]["peak_memory_bytes"] = self._peak(backend, self._whole)
            self._time_stages()
        if self.options.train:
            self._measure_training()
        for backend, cell in self.cells.items():
            cell["amdahl"] = self._amdahl(backend)
        return Point(list(self.cells.values()), self.reduction, exact)

    def _able(self) -> list[str]:
        """Returns the backends that have not run out of memory."""
        return [backend for backend, cell in self.cells.items() if cell["failed"] is None]

    def _peak(self, backend: str, run: Callable[[], Any]) -> int | None:
        with running_as(backend):
            return peak_memory(run, self.device)

    def _whole(self) -> None:
        state = None
        for stage in self.adapter.stages:
            state = stage.run(self.model, self.inputs, state)

    # The output.

    def _logits(self, backend: str, inputs: Any) -> Tensor | None:
        """Returns the whole model's scores in float32; None: there is not enough memory."""
        logits = []
        with torch.inference_mode(), running_as(backend):
            fits = self._fits(lambda: logits.append(self.adapter.logits(self.model, inputs).float()))
        return logits[0] if fits else None

    def _measure_drift(self) -> Exact:
        """Returns what drift was measured from."""
        outputs = {backend: self._logits(backend, self.inputs) for backend in self.cells}
        baseline = baseline_of(self.options.backends, reducing=self.reduction is not None)
        exact = self.exact or Exact(outputs.get(baseline), self.wide)
        learned = self.reduction is not None and self.reduction.learned
        for backend, logits in outputs.items():
            cell = self.cells[backend]
            if logits is None:
                cell["failed"] = "out of memory"
                continue
            drift: dict[str, float] = {}
            if exact.same is not None:
                drift |= {"relative_l2": distance(logits, exact.same), "top1_agreement": agreement(logits, exact.same)}
            if exact.wide is not None:
                drift |= {
                    "relative_l2_to_fp32": distance(logits, exact.wide),
                    "top1_agreement_with_fp32": agreement(logits, exact.wide),
                }
            cell["drift"] = None if learned else drift or None
        return exact

    # Time.

    def _time_stages(self) -> None:
        states: dict[str, Any] = dict.fromkeys([*self._able(), REMOVED])
        for stage in self.adapter.stages:
            self.progress(f"time to {stage.name}")
            states = self._time_stage(stage, states)
        for candidate in states:
            seconds = self.seconds[candidate]
            seconds["total"] = sum(seconds[stage.name] for stage in self.adapter.stages if stage.calls == 1)

    def _time_stage(self, stage: Stage, begins: dict[str, Any]) -> dict[str, Any]:
        """Returns the states that the candidates are in afterwards."""
        forks, ends = dict(begins), dict(begins)

        def fork(candidate: str) -> None:
            forks[candidate] = stage.fork(begins[candidate])

        def run(candidate: str) -> None:
            with running_as(candidate):
                ends[candidate] = stage.run(self.model, self.inputs, forks[candidate])

        runs = {candidate: partial(run, candidate) for candidate in begins}
        self._time(stage.name, runs, {candidate: partial(fork, candidate) for candidate in begins}, stage.calls)
        return ends

    def _time(
        self,
        name: str,
        candidates: Mapping[str, Callable[[], Any]],
        before: Mapping[str, Callable[[], Any]],
        calls: int = 1,
    ) -> None:
        """Times the candidates without a warm-up: all but `REMOVED` have run for the drift and the peak memory."""
        timings = time_alternating(
            candidates,
            before=before,
            budget=_BUDGET,
            least=_LEAST_ROUNDS,
            limit=_LIMIT,
            warm=True,
            device=self.device,
        )
        for candidate, timing in timings.items():
            one = timing.per(calls)
            self.seconds[candidate][name] = one.seconds
            if candidate in self.cells:
                self.cells[candidate]["samples_seconds"][name] = list(one.samples)

    def _measure_training(self) -> None:
        """Measures a step's peak memory and time, gradients included, without the optimiser's update."""

        def clear() -> None:
            self.model.zero_grad(set_to_none=True)

        def step(candidate: str) -> None:
            with running_as(candidate):
                self.adapter.loss(self.model, self.inputs).backward()

        steps = {REMOVED: partial(step, REMOVED)}
        for backend in self._able():
            self.progress(f"training step's peak memory, {name_of(backend)}")
            fits = self._fits(partial(step, backend))
            clear()
            if fits:
                steps[backend] = partial(step, backend)
                self.cells[backend]["train_peak_memory_bytes"] = self._peak(backend, steps[backend])
                clear()
        self.progress("time of a training step")
        self._time("train_step", steps, dict.fromkeys(steps, clear))
        clear()

    @staticmethod
    def _fits(run: Callable[[], Any]) -> bool:
        """Runs; returns whether the memory was enough."""
        try:
            run()
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            return False
        return True

    def _amdahl(self, backend: str) -> dict[str, dict[str, float]]:
        """Returns `amdahl` by what was timed."""
        if "reference" not in self.cells or backend == "reference":
            return {}
        naive, ours, removed = (self.seconds[name] for name in ("reference", backend, REMOVED))
        return {name: amdahl(naive[name], ours[name], removed[name]) for name in removed if name in naive.keys() & ours}


def amdahl(reference: float, seconds: float, removed: float) -> dict[str, float]:
    """Returns the speed-up over the reference, its cap with the ops removed, and the share of the cap reached."""
    return {
        "removed_seconds": removed,
        "speedup": reference / seconds,
        "cap": reference / removed,
        "share_of_cap": removed / seconds,
    }


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def distance(logits: Tensor, exact: Tensor) -> float:
    """Returns the relative L2 distance: the drift of an output."""
    return float(torch.linalg.vector_norm(logits - exact) / torch.linalg.vector_norm(exact))


def agreement(logits: Tensor, exact: Tensor) -> float:
    """Returns the share of rows whose largest score is at the same place."""
    return float((logits.argmax(-1) == exact.argmax(-1)).float().mean())
