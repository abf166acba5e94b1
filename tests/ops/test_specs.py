"""Every op of the library: its spec's cases x backends x dtypes, opcheck, fullgraph compilation, export, vmap.

A new op folder is tested here without a line added.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import pytest
import torch
from harness import DTYPES, SPECS, backends, check, draw, inputs_in, leaves_of, name_of, needed, run, stand_in
from pairwise import cover, kinds, parametrize, traits
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
    """One case for each combination of kinds of arguments."""
    first = {tuple(sorted(kinds(case).items())): case for case in reversed(spec.cases)}
    return list(reversed(first.values()))


def _compiled(spec: OpSpec) -> list[Case]:
    """Cases that together have each kind of each argument."""
    return cover(_distinct(spec), lambda case: kinds(case) | {"seeded": case.seeded}, strength=1)


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


@parametrize("spec, case", CASES, _traits, ids=_id)
def test_deterministic(spec: OpSpec, case: Case) -> None:
    """However many threads share a call, twice the same gives the same bits."""
    inputs = inputs_in(spec, case)
    torch.set_num_threads(3)
    for backend in needed([name for name in backends(spec) if name in NATIVE]):
        first, again = run(spec, case, inputs, backend), run(spec, case, inputs, backend)
        for x, y in zip(first.tensors, again.tensors, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


# The op boundary, which is the same for every backend: one in plain PyTorch stands for all.


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
        spec.function(**inputs_in(spec, case), backend="")
    return [(*args[:-1], backend) for args in calls]


def _opcheck(spec: OpSpec, case: Case, backend: str, utils: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    op = getattr(torch.ops.mmkernels, spec.name).default
    names = [argument.name for argument in op._schema.arguments]
    for args in _boundary_calls(spec, case, backend, monkeypatch):
        leaves = leaves_of(case, dict(zip(names, args, strict=True)))
        torch.library.opcheck(op, tuple(leaves.values()), test_utils=utils)


@pytest.mark.parametrize(("spec", "case"), DISTINCT, ids=map(_id, DISTINCT))
def test_opcheck(spec: OpSpec, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    utils = ("test_schema", "test_faketensor", "test_autograd_registration")
    _opcheck(spec, case, stand_in(spec), utils if case.grads else utils[:2], monkeypatch)


@each_compiled_case
def test_traced_with_sizes_that_are_symbols(spec: OpSpec, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fourth part of opcheck, which takes nearly all of its time."""
    _opcheck(spec, case, stand_in(spec), ("test_aot_dispatch_dynamic",), monkeypatch)


@pytest.mark.interpreted
@each_op
def test_every_backend_returns_what_the_fake_says_and_writes_no_input(
    spec: OpSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    for backend in needed([name for name in backends(spec) if name != stand_in(spec)]):
        _opcheck(spec, _compiled(spec)[-1], backend, ("test_schema", "test_faketensor"), monkeypatch)


@each_compiled_case
def test_compiles_to_one_graph(spec: OpSpec, case: Case) -> None:
    inputs = inputs_in(spec, case)
    torch._dynamo.reset()
    backend = stand_in(spec)
    compiled = torch.compile(spec.function, fullgraph=True, backend="aot_eager", dynamic=False)
    found, plain = run(spec, case, inputs, backend, compiled), run(spec, case, inputs, backend)
    for a, b in zip(found.tensors, plain.tensors, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5, equal_nan=True)


@each_op
def test_exports(spec: OpSpec) -> None:
    inputs = inputs_in(spec, spec.cases[0])

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
    inputs = inputs_in(spec, spec.cases[0], dtype)
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
    together = torch.func.vmap(lambda x: flatten(spec.function(**x, **others)))(stacked)
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


@pytest.mark.skipif(cpu.why_not() is not None, reason=str(cpu.why_not()))
def test_the_extension_has_every_kernel() -> None:
    entries = {name: entry for name, table in TABLES.items() for entry in table if entry.name == "cpu"}
    assert {name: entry.why_not() for name, entry in entries.items() if entry.why_not() is not None} == {}


def test_every_family_is_a_package() -> None:
    """Else `pkgutil` does not find its ops, and no example in their docstrings is run."""
    families = {ops.folder(name).parent for name in NAMES}
    assert [family.name for family in families if not (family / "__init__.py").exists()] == []
