"""Measures one model on ``attn_implementation="mmkernels"`` beside "sdpa": its forward pass, and the attention in it.

Both alternate on the same weights and inputs, together with a third candidate: the forward pass with every op of
mmkernels removed, which bounds the speed-up (Amdahl). Attention calls and the making of masks are timed inside the same
forward passes, by wrappers of the functions that transformers has registered. A wrong result has no time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers_models import Model

from mmkernels.integrations.transformers import NAME, counting, register
from mmkernels.meters import Timing, memory_why_not, peak_memory, time_alternating, time_once
from mmkernels.ops.attention.cross_attention.spec import SPEC
from mmkernels.options import DTYPES
from mmkernels.profiling.point import REMOVED, amdahl, running_as
from mmkernels.testing.models import Inputs, seeded

SDPA = "sdpa"
CANDIDATES = {SDPA: SDPA, NAME: NAME, REMOVED: NAME}
"""The candidates that alternate, and the attention of each."""
LEAST_SHARE = 0.85  # of the speed-up that removing the attention would bring
LEAST_SPEED = 0.95  # of sdpa's, for every model

_BUDGET = 3.0  # seconds of counted rounds for one row, all candidates together
_ROUNDS = (5, 2000)
_ATTENTION, _COUNTED, _MASKS = "attention", "counted", "masks"


@dataclass(frozen=True, repr=False)
class Row:
    """One row of the benchmark.

    Args:
        dtype: a name in `DTYPES`.
        compile_only: the model runs once and nothing is measured.
    """

    model: Model
    dtype: str
    device: str = "cpu"
    compile_only: bool = False

    def __str__(self) -> str:
        return f"{self.model.id}, {self.dtype}, forward"

    __repr__ = __str__


class Clock:
    """Times and counts the calls of the registered functions inside one forward pass."""

    def __init__(self, counts: Callable[[Any], bool], device: str) -> None:
        self._counts, self._device = counts, device
        self.clear()

    def clear(self) -> None:
        self.seconds = dict.fromkeys((_ATTENTION, _COUNTED, _MASKS), 0.0)
        self.calls = dict.fromkeys(self.seconds, 0)

    @contextmanager
    def around(self, names: tuple[str, ...]) -> Iterator[None]:
        """Times the functions that transformers has registered under these names, inside the ``with`` block."""
        with ExitStack() as stack:
            for name in names:
                for interface, kinds in ((AttentionInterface, self._attention), (AttentionMaskInterface, self._masks)):
                    function = interface()[name]
                    stack.callback(interface.register, name, function)
                    interface.register(name, self._timed(function, kinds))
            yield

    def _attention(self, module: Any, *args: Any) -> tuple[str, ...]:
        return (_ATTENTION, _COUNTED) if self._counts(module) else (_ATTENTION,)

    def _masks(self, *args: Any) -> tuple[str, ...]:
        return (_MASKS,)

    def _timed(self, function: Callable[..., Any], kinds: Callable[..., tuple[str, ...]]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            results = []
            seconds = time_once(lambda: results.append(function(*args, **kwargs)), self._device)
            for kind in kinds(*args):
                self.seconds[kind] += seconds
                self.calls[kind] += 1
            return results[0]

        return timed


class Trial:
    """A model with its inputs, in one dtype at a time, and on one attention at a time."""

    def __init__(self, row: Row) -> None:
        self.model, self._device, self._attention = row.model, torch.device(row.device), ""
        with seeded(0):
            self.net: Any = row.model.build().eval()
        open_gates(self.net)
        self.net.to(self._device)
        self._inputs = self._draw(DTYPES[row.dtype])
        self._cached = self._draw_cache(DTYPES[row.dtype]) if row.model.cached else []
        self.to(DTYPES[row.dtype])

    def _draw(self, dtype: torch.dtype) -> Inputs:
        with seeded(0):
            drawn = self.model.inputs()
        return {name: rounded(x, dtype).to(self._device) if isinstance(x, Tensor) else x for name, x in drawn.items()}

    def _draw_cache(self, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        config, g = self.net.config, torch.Generator().manual_seed(1)
        shape = (2, 1, config.num_key_value_heads, self.model.cached, config.head_dim)
        layers = (torch.randn(shape, generator=g) for _ in range(config.num_hidden_layers))
        return [tuple(rounded(x, dtype).to(self._device)) for x in layers]

    def to(self, dtype: torch.dtype) -> None:
        """Converts weights and inputs; buffers keep their precision, as in models that were loaded in `dtype`."""
        for x in self.net.parameters():
            x.data = x.data.to(dtype)
        self.inputs = {
            name: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x
            for name, x in self._inputs.items()
        }
        self._cached = [(key.to(dtype), value.to(dtype)) for key, value in self._cached]

    def prepare(self, attention: str) -> None:
        """Does what a forward pass on this attention needs and is not timed."""
        if attention != self._attention:
            self.net.set_attn_implementation(attention)
            self._attention = attention
        if self._cached:
            cache = self.inputs["past_key_values"] = DynamicCache(config=self.net.config)
            for number, (key, value) in enumerate(self._cached):
                cache.update(key, value, number)

    def run(self) -> Any:
        return self.net(**self.inputs)

    def results(self, attention: str) -> list[Tensor]:
        """Returns the outputs without the positions that are padding."""
        self.prepare(attention)
        outputs = self.model.outputs(self.run())
        valid = self.inputs.get("attention_mask")
        if valid is None:
            return list(outputs)
        valid = valid.bool()
        return [x[valid] if x.shape[: valid.dim()] == valid.shape else x for x in outputs]


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounds to values of `dtype`, so that wider dtypes compute the same problem."""
    return x.to(dtype).to(x.dtype) if x.is_floating_point() else x


