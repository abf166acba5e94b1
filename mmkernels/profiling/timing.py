"""Times of rows of a profile: those that are measured together take turns, so that other load affects all alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch

from mmkernels.meters import time_alternating
from mmkernels.profiling.adapter import Adapter, Stage
from mmkernels.profiling.options import Row, Settings, name_of
from mmkernels.profiling.point import NAIVE_LOSS, REMOVED, Point, amdahl, fits, running_as

_BUDGET = 1.0  # seconds of counted rounds for one stage of one row, all candidates together
_LEAST_ROUNDS = 3
_ROUNDS_TOGETHER = 5  # of rows that are compared with each other: reducers differ by less than backends
_LIMIT = 6.0  # seconds after which one round is enough, on a slow or busy machine

Candidate = tuple[Point, str]
"""A row, and what runs its ops: see `running_as`."""


def steps_of_rows(options: Settings, adapter: Adapter[Any], rows: int) -> int:
    """Returns how often `measure_rows` reports progress."""
    backends = options.backends or ()
    memory = len(backends)
    naive_loss = options.train and adapter.naive_loss is not None and "fused" in backends
    return rows * (1 + memory * (1 + options.train) + naive_loss) + len(adapter.stages) + options.train


def measure_rows(
    adapter: Adapter[Any],
    options: Settings,
    rows: tuple[Row, ...],
    sources: list[Any],
    progress: Callable[[str], None],
) -> Iterator[list[Point]]:
    """Measures rows together, and yields them at the end; several also before, after each row and each stage.

    Their times come last, stage by stage: `Point.prepare` measures the rest.
    """
    points: list[Point] = []
    for row in rows:
        points.append(Point(adapter, options, row, sources, progress, points))
        points[-1].prepare()
        if len(rows) > 1:
            yield points
    if len(rows) == 1:
        progress = points[0].progress
    for _ in _time_stages(adapter, points, progress):
        if len(rows) > 1:
            yield points
    if options.train:
        _measure_training(adapter, points, progress)
    for point in points:
        for backend, cell in point.cells.items():
            cell["amdahl"] = _amdahl(point, backend)
    yield points


def _time_stages(adapter: Adapter[Any], points: list[Point], progress: Callable[[str], None]) -> Iterator[None]:
    """Yields after each stage."""
    candidates = [(point, name) for point in points for name in [*point.able(), *_removed(point)]]
    states: dict[Candidate, Any] = dict.fromkeys(candidates)
    for stage in adapter.stages:
        progress(f"time to {stage.name}")
        with torch.inference_mode():
            states = _time_stage(stage, states)
        yield
    for point, candidate in candidates:
        seconds = point.seconds[candidate]
        seconds["total"] = sum(seconds[stage.name] for stage in adapter.stages if stage.calls == 1)


def _time_stage(stage: Stage, begins: dict[Candidate, Any]) -> dict[Candidate, Any]:
    """Returns the states that the candidates are in afterwards."""
    leaders = {candidate: _leader(stage, candidate, begins) for candidate in begins}
    forks, ends = dict(begins), dict(begins)

    def fork(candidate: Candidate) -> None:
        forks[candidate] = stage.fork(begins[candidate])

    def run(candidate: Candidate) -> None:
        point, name = candidate
        with running_as(name):
            ends[candidate] = stage.run(point.model, point.inputs, forks[candidate])

    runs = {candidate: partial(run, candidate) for candidate in dict.fromkeys(leaders.values())}
    _time(stage.name, runs, {candidate: partial(fork, candidate) for candidate in runs}, stage.calls)
    for (point, name), leader in leaders.items():
        ends[point, name] = ends[leader]
        point.seconds[name][stage.name] = leader[0].seconds[name][stage.name]
        if name in point.cells:
            samples = leader[0].cells[name]["samples_seconds"][stage.name]
            point.cells[name]["samples_seconds"][stage.name] = list(samples)
    return ends


def _leader(stage: Stage, candidate: Candidate, candidates: Iterable[Candidate]) -> Candidate:
    """Returns the candidate that is timed in place of one: the first with the same work in a shared stage."""
    point, name = candidate
    alike = (other for other in candidates if other[1] == name and other[0].inputs is point.inputs)
    return next(alike) if stage.shared else candidate


def _time(
    name: str,
    candidates: Mapping[Candidate, Callable[[], Any]],
    before: Mapping[Candidate, Callable[[], Any]],
    calls: int = 1,
) -> None:
    """Times the candidates without a warm-up: all but `REMOVED` have run for the drift and the peak memory."""
    points = dict.fromkeys(point for point, _ in candidates)
    timings = time_alternating(
        candidates,
        before=before,
        budget=_BUDGET * len(points),
        least=_LEAST_ROUNDS if len(points) == 1 else _ROUNDS_TOGETHER,
        limit=_LIMIT * len(points),
        warm=True,
        device=next(iter(points)).device,
    )
    for (point, candidate), timing in timings.items():
        one = timing.per(calls)
        point.seconds[candidate][name] = one.seconds
        if candidate in point.cells:
            point.cells[candidate]["samples_seconds"][name] = list(one.samples)


def _measure_training(adapter: Adapter[Any], points: list[Point], progress: Callable[[str], None]) -> None:
    """Measures a step's peak memory and time, gradients included, without the optimiser's update."""

    def clear(point: Point) -> None:
        point.model.zero_grad(set_to_none=True)

    def step(point: Point, candidate: str) -> None:
        loss = adapter.naive_loss if candidate == NAIVE_LOSS else adapter.loss
        assert loss is not None
        with running_as(candidate):
            loss(point.model, point.inputs).backward()

    steps: dict[Candidate, Callable[[], None]] = {}
    for point in points:
        for candidate in point.trainable():
            point.progress(f"training step's peak memory, {name_of(candidate)}")
            enough = fits(partial(step, point, candidate))
            clear(point)
            if enough:
                steps[point, candidate] = run = partial(step, point, candidate)
                cell = point.seconds[candidate] if candidate == NAIVE_LOSS else point.cells[candidate]
                cell["train_peak_memory_bytes"] = point.peak(candidate, run)
                clear(point)
        for candidate in _removed(point):
            steps[point, candidate] = partial(step, point, candidate)
    progress("time of a training step")
    _time("train_step", steps, {candidate: partial(clear, candidate[0]) for candidate in steps})
    for point in points:
        clear(point)


def _removed(point: Point) -> list[str]:
    """Returns the candidate that bounds the speed-up over the naive baseline, where there is such a baseline."""
    return [REMOVED] if "reference" in point.cells else []


def _amdahl(point: Point, backend: str) -> dict[str, dict[str, float]]:
    """Returns `amdahl` by what was timed."""
    if "reference" not in point.cells or backend == "reference":
        return {}
    naive, ours, removed = (point.seconds[name] for name in ("reference", backend, REMOVED))
    return {name: amdahl(naive[name], ours[name], removed[name]) for name in removed if name in naive.keys() & ours}
