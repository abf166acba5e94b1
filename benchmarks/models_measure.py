"""Measures one row: a model of mmkernels, or transformers' on mmkernels' attention, beside transformers' on "sdpa".

All candidates alternate on the same weights and inputs; one of them is the subject without its ops, which bounds the
speed-up (Amdahl). A wrong result has no time.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple

import torch
from models_cases import Case
from models_clock import Clock
from models_pairs import Pair
from models_targets import NAIVE, SDPA, Found
from models_work import MAIN, Results
from torch import Tensor
from transformers_measure import rounded

from mmkernels.bench.rounds import Peaks, alternate
from mmkernels.integrations.transformers import NAME, register
from mmkernels.meters import memory_why_not, peak_memory
from mmkernels.options import DTYPES
from mmkernels.profiling.point import REMOVED, amdahl, distance, running_as
from mmkernels.targets import OURS
from mmkernels.testing.models import Inputs, seeded

FLOOR = {"fp32": 2e-5, "bf16": 2e-3, "fp16": 5e-4}
"""The relative L2 distance from the truth that is allowed beside twice sdpa's; of fp32 sdpa itself is the truth."""

_BUDGET = 70.0  # seconds of a row's rounds, all candidates together
_ENOUGH = 10.0  # and those after which five rounds are enough
_QUICK_BUDGET = 5.0
_LEAST, _MOST = 2, 5
_RUN_AS = {REMOVED: REMOVED, NAIVE: "reference"}  # as of `running_as`


@dataclass(frozen=True, repr=False)
class Row:
    """One row of the benchmark.

    Args:
        dtype: a name in `DTYPES`.
        compile_only: the subject runs once and nothing is measured.
        quick: one round may be enough.
    """

    case: Case
    dtype: str
    device: str = "cpu"
    compile_only: bool = False
    quick: bool = False

    def __str__(self) -> str:
        return f"{self.case.id}, {self.dtype}, {self.case.work.passes}"

    __repr__ = __str__


class Candidate(NamedTuple):
    """What is timed.

    Attributes:
        attention: of transformers' model; None: ours runs.
        inputs: the key of its inputs.
    """

    attention: str | None
    inputs: str = MAIN


class Trial:
    """Both models with their inputs, in one dtype at a time."""

    def __init__(self, row: Row) -> None:
        self.case, self.device, self.dtype = row.case, torch.device(row.device), torch.float32
        self.ours, self.theirs = _pair_of(row.case)
        for net in (self.ours, self.theirs):
            net.to(self.device).train(row.case.work.trains)
        with seeded(0):
            drawn = row.case.inputs(self.ours.config)
        self._inputs = {
            key: _map_tensors(inputs, lambda x: rounded(x, DTYPES[row.dtype])) for key, inputs in drawn.items()
        }
        subject = Candidate(None if row.case.subject == OURS else NAME)
        naive = {NAIVE: Candidate(None)} if row.case.baseline == NAIVE else {}
        self.candidates = {SDPA: Candidate(SDPA), **naive, REMOVED: subject, OURS: subject}
        self.candidates |= {key: Candidate(None, key) for key in drawn if key != MAIN}
        self.candidates |= {name: Candidate(name) for name in row.case.others}
        self._attention = ""
        self._begun: dict[Candidate, Any] = {}
        self._next: dict[str, Inputs] = {}
        self.to(DTYPES[row.dtype])

    def to(self, dtype: torch.dtype) -> None:
        """Converts the weights; buffers keep their precision, as in models that were loaded in `dtype`."""
        for net in (self.ours, self.theirs):
            for x in net.parameters():
                x.data = x.data.to(dtype)
        self.dtype = dtype
        self._begun.clear()

    def prepare(self, name: str) -> None:
        """Does what a run of a candidate needs and is not timed."""
        candidate, work = self.candidates[name], self.case.work
        net = self.ours if candidate.attention is None else self.theirs
        self.drop_gradients()
        if candidate.attention is not None and candidate.attention != self._attention:
            self.case.work.use_attention(self.theirs, candidate.attention)
            self._attention = candidate.attention
        inputs = self._converted(self._inputs[candidate.inputs], host_grids=candidate.attention is None)
        if candidate not in self._begun:
            self._begun[candidate] = work.begin(net, inputs)
        self._next = {name: work.resume(self._begun[candidate], inputs)}

    def run(self, name: str) -> Results:
        """Runs a candidate that is prepared."""
        candidate, work, inputs = self.candidates[name], self.case.work, self._next[name]
        with running_as(_RUN_AS.get(name, "fused")):
            return work.ours(self.ours, inputs) if candidate.attention is None else work.theirs(self.theirs, inputs)

    def results(self, name: str) -> Results:
        self.prepare(name)
        return tuple(x.detach() for x in self.run(name))

    @property
    def cache_share(self) -> float | None:
        """The bytes that a token takes in our cache, as `Work.cache_share` has it, of runs that began."""
        return self.case.work.cache_share(self.ours, self._begun.get(self.candidates[OURS]))

    def drop_gradients(self) -> None:
        """Removes the gradients of all parameters."""
        for net in (self.ours, self.theirs):
            net.zero_grad(set_to_none=True)

    def _converted(self, inputs: Inputs, host_grids: bool) -> Inputs:
        """Returns inputs on the device, in the dtype under test. Our models read grids on the host."""

        def converted(name: str, x: Any) -> Any:
            if isinstance(x, dict):
                return self._converted(x, host_grids)
            if not isinstance(x, Tensor) or (host_grids and name.endswith("_grid_thw")):
                return x
            return x.to(self.device, self.dtype if x.is_floating_point() else x.dtype)

        return {name: converted(name, x) for name, x in inputs.items()}


