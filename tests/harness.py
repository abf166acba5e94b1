"""How an op is checked: its spec's cases on a backend, against float64, within its error budget."""

from __future__ import annotations

import importlib
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import hypothesis
import pytest
import torch
from op_runs import one_run
from torch import Tensor

from mmkernels import SpanMask
from mmkernels.meters import memory_why_not, peak_memory
from mmkernels.ops import MODULES, specs
from mmkernels.runtime import triton as gpu
from mmkernels.runtime.dispatch import TABLES
from mmkernels.spec import Case, Inputs, OpSpec, cast, flatten

SPECS = specs()
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Settings:
    """What ``--seed`` sets, before any test module is imported.

    Args:
        seed: of all random inputs; 0: the same as ever.
        thorough: ten times as many examples of Hypothesis, not the same as ever either.
    """

    seed: int = 0
    thorough: bool = False


settings = Settings()


def generator(number: int = 0) -> torch.Generator:
    """Returns a source of random inputs: other inputs for another `number`, and for another ``--seed``."""
    return torch.Generator().manual_seed(number + settings.seed)


def reseed() -> None:
    """Start PyTorch's own generator anew, as each test finds it."""
    torch.manual_seed(settings.seed)


def examples(count: int, interpreted: int | None = None) -> hypothesis.settings:
    """Returns settings for `count` examples of Hypothesis; others under Triton's interpreter, which is slow."""
    count = interpreted if interpreted is not None and gpu.INTERPRETED else count
    return hypothesis.settings(max_examples=count * (10 if settings.thorough else 1))


@dataclass(frozen=True)
class Result:
    outputs: tuple[Tensor, ...]
    grads: dict[str, Tensor]

    @cached_property
    def bytes(self) -> int:
        return sum(x.nbytes for x in self.tensors)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (*self.outputs, *self.grads.values())


# Backends.