@torch.no_grad()
def open_gates(net: torch.nn.Module) -> None:
    """Redraws parameters that are all 0, such as the gates of layers that attend to images: a 0 would hide errors."""
    for x in net.parameters():
        if not x.any():
            x.fill_(0.5) if x.numel() == 1 else x.normal_(std=0.02)


@torch.no_grad()
def measure(benchmark: Any, row: Row) -> None:
    """Checks the model on mmkernels' attention, then times it beside sdpa's, into ``benchmark.extra_info``.

    Args:
        benchmark: pytest-benchmark's fixture.

    Raises:
        AssertionError: the result is wrong, or the model has no attention that mmkernels runs.
    """
    register()
    trial = Trial(row)
    if row.compile_only:
        trial.results(NAME)
        return
    masks = _check(trial, row)
    memory = {name: _peak(trial, name, row) if row.model.least else None for name in (SDPA, NAME)}
    timings, inside = _time(trial, row)
    inside[_MASKS] |= masks
    benchmark.group = f"transformers, {row.dtype}, forward"
    benchmark.extra_info.update(_description(row, timings, inside, memory))
    trial.prepare(NAME)
    benchmark.pedantic(trial.run, rounds=1, iterations=1)  # one more pass: the fixture reports only what it has timed


def _check(trial: Trial, row: Row) -> dict[str, Any]:
    """Returns the masks of the attention calls.

    Raises:
        AssertionError: the error against a wider dtype is over budget, which is twice sdpa's error.
    """
    baseline = trial.results(SDPA)
    with counting() as calls:
        ours = trial.results(NAME)
    assert calls.total, f"no attention call of {row} ran on {NAME}"
    trial.to(torch.float64 if row.dtype == "fp32" else torch.float32)
    truth = trial.results(SDPA)
    trial.to(DTYPES[row.dtype])
    for place, results in enumerate(zip(ours, baseline, truth, strict=True)):
        problem = SPEC.over_budget(*results)
        assert problem is None, f"{NAME} is wrong at {row}, result {place}: {problem}"
    return asdict(calls)