_last: dict[Callable[[], Pair], Pair] = {}


def _pair_of(case: Case) -> Pair:
    """Returns the models of a case: those of the row before, if they are the same. Their weights may be rounded."""
    if case.pair not in _last:
        _last.clear()  # there is not memory for both
        gc.collect()
        _last[case.pair] = case.pair()
    return _last[case.pair]


def _map_tensors(inputs: Inputs, function: Callable[[Tensor], Tensor]) -> Inputs:
    return {
        name: _map_tensors(x, function) if isinstance(x, dict) else function(x) if isinstance(x, Tensor) else x
        for name, x in inputs.items()
    }


def measure(benchmark: Any, row: Row) -> None:
    """Checks the subject, then times it beside transformers on "sdpa", into ``benchmark.extra_info``.

    Args:
        benchmark: pytest-benchmark's fixture.

    Raises:
        AssertionError: the result is wrong, or no attention of the subject runs on mmkernels.
    """
    register()
    with torch.set_grad_enabled(row.case.work.trains):
        trial = Trial(row)
        if row.compile_only:
            trial.results(OURS)
            return
        first = _FirstRuns(trial, row)
        first.check()
        benchmark.group = f"models, {row.dtype}, {row.case.work.passes}"
        seconds, attention, peaks = _time(benchmark, trial, row, first.seconds)
    found = Found(
        {name: median(times) for name, times in seconds.items()},
        {name: median(times) for name, times in attention.items()},
        first.memory,
        first.calls,
        row.case.work.layers(trial.ours.config),
        first.flops,
        peaks.flops,
        first.encoder_calls,
        first.bytes,
        peaks.bytes,
        trial.cache_share,
    )
    benchmark.extra_info |= _description(row, found, seconds, first)


class _FirstRuns:
    """The first run of sdpa, of the naive model where it is the baseline, and of the subject: results, peak memory, and
    the subject's attention calls.

    Attributes:
        results: of each.
        memory: of each the peak above model and inputs; of a training step what its forward pass keeps for the backward
            pass.
        seconds: of a run, the mean.
        calls, flops, bytes: of the subject's attention.
        sdpa_calls: of sdpa's.
        encoder_calls: of our image encoder.
        distances: of the results of each from the truth, the largest.
    """

    def __init__(self, trial: Trial, row: Row) -> None:
        self._trial, self._row = trial, row
        self.results: dict[str, list[Tensor]] = {}
        self.memory: dict[str, int | None] = {}
        self.distances: dict[str, list[float]] = {}
        self.seconds = 0.0
        clock = Clock(row.device)
        names = [name for name in (SDPA, NAIVE, *row.case.others, OURS) if name in trial.candidates]
        for name in names:
            trial.prepare(name)  # what it does once is not counted
            clock.clear()
            with clock.watching(), _counting_calls(row.case.work.encoder(trial.ours)) as encoder:
                self._run(name)
            if name == SDPA:
                self.sdpa_calls = clock.sdpa_calls
        self.seconds /= len(names)
        self.calls, self.flops, self.bytes = len(clock.calls), clock.flops(), clock.bytes()
        self.encoder_calls = len(encoder)

    def _run(self, name: str) -> None:
        trial = self._trial
        results: list[Tensor] = []
        trial.prepare(name)
        run = lambda: results.extend(x.detach() for x in trial.run(name))
        begin = time.perf_counter()
        if self._row.case.work.trains:
            with kept_for_backward((trial.ours, trial.theirs), trial.case.work.head_shape(trial.ours)) as memory:
                run()
            self.memory[name] = sum(memory.values())
        else:
            peak = peak_memory(run, trial.device)
            if peak is None:
                run()
            self.memory[name] = peak
        self.seconds += time.perf_counter() - begin
        trial.drop_gradients()
        self.results[name] = results

    def check(self) -> None:
        """Raises `AssertionError` unless the subject computes what transformers does.

        In 16 bits its distance from transformers' results in float32 may be twice that of transformers' own.
        """
        row, trial = self._row, self._trial
        assert self.calls or not row.case.work.attends, f"no attention call of {row} ran on mmkernels"
        if row.dtype == "fp32":
            truth = self.results[SDPA]
        else:
            trial.to(torch.float32)
            truth = [x.clone() for x in trial.results(SDPA)]
            trial.to(DTYPES[row.dtype])
        for name, results in self.results.items():
            self.distances[name] = [distance(x.float(), true) for x, true in zip(results, truth, strict=True)]
        for place, (ours, theirs) in enumerate(zip(self.distances[OURS], self.distances[SDPA], strict=True)):
            most = 2 * theirs + FLOOR[row.dtype]
            assert ours <= most, f"{row} is wrong, result {place}: relative distance {ours:.3g}, allowed {most:.3g}"
        self.results.clear()