def backends(spec: OpSpec, dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[str]:
    """Returns the op's backends that this machine can run, and that compute any case in `dtype` on `device`."""
    layout = importlib.import_module(MODULES[spec.name]).OP.layout
    probe = torch.empty(0, 0, 0, 0, dtype=dtype, device=device)
    args = layout.record._make([probe if field.is_tensor else None for field in layout.fields])
    able = (entry for entry in TABLES[spec.name] if entry.why_not() is None and entry.name != "cuda")
    usable = [entry.name for entry in able if entry.name in ("chunked", "reference") or entry.why_not(args) is None]
    # Under Triton's interpreter its kernels alone: the others are tested without.
    return [name for name in usable if name == "triton"] if gpu.INTERPRETED else usable


def stand_in(spec: OpSpec) -> str:
    """Returns the fastest backend in plain PyTorch: "chunked", or "reference" where an op has nothing else."""
    return next(entry.name for entry in TABLES[spec.name] if entry.name in ("chunked", "reference"))


def needed(names: list[str]) -> list[str]:
    """Returns `names`; where there are none the test is skipped and counted, as a loop over nothing would pass."""
    if not names:
        pytest.skip("no backend that is tested here computes this")
    return names


def each_backend(op: str, *, interpreted: bool = True) -> Callable[..., Any]:
    """Returns a decorator that runs a test on each of the op's backends.

    Args:
        interpreted: under Triton's interpreter too; not what happens before or after a kernel.
    """

    def mark(test: Callable[..., None]) -> Callable[..., None]:
        each = pytest.mark.parametrize("backend", backends(SPECS[op]))(test)
        return pytest.mark.interpreted(each) if interpreted else each

    return mark


def dtype_of(op: str, backend: str) -> torch.dtype:
    """Returns the widest dtype that a backend computes in."""
    return torch.float64 if backend in backends(SPECS[op], torch.float64) else torch.float32


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# Inputs and results.


def draw(case: Case, number: int = 0) -> Inputs:
    """Returns the case's inputs in float64, the same each time; others for another `number`."""
    return case.make(generator(zlib.crc32(case.id.encode()) + number))


def inputs_in(spec: OpSpec, case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Inputs:
    """Returns the case's inputs in `dtype`, but for those that stay wide."""
    return cast(draw(case), dtype, device, spec.always_wide)


def largest(cases: Iterable[Case], count: int) -> list[Case]:
    """Returns the cases with the most elements, of those without dropout."""
    size = lambda case: sum(x.numel() for x in tensors_of(draw(case)))
    return sorted((case for case in cases if not case.seeded), key=size)[-count:]


def leaves_of(case: Case, inputs: Inputs) -> Inputs:
    """Returns the inputs; those that the case differentiates by require a gradient."""
    return {name: x.detach().requires_grad_() if name in case.grads else x for name, x in inputs.items()}


def cotangent(x: Tensor) -> Tensor:
    """Returns a direction for a gradient, the same for each tensor of this size."""
    weights = torch.randn(x.shape, generator=generator(x.numel()), dtype=torch.float64)
    return weights.to(x.device, x.dtype)


def call(
    spec: OpSpec, case: Case, inputs: Inputs, backend: str | None, function: Callable[..., Any] | None = None
) -> tuple[Tensor, ...]:
    """Returns the outputs; each call draws the same dropout.

    Args:
        function: stands for the op's public function, for example compiled.
    """
    if case.seeded:
        reseed()
    with one_run(spec.name):
        return flatten((function or spec.function)(**inputs, backend=backend))


def run(spec: OpSpec, case: Case, inputs: Inputs, backend: str, function: Callable[..., Any] | None = None) -> Result:
    """Returns the outputs, and the gradients of `case.grads` for fixed cotangents."""
    inputs = leaves_of(case, inputs)
    outputs = call(spec, case, inputs, backend, function)
    grads = gradients(outputs, [inputs[name] for name in case.grads])
    return Result(tuple(x.detach() for x in outputs), dict(zip(case.grads, grads, strict=True)))


def tensors_of(inputs: Inputs) -> list[Tensor]:
    """Returns all tensors among the inputs, those of masks too."""
    parts = [(x.start, x.end, x.key_valid) if isinstance(x, SpanMask) else (x,) for x in inputs.values()]
    return [x for part in parts for x in part if isinstance(x, Tensor)]


def gradients(outputs: tuple[Tensor, ...], leaves: list[Tensor]) -> tuple[Tensor, ...]:
    """Returns the gradients by `leaves` of those outputs that have one, for fixed cotangents."""
    if not leaves:
        return ()
    outputs = tuple(x for x in outputs if x.requires_grad)
    # -inf is the log-sum-exp of nothing: no direction moves it.
    weights = [cotangent(x).masked_fill(x.detach() == -torch.inf, 0.0) for x in outputs]
    return torch.autograd.grad(outputs, leaves, weights)


# What is right.

_KEPT_BYTES = 64 << 20
_kept: OrderedDict[Any, tuple[Result, Result]] = OrderedDict()


def expected(spec: OpSpec, case: Case, dtype: torch.dtype, device: str = "cpu") -> tuple[Result, Result]:
    """Returns the reference's results in `dtype` and in float64, on the inputs as `dtype` rounds them.

    Both are computed once for all backends, instruction sets and tile sizes; the last 64 MiB of them are kept.
    """
    key = (spec.name, case, dtype, device)
    if key in _kept:
        _kept.move_to_end(key)
        return _kept[key]
    _kept[key] = baseline, truth = _expected(spec, case, inputs_in(spec, case, dtype, device), dtype)
    while sum(map(_bytes, _kept.values())) > _KEPT_BYTES:
        _kept.popitem(last=False)
    return baseline, truth


def _expected(spec: OpSpec, case: Case, inputs: Inputs, dtype: torch.dtype) -> tuple[Result, Result]:
    baseline = run(spec, case, inputs, "reference")
    return baseline, baseline if dtype == torch.float64 else run(spec, case, cast(inputs, torch.float64), "reference")


def _bytes(results: tuple[Result, Result]) -> int:
    return sum(result.bytes for result in results)


def check(
    spec: OpSpec,
    case: Case,
    dtype: torch.dtype,
    backend: str,
    device: str = "cpu",
    *,
    threads: int = 1,
    units: Mapping[str, float] | None = None,
    function: Callable[..., Any] | None = None,
) -> int:
    """Assert the op's error budget for one case, and that no input is written; returns how many tensors were compared.

    The largest error of a tensor of a hundred numbers is a matter of luck: of two formulas whose errors are alike, one
    has more than twice the other's in one draw of twenty. Where one draw is above the budget, the same budget holds for
    the errors of eight draws together, that one among them.

    Args:
        threads: for the backend; what is right is computed by one.
        units: what the gradients named are measured in, as in `compare`.
        function: stands for the op's public function.
    """
    what = f"{backend} / {dtype}"
    ours = _run_untouched(spec, case, inputs_in(spec, case, dtype, device), backend, threads, function)
    first = (ours, *expected(spec, case, dtype, device))
    try:
        compare(spec, case, *first, what, units)
    except AssertionError:
        if [x.shape for x in ours.tensors] != [x.shape for x in first[-1].tensors]:
            raise
        draws = [first]
        for number in range(1, 8):
            inputs = cast(draw(case, number), dtype, device, spec.always_wide)
            assert _differ(inputs, inputs_in(spec, case, dtype, device)), f"{case.id}: draws must differ"
            ours = _run_untouched(spec, case, inputs, backend, threads, function)
            draws.append((ours, *_expected(spec, case, inputs, dtype)))
        compare(spec, case, *map(_joined, zip(*draws, strict=True)), f"{what} / eight draws", units)
    return len(ours.tensors)


def _differ(a: Inputs, b: Inputs) -> bool:
    """Whether some numbers of two draws do; a case that ignores its generator has eight times the same luck."""
    floats = [[x for x in tensors_of(inputs) if x.is_floating_point()] for inputs in (a, b)]
    return not floats[0] or any(x.shape != y.shape or not torch.equal(x, y) for x, y in zip(*floats, strict=True))


def _run_untouched(
    spec: OpSpec, case: Case, inputs: Inputs, backend: str, threads: int, function: Callable[..., Any] | None
) -> Result:
    """Returns what a backend computes with so many threads; asserts that no input is written."""
    kept = [x.clone() for x in tensors_of(inputs)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        poison()
        ours = run(spec, case, inputs, backend, function)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(tensors_of(inputs), kept, rtol=0, atol=0, equal_nan=True)
    return ours


def _joined(results: Sequence[Result]) -> Result:
    """Returns the numbers of several results in one."""
    join = lambda tensors: torch.cat([x.reshape(-1) for x in tensors])
    outputs = tuple(map(join, zip(*(result.outputs for result in results), strict=True)))
    return Result(outputs, {name: join([result.grads[name] for result in results]) for name in results[0].grads})


def compare(
    spec: OpSpec,
    case: Case,
    ours: Result,
    baseline: Result,
    truth: Result,
    what: str,
    units: Mapping[str, float] | None = None,
) -> None:
    """Assert the op's error budget for each output and gradient.

    Args:
        what: for the message, beside op and case.
        units: gradients by name that may be small differences of large terms -> the size of the terms.
    """
    names = [*(f"output {n}" for n in range(len(ours.outputs))), *case.grads]
    for name, *triple in zip(names, ours.tensors, baseline.tensors, truth.tensors, strict=True):
        unit = (units or {}).get(name, 1.0)
        problem = spec.over_budget(*(x.cpu() / unit if unit != 1.0 else x.cpu() for x in triple))
        assert problem is None, f"{spec.name} / {case.id} / {what} / {name}: {problem}"


@contextmanager
def no_old_graphs() -> Iterator[None]:
    """Inductor's cache of graphs ignores an operator's schema: a graph of an older checkout would be run."""
    from torch._functorch import config as functorch  # seconds, which most tests do without
    from torch._inductor import config as inductor

    with inductor.patch(fx_graph_cache=False), functorch.patch(enable_autograd_cache=False):
        torch._dynamo.reset()
        yield


def peak_of(run: Callable[[], Any], first: Callable[[], Any] | None = None) -> int:
    """Returns the bytes that a call takes at its peak above what was there.

    Args:
        first: what is run before, not measured; None: the call itself.
    """
    if (why_not := memory_why_not()) is not None:  # it depends on the allocator: sanitizers bring their own
        pytest.skip(why_not)
    (first or run)()
    peak = peak_memory(run)
    assert peak is not None
    return peak


def poison() -> None:
    """Leave NaN in the allocator's free lists, so that an output that is not written shows."""
    for size in (64, 256, 1024, 4096, 16384, 65536):
        blocks = [torch.full((size,), torch.nan) for _ in range(4)]
        del blocks
