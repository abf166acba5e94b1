"""Every op of the library: its spec's cases x backends x dtypes, opcheck, fullgraph compilation, export, vmap.

A new op folder is tested here without a line added.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import pytest
import torch
from harness import DTYPES, SPECS, backends, check, draw, gradients, name_of, needed, run
from pairwise import cover, parametrize, traits
from torch import Tensor

import mmkernels
from mmkernels import ops
from mmkernels.ops import NAMES
from mmkernels.runtime import cpu
from mmkernels.runtime import triton as gpu
from mmkernels.runtime.dispatch import BACKENDS, TABLES
from mmkernels.spec import Case, OpSpec, cast, flatten

CASES = [(spec, case) for spec in SPECS.values() for case in spec.cases]
TRAITS = {(spec.name, case.id): {"op": spec.name} | traits(draw(case)) for spec, case in CASES}
NATIVE = ("cpu", "triton", "cuda")
"""The backends of which each call may add in another order; the others are plain PyTorch."""


def _id(row: tuple[Any, ...]) -> str:
    spec, case, *rest = row
    words = [spec.name, case.id, *(name_of(x) if isinstance(x, torch.dtype) else x for x in rest)]
    return "-".join(words).replace(" ", "_")


def _traits(row: tuple[Any, ...]) -> dict[str, Any]:
    """What a case shows, and the dtype and instruction set that it runs in."""
    spec, case, *rest = row
    return TRAITS[spec.name, case.id] | {f"way {n}": x for n, x in enumerate(rest)}


def _traits_and_case(row: tuple[Any, ...]) -> dict[str, Any]:
    return _traits(row) | {"case": (row[0].name, row[1].id)}


def _distinct(spec: OpSpec) -> list[Case]:
    """One case for each combination of kinds of arguments: tracing depends on nothing else."""
    kinds = {tuple(sorted((name, _kind(x)) for name, x in draw(case).items())): case for case in reversed(spec.cases)}
    return list(reversed(kinds.values()))


def _kind(x: Any) -> str:
    if isinstance(x, mmkernels.SpanMask):
        return "spans" if x.key_valid is None else "spans and key_valid"
    return f"{x.dim()}-D {x.dtype}" if isinstance(x, Tensor) else type(x).__name__


def _compiled(spec: OpSpec) -> list[Case]:
    """Cases that together have each kind of each argument."""
    axes = lambda case: {name: _kind(x) for name, x in draw(case).items()} | {"seeded": case.seeded}
    return cover(_distinct(spec), axes, strength=1)


DISTINCT = [(spec, case) for spec in SPECS.values() for case in _distinct(spec)]
COMPILED = [(spec, case) for spec in SPECS.values() for case in _compiled(spec)]
each_compiled_case = pytest.mark.parametrize(
    ("spec", "case"),
    [pytest.param(*row, marks=() if row in COMPILED else pytest.mark.slow, id=_id(row)) for row in DISTINCT],
)
each_op = pytest.mark.parametrize("spec", SPECS.values(), ids=list(SPECS))

# Results.

# Triton's interpreter computes no float64, and takes bfloat16 for its bits.
_DTYPES = (torch.float32, torch.float16) if gpu.INTERPRETED else DTYPES
_EACH = [(spec, case, dtype) for spec, case in CASES for dtype in _DTYPES]
_NARROWER = [
    (spec, case, dtype, isa)
    for spec, case in CASES
    if any(entry.name == "cpu" for entry in TABLES[spec.name])
    for dtype in DTYPES[1:]
    for isa in cpu.isas()[1:]
]


@pytest.mark.interpreted
@(
    parametrize("spec, case, dtype", _EACH, _traits, ids=_id)
    if gpu.INTERPRETED
    else pytest.mark.parametrize(("spec", "case", "dtype"), _EACH, ids=map(_id, _EACH))
)
def test_against_float64(spec: OpSpec, case: Case, dtype: torch.dtype) -> None:
    for backend in needed([name for name in backends(spec, dtype) if name != "reference"]):
        assert check(spec, case, dtype, backend) > 0


@pytest.mark.skipif(cpu.why_not() is not None, reason=str(cpu.why_not()))
@parametrize("spec, case, dtype, isa", _NARROWER, _traits_and_case, ids=_id, once="case")
def test_narrower_instruction_sets(spec: OpSpec, case: Case, dtype: torch.dtype, isa: str) -> None:
    """The widest runs all cases in the test above."""
    with cpu.use_isa(isa):
        assert check(spec, case, dtype, "cpu") > 0


@pytest.mark.gpu
@pytest.mark.parametrize(("spec", "case", "dtype"), _EACH, ids=map(_id, _EACH))
def test_against_float64_on_gpu(spec: OpSpec, case: Case, dtype: torch.dtype) -> None:
    for backend in backends(spec, dtype, "cuda"):
        check(spec, case, dtype, backend, device="cuda")


@pytest.mark.parametrize(("spec", "case"), CASES, ids=map(_id, CASES))
def test_deterministic(spec: OpSpec, case: Case) -> None:
    inputs = cast(draw(case), torch.float32, always_wide=spec.always_wide)
    for backend in needed([name for name in backends(spec) if name in NATIVE]):
        first, again = run(spec, case, inputs, backend), run(spec, case, inputs, backend)
        for x, y in zip(first.tensors, again.tensors, strict=True):
            assert torch.equal(x, y)


# The op boundary, which is the same for every backend: `chunked` stands for all.


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


def _opcheck(spec: OpSpec, case: Case, backend: str, utils: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    op = getattr(torch.ops.mmkernels, spec.name).default
    names = [argument.name for argument in op._schema.arguments]
    for args in _boundary_calls(spec, case, backend, monkeypatch):
        args = tuple(
            x.detach().requires_grad_() if name in case.grads else x for name, x in zip(names, args, strict=True)
        )
        torch.library.opcheck(op, args, test_utils=utils)


@pytest.mark.parametrize(("spec", "case"), DISTINCT, ids=map(_id, DISTINCT))
def test_opcheck(spec: OpSpec, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    utils = ("test_schema", "test_faketensor", "test_autograd_registration")
    _opcheck(spec, case, "chunked", utils if case.grads else utils[:2], monkeypatch)


@each_compiled_case
def test_traced_with_sizes_that_are_symbols(spec: OpSpec, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fourth part of opcheck, which takes nearly all of its time."""
    _opcheck(spec, case, "chunked", ("test_aot_dispatch_dynamic",), monkeypatch)