@contextmanager
def kept_for_backward(nets: Sequence[torch.nn.Module], head: torch.Size | None) -> Iterator[dict[int, int]]:
    """Collects the bytes of what autograd keeps inside the ``with`` block, by storage.

    Parameters are left out, and a gradient of the head that is computed with the loss: it is not an activation.

    Args:
        nets: whose parameters.
        head: the shape of the head's weights; None: no gradient is computed with the loss.
    """
    own = {x.untyped_storage().data_ptr() for net in nets for x in net.parameters()}
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own and x.shape != head:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield kept


@contextmanager
def _counting_calls(module: torch.nn.Module | None) -> Iterator[list[None]]:
    """Counts the calls of a module inside the ``with`` block: the length of the list; None: there are none."""
    calls: list[None] = []
    if module is None:
        yield calls
        return
    hook = module.register_forward_pre_hook(lambda *_: calls.append(None))
    try:
        yield calls
    finally:
        hook.remove()


def rounds_for(seconds: float, quick: bool) -> int:
    """Returns how many rounds of so many seconds are measured."""
    if quick:
        return max(1, int(_QUICK_BUDGET / seconds))
    return min(max(_LEAST, int(_BUDGET / seconds)), max(_MOST, int(_ENOUGH / seconds)))


def _time(
    benchmark: Any, trial: Trial, row: Row, seconds: float
) -> tuple[dict[str, list[float]], dict[str, list[float]], Peaks]:
    """Returns the seconds of runs and of the attention calls in them, by candidate, and the machine's rates meanwhile.

    Args:
        seconds: of one run.
    """
    clock = Clock(row.device)
    attention: dict[str, list[float]] = {name: [] for name in trial.candidates}
    rounds = rounds_for(seconds * len(trial.candidates), row.quick)

    def run(name: str) -> None:
        clock.clear()
        trial.run(name)
        attention[name].append(clock.seconds)

    peaks = Peaks(DTYPES[row.dtype], row.device)
    with ExitStack() as stack:
        stack.enter_context(clock.watching())
        samples = alternate(
            benchmark,
            {name: lambda name=name: run(name) for name in trial.candidates},
            peaks,
            trial.device,
            rounds,
            before=trial.prepare,
        )
    trial.drop_gradients()
    return samples, attention, peaks


def _description(row: Row, found: Found, samples: dict[str, list[float]], first: _FirstRuns) -> dict[str, Any]:
    """Returns the JSON of a row; the names contain the units."""
    seconds = found.seconds
    others = {name: {"seconds": value, "ratio": value / seconds[OURS]} for name, value in seconds.items()}
    peers = {name: other for name, other in others.items() if name not in (OURS, REMOVED)}
    for name in peers.keys() & found.memory.keys():
        peers[name]["peak_memory_bytes"] = found.memory[name]
    ratio = found.attention_ratio
    return {
        "op": "models",
        "configuration": row.case.id,
        "dtype": row.dtype,
        "pass": row.case.work.passes,
        "device": row.device,
        "seconds": seconds[OURS],
        "peers": peers,
        "peak_memory_bytes": found.memory[OURS],
        "memory_why_not": memory_why_not(row.device),
        "baseline": row.case.baseline,
        "amdahl": amdahl(seconds[row.case.baseline], seconds[OURS], seconds[REMOVED]),
        "attention": {
            "calls": found.calls,
            "layers": found.layers,
            "calls_per_layer": found.calls_per_layer,
            "seconds": found.attention,
            "sdpa_calls": first.sdpa_calls,
            "flops": found.flops,
            "share_of_peak": found.share_of_peak,
            "peak_flops_per_second": found.peak_flops,
            "bytes": found.bytes,
            "share_of_bandwidth": found.share_of_bandwidth,
            "peak_bytes_per_second": found.peak_bytes,
        }
        | ({} if ratio is None else {"ratio": ratio}),
        "encoder_calls": found.encoder_calls,
        "cache_share": found.cache_share,
        "distances": first.distances,
        "samples_seconds": samples,
        "targets": _targets(row, found),
    }


def _targets(row: Row, found: Found) -> list[dict[str, Any]]:
    """Returns the targets, which exist for CPUs only."""
    cpu = torch.device(row.device).type == "cpu"
    return [target.judge(found) for target in row.case.targets] if cpu else []
