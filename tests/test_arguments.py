"""What follows from an op's record: schemas, the backward record, gradients, fakes; each by name."""

from __future__ import annotations

from collections import namedtuple
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from mmkernels import ops
from mmkernels.runtime import cpu
from mmkernels.runtime.arguments import Differentiable, Sizes, lay_out, lay_out_backward
from mmkernels.runtime.backends import cpu_kernel
from mmkernels.runtime.dispatch import TABLES, Backend, BackendError, define
from mmkernels.runtime.gradient import Gradient


class Arguments(NamedTuple):
    x: Differentiable
    weight: Differentiable | None
    index: Tensor
    scale: float
    flag: bool
    kind: str
    lengths: Sizes


class Results(NamedTuple):
    y: Differentiable
    state: Tensor


def test_schemas_follow_from_the_record() -> None:
    inputs, outputs = lay_out(Arguments), lay_out(Results)
    assert inputs.schema == "Tensor x, Tensor? weight, Tensor index, float scale, bool flag, str kind, SymInt[] lengths"
    assert inputs.differentiable == ("x", "weight") and inputs.tensors == ("x", "weight", "index")
    backward = lay_out_backward("toy", inputs, outputs, ["state"])
    more = "Tensor state, Tensor? grad_y, bool need_x, bool need_weight"
    assert backward.schema == f"{inputs.schema}, {more}"
    assert backward.record._fields == backward.names


def test_a_record_is_restored_from_its_tensors_and_numbers() -> None:
    layout, x = lay_out(Arguments), torch.zeros(1)
    args = Arguments(x, None, x, 2.0, True, "a", (1, 2))
    restored = layout.restore((*layout.tensors, *layout.others))(
        (*layout.take_tensors(args), *layout.take_others(args))
    )
    assert restored is not args and type(restored) is Arguments
    assert restored == args


@pytest.mark.parametrize("hint", [list[int], Tensor | float, dict, complex])
def test_a_type_that_no_schema_has_is_an_error(hint: Any) -> None:
    record = namedtuple("record", ["x"])
    record.__annotations__ = {"x": hint}
    with pytest.raises(TypeError, match=r"record\.x must be of a type that a schema has, got"):
        lay_out(record)


class Cube(NamedTuple):
    x: Differentiable
    factor: float


class Cubed(NamedTuple):
    y: Differentiable


@pytest.fixture(scope="module")
def cube() -> Any:
    """An op of one argument with a gradient, whose backward pass has backends, and so returns one tensor."""
    return define(
        "toy_cube",
        Cube,
        Cubed,
        fake=lambda args: torch.empty_like(args.x),
        backends=[Backend("reference", lambda args: args.factor * args.x**3)],
        gradient=Gradient(
            saves=(),
            formula=lambda args: (args.factor * args.x**3,),
            backends=[Backend("reference", lambda args: 3 * args.factor * args.x**2 * args.grad_y)],
        ),
    )


def test_one_gradient(cube: Any) -> None:
    x = torch.randn(4, dtype=torch.float64, requires_grad=True)
    call = lambda x: cube(Cube(x, 2.0), "")
    assert torch.autograd.gradcheck(call, x) and torch.autograd.gradgradcheck(call, x)
    torch.library.opcheck(torch.ops.mmkernels.toy_cube.default, (x, 2.0, ""))
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(x).sum(), x)[0], 6 * x**2)


@pytest.mark.skipif(cpu.why_not() is not None, reason=str(cpu.why_not()))
@pytest.mark.parametrize("op", ops.NAMES)
def test_cpp_kernels_have_the_schemas_of_the_records(op: str) -> None:
    for name in (op, f"{op}_backward"):
        if not hasattr(torch.ops.mmkernels, f"{name}_cpu"):
            continue
        ours, kernel = (getattr(torch.ops.mmkernels, n).default._schema for n in (name, f"{name}_cpu"))
        assert [(x.name, x.type) for x in ours.arguments[:-1]] == [(x.name, x.type) for x in kernel.arguments]


@pytest.mark.skipif(cpu.why_not() is not None, reason=str(cpu.why_not()))
def test_a_kernel_that_the_extension_lacks_is_no_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """An extension that is older than the op's C++ sources."""
    monkeypatch.setattr("mmkernels.runtime.dispatch.TABLES", dict(TABLES))
    backends = [cpu_kernel("toy_newer_cpu"), Backend("reference", lambda args: args.x * args.factor)]
    op = define("toy_newer", Cube, Cubed, fake=lambda args: torch.empty_like(args.x), backends=backends)
    reason = "the CPU extension has no kernel toy_newer_cpu; build it again: make setup"
    assert op(Cube(torch.ones(2), 3.0), "").tolist() == [3.0, 3.0]
    with pytest.raises(BackendError, match=reason):
        op(Cube(torch.ones(2), 3.0), "cpu")
