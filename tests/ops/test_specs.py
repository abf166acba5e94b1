"""Every op of the library: its spec's cases x backends x dtypes, opcheck, fullgraph compilation, export, vmap.

A new op folder is tested here without a line added.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import pytest
import torch
from harness import DTYPES, backends, check, draw, gradients, needed, run
from torch import Tensor

import mmkernels
from mmkernels import ops
from mmkernels.ops import NAMES, specs
from mmkernels.runtime.dispatch import BACKENDS, TABLES
from mmkernels.spec import Case, OpSpec, cast, flatten

SPECS = specs()
CASES = [(spec, case) for spec in SPECS.values() for case in spec.cases]
each_case = pytest.mark.parametrize(
    ("spec", "case"), CASES, ids=[f"{s.name}-{c.id}".replace(" ", "_") for s, c in CASES]
)


def _kind(x: Any) -> str:
    if isinstance(x, mmkernels.SpanMask):
        return "spans" if x.key_valid is None else "spans and key_valid"
    return f"{x.dim()}-D {x.dtype}" if isinstance(x, Tensor) else type(x).__name__


def _distinct() -> list[tuple[OpSpec, Case]]:
    """One case for each combination of kinds of arguments: tracing depends on nothing else."""
    found = {(s.name, *sorted((n, _kind(x)) for n, x in draw(c).items())): (s, c) for s, c in reversed(CASES)}
    return list(reversed(found.values()))


DISTINCT = _distinct()
each_distinct_case = pytest.mark.parametrize(
    ("spec", "case"), DISTINCT, ids=[f"{s.name}-{c.id}".replace(" ", "_") for s, c in DISTINCT]
)
each_op = pytest.mark.parametrize("spec", SPECS.values(), ids=list(SPECS))


@pytest.mark.interpreted
@each_case
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_against_float64(spec: OpSpec, case: Case, dtype: torch.dtype) -> None:
    for backend in needed(backends(spec, dtype)):
        assert check(spec, case, dtype, backend) > 0


@pytest.mark.gpu
@each_case
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_against_float64_on_gpu(spec: OpSpec, case: Case, dtype: torch.dtype) -> None:
    for backend in backends(spec, dtype, "cuda"):
        check(spec, case, dtype, backend, device="cuda")


@each_case
def test_deterministic(spec: OpSpec, case: Case) -> None:
    inputs = cast(draw(case), torch.float32, always_wide=spec.always_wide)
    for backend in backends(spec):
        a, b = run(spec, case, inputs, backend), run(spec, case, inputs, backend)
        for x, y in zip((*a.outputs, *a.grads.values()), (*b.outputs, *b.grads.values()), strict=True):
            assert torch.equal(x, y)


def _boundary_calls(spec: OpSpec, case: Case, backend: str, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The arguments that the public function hands to its op boundary."""
    module = importlib.import_module(ops.MODULES[spec.name])
    calls: list[tuple[Any, ...]] = []
    real = module.OP

    def spy(args: Any, backend: str) -> Any:
        calls.append((*args, backend))
        return real(args, backend)

    with monkeypatch.context() as patch:
        patch.setattr(module, "OP", spy)
        inputs = cast(draw(case), torch.float32, always_wide=spec.always_wide)
        spec.function(**inputs, backend="")
    return [(*args[:-1], backend) for args in calls]


@pytest.mark.interpreted
@each_distinct_case
def test_opcheck(spec: OpSpec, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    op = getattr(torch.ops.mmkernels, spec.name).default
    names = [argument.name for argument in op._schema.arguments]
    for backend in needed(backends(spec)):
        for args in _boundary_calls(spec, case, backend, monkeypatch):
            args = tuple(
                x.detach().requires_grad_() if name in case.grads else x for name, x in zip(names, args, strict=True)
            )
            tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic", "test_autograd_registration")
            torch.library.opcheck(op, args, test_utils=tests if case.grads else tests[:3])


@pytest.mark.interpreted
@each_distinct_case
def test_compiles_to_one_graph(spec: OpSpec, case: Case) -> None:
    inputs = cast(draw(case), torch.float32, always_wide=spec.always_wide)
    for backend in needed(backends(spec)):
        torch._dynamo.reset()
        plain = run(spec, case, inputs, backend)
        compiled = torch.compile(spec.function, fullgraph=True, backend="aot_eager", dynamic=False)
        leaves = {n: x.detach().requires_grad_() if n in case.grads else x for n, x in inputs.items()}
        if case.seeded:
            torch.manual_seed(7)
        outputs = flatten(compiled(**leaves, backend=backend))
        for a, b in zip(outputs, plain.outputs, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5, equal_nan=True)
        grads = gradients(outputs, [leaves[n] for n in case.grads])
        for a, b in zip(grads, plain.grads.values(), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@each_op
def test_exports(spec: OpSpec) -> None:
    case = spec.cases[0]
    inputs = cast(draw(case), torch.float32, always_wide=spec.always_wide)

    class Call(torch.nn.Module):
        def forward(self, inputs: dict[str, Any]) -> Any:
            return spec.function(**inputs)

    program = torch.export.export(Call(), (inputs,))
    assert sum(node.target == getattr(torch.ops.mmkernels, spec.name).default for node in program.graph.nodes) == 1
    for a, b in zip(flatten(program.module()(inputs)), flatten(spec.function(**inputs)), strict=True):
        torch.testing.assert_close(a, b)


@each_op
def test_meta_tensors_need_no_values(spec: OpSpec) -> None:
    inputs = cast(draw(spec.cases[0]), torch.float32, always_wide=spec.always_wide)
    want = flatten(spec.function(**inputs))
    got = flatten(spec.function(**cast(inputs, torch.float32, "meta", spec.always_wide)))
    for a, b in zip(got, want, strict=True):
        assert (a.shape, a.dtype, a.stride(), a.device.type) == (b.shape, b.dtype, b.stride(), "meta")


@each_op
def test_vmap_is_a_loop_over_slices(spec: OpSpec) -> None:
    inputs = cast(draw(spec.cases[0]), torch.float64)
    tensors = {name: x for name, x in inputs.items() if isinstance(x, Tensor)}
    others = {name: x for name, x in inputs.items() if name not in tensors}
    stacked = {name: torch.stack([x, 0.5 * x, -x] if x.is_floating_point() else [x] * 3) for name, x in tensors.items()}
    together = flatten(torch.func.vmap(lambda x: spec.function(**x, **others))(stacked))
    for n in range(3):
        alone = flatten(spec.function(**{name: x[n] for name, x in stacked.items()}, **others))
        for a, b in zip(together, alone, strict=True):
            torch.testing.assert_close(a[n], b)


@each_op
def test_public_surface(spec: OpSpec) -> None:
    assert getattr(mmkernels, spec.name) is spec.function
    parameters = inspect.signature(spec.function).parameters
    assert parameters["backend"].kind is inspect.Parameter.KEYWORD_ONLY and parameters["backend"].default is None
    doc = inspect.getdoc(spec.function) or ""
    for part in ("Args:", "Returns:", "Raises:", "Source:", "Example:"):
        assert part in doc, f"{spec.name}'s docstring lacks {part}"
    assert spec.benchmarks and spec.cases


def test_every_folder_is_discovered() -> None:
    assert set(NAMES) == set(SPECS) and set(NAMES) <= set(TABLES)
    for name, table in TABLES.items():
        places = [BACKENDS.index(entry.name) for entry in table]
        assert places == sorted(places), f"{name}'s backends must stand in the order of BACKENDS"
        assert table[-1].name == "reference"