@pytest.mark.interpreted
@each_op
def test_every_backend_returns_what_the_fake_says_and_writes_no_input(
    spec: OpSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    for backend in needed([name for name in backends(spec) if name != "chunked"]):
        _opcheck(spec, _compiled(spec)[-1], backend, ("test_schema", "test_faketensor"), monkeypatch)


@each_compiled_case
def test_compiles_to_one_graph(spec: OpSpec, case: Case) -> None:
    inputs = cast(draw(case), torch.float32, always_wide=spec.always_wide)
    torch._dynamo.reset()
    plain = run(spec, case, inputs, "chunked")
    compiled = torch.compile(spec.function, fullgraph=True, backend="aot_eager", dynamic=False)
    leaves = {n: x.detach().requires_grad_() if n in case.grads else x for n, x in inputs.items()}
    if case.seeded:
        torch.manual_seed(7)
    outputs = flatten(compiled(**leaves, backend="chunked"))
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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)  # of 16 bits, some results are wider
def test_meta_tensors_need_no_values(spec: OpSpec, dtype: torch.dtype) -> None:
    inputs = cast(draw(spec.cases[0]), dtype, always_wide=spec.always_wide)
    want = flatten(spec.function(**inputs))
    got = flatten(spec.function(**cast(inputs, dtype, "meta", spec.always_wide)))
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