def _peak(trial: Trial, name: str, row: Row) -> int | None:
    trial.prepare(name)
    return peak_memory(trial.run, row.device)


def _time(trial: Trial, row: Row) -> tuple[dict[str, Timing], dict[str, dict[str, Any]]]:
    """Returns the times of forward passes by candidate, and those of the calls inside them by kind."""
    clock = Clock(row.model.counts, row.device)
    candidates = [name for name in CANDIDATES if name != REMOVED or row.model.most_overhead is None]
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in candidates}

    def before(name: str) -> None:
        trial.prepare(CANDIDATES[name])
        clock.clear()

    def run(name: str) -> None:
        with running_as(name if name == REMOVED else "fused"):
            trial.run()
        samples[name].append(clock.seconds)

    with clock.around((SDPA, NAME)):
        timings = time_alternating(
            {name: functools.partial(run, name) for name in candidates},
            before={name: functools.partial(before, name) for name in candidates},
            budget=_BUDGET,
            least=_ROUNDS[0],
            most=_ROUNDS[1],
            warm=True,  # the check ran both attentions; without the ops nothing new runs
            device=row.device,
        )
    return timings, {kind: _beside(kind, calls, samples) for kind, calls in clock.calls.items()}


def _beside(kind: str, calls: int, samples: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Returns the seconds of all calls of one kind in a forward pass, without a ratio if one side made no calls."""
    ours, theirs = (median(sample[kind] for sample in samples[name]) for name in (NAME, SDPA))
    ratio = {"ratio": theirs / ours} if ours and theirs else {}
    return {"calls": calls, "seconds": ours, "sdpa_seconds": theirs, **ratio}


def _description(
    row: Row, timings: dict[str, Timing], inside: dict[str, dict[str, Any]], memory: dict[str, int | None]
) -> dict[str, Any]:
    """Returns the JSON of a row; the names contain the units."""
    seconds = {name: timing.seconds for name, timing in timings.items()}
    bound = amdahl(seconds[SDPA], seconds[NAME], seconds[REMOVED]) if REMOVED in seconds else {}
    speedup, counted = seconds[SDPA] / seconds[NAME], inside[_COUNTED]
    # By how much an attention call of ours is slower than sdpa's; negative if it is faster.
    overhead = (seconds[NAME] - seconds[SDPA]) / inside[_ATTENTION]["calls"]
    return {
        "op": "transformers",
        "configuration": row.model.id,
        "dtype": row.dtype,
        "pass": "forward",
        "device": row.device,
        "seconds": seconds[NAME],
        "peers": {
            SDPA: {"seconds": seconds[SDPA], "ratio": speedup, "peak_memory_bytes": memory[SDPA]},
            "sdpa's attention calls": {"seconds": counted["sdpa_seconds"], "ratio": counted["ratio"]},
        },
        "peak_memory_bytes": memory[NAME],
        "memory_why_not": memory_why_not(row.device),
        "amdahl": bound,
        "attention": inside[_ATTENTION],
        "counted": counted | {"called": row.model.called},
        "masks": inside[_MASKS],
        "overhead_seconds_per_call": overhead,
        "rounds": len(timings[NAME].samples),
        "spread": {name: timing.spread for name, timing in timings.items()},
        "targets": list(_targets(row, speedup, overhead, counted["ratio"], bound)),
    }


def _targets(
    row: Row, speedup: float, overhead: float, attention: float, bound: dict[str, float]
) -> Iterator[dict[str, Any]]:
    """Returns the targets, which exist for CPUs only."""
    if torch.device(row.device).type != "cpu":
        return
    if row.model.most_overhead is not None:
        yield {"than": "overhead", "most": row.model.most_overhead, "found": overhead}
        return
    yield {"than": "forward", "least": LEAST_SPEED, "found": speedup}
    if row.dtype in row.model.least:
        yield {"than": "attention", "least": row.model.least[row.dtype], "found": attention}
        yield {"than": "share of cap", "least": LEAST_SHARE, "found": bound["share_of_cap"]}
