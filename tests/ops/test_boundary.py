"""What reaches an op besides plain tensors and constants: cotangents in batches, numbers that a graph does not know,
gradients that it was not made for.

A new op folder is tested here without a line added.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import SPECS, call, cotangent, draw, gradients, leaves_of, reseed, run, stand_in, tensors_of
from ops.test_calls import DIFFERENTIABLE, RICHEST, UNSEEDED, _inputs, each_differentiable_backend
from torch import Tensor
from torch._dynamo.utils import counters

from mmkernels.spec import Case, Inputs, OpSpec, cast, flatten

# Several cotangents at once.


@each_differentiable_backend
def test_several_cotangents_at_once(spec: OpSpec, backend: str) -> None:
    """``is_grads_batched``, as a vectorized Jacobian asks for it, gives what the cotangents give one by one."""
    case = RICHEST[spec.name]
    inputs = leaves_of(case, _inputs(spec, case, backend))
    outputs = [x for x in call(spec, case, inputs, backend) if x.requires_grad]
    leaves = [inputs[name] for name in case.grads]
    several = [torch.randn(3, *x.shape, dtype=x.dtype) for x in outputs]
    grads = lambda flows, batched=False, more=True: torch.autograd.grad(
        outputs, leaves, flows, is_grads_batched=batched, retain_graph=more, create_graph=batched and more
    )
    want = [torch.stack(each) for each in zip(*(grads([x[n] for x in several]) for n in range(3)), strict=True)]
    for more in (True, False):
        torch.testing.assert_close([x.detach() for x in grads(several, True, more)], want)


@each_differentiable_backend
def test_second_derivatives_for_several_cotangents_at_once(spec: OpSpec, backend: str) -> None:
    """As a vectorized Hessian asks for them."""
    case = UNSEEDED[spec.name]
    inputs = _inputs(spec, case, backend)
    batched, one_by_one = _second_derivatives(spec, case, inputs, backend)
    truth = _second_derivatives(spec, case, cast(inputs, torch.float64), "reference")[1]
    for ours, naive, true in zip(batched, one_by_one, truth, strict=True):
        assert (problem := spec.over_budget(ours, naive, true)) is None, problem


def _second_derivatives(spec: OpSpec, case: Case, inputs: Inputs, backend: str) -> list[list[Tensor]]:
    """Returns second derivatives for two cotangents, at once and one by one, the same cotangents in each dtype."""
    inputs = leaves_of(case, inputs)
    leaves = [inputs[name] for name in case.grads]
    outputs = [x for x in call(spec, case, inputs, backend) if x.requires_grad]
    first = torch.autograd.grad(
        [x.masked_fill(x == -torch.inf, 0.0).sin().sum() for x in outputs], leaves, create_graph=True
    )
    some = [x for x in first if x.requires_grad]
    several = [cotangent(x.expand(2, *x.shape)) for x in some]
    grads = lambda flows, batched=False: torch.autograd.grad(
        some, leaves, flows, is_grads_batched=batched, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    one_by_one = [torch.stack(each) for each in zip(*(grads([x[n] for x in several]) for n in range(2)), strict=True)]
    return [list(grads(several, True)), one_by_one]


# Numbers that change from call to call, or are computed from a shape.

NUMBERS = [
    pytest.param(spec, name, id=f"{spec.name}-{name}")
    for spec in SPECS.values()
    for name, parameter in inspect.signature(spec.function).parameters.items()
    if "float" in str(parameter.annotation)
]
each_number = pytest.mark.parametrize(("spec", "name"), NUMBERS)


def _compiled(function: Callable[..., Any], dynamic: bool | None) -> Callable[..., Any]:
    torch._dynamo.reset()
    counters.clear()
    return torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)


def _call_with(spec: OpSpec, name: str) -> tuple[Inputs, Callable[..., tuple[Tensor, ...]]]:
    """Returns inputs, and a function of them and a number for the argument `name`."""
    case, backend, op = UNSEEDED[spec.name], stand_in(spec), spec.function
    inputs = {key: x for key, x in leaves_of(case, _inputs(spec, case, backend)).items() if key != name}
    return inputs, lambda number, inputs: flatten(op(**inputs, **{name: number}, backend=backend))


def _same(spec: OpSpec, inputs: Inputs, ways: tuple[Callable[..., Any], Callable[..., Any]], number: Any) -> None:
    leaves = [inputs[name] for name in UNSEEDED[spec.name].grads if name in inputs]
    results = []
    for way in ways:
        reseed()  # of dropout
        outputs = way(number, inputs)
        results.append((outputs, gradients(outputs, leaves)))
    torch.testing.assert_close(*results, equal_nan=True)


@each_number
@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["float", "int"])
def test_a_number_that_changes_is_compiled_twice(spec: OpSpec, name: str, whole: bool) -> None:
    """First as a constant, then as an input of the graph: as the naive formula is."""
    inputs, function = _call_with(spec, name)
    compiled = _compiled(function, None)
    least = 1 if name in ("softcap", "temperature", "clamp") else 0  # which must be above 0
    for number in (least, least + 1) if whole else (0.1, 0.35, 0.8):
        _same(spec, inputs, (compiled, function), number)
    assert counters["stats"]["unique_graphs"] <= 2


LENGTHS = (97, 101, 103)  # the size of no other dim, else the graph takes the two for one


@each_number
def test_a_number_computed_from_a_shape_is_compiled_once(spec: OpSpec, name: str) -> None:
    inputs, function = _call_with(spec, name)
    of_shape = lambda x, inputs: function(1 / x.shape[0], inputs)
    compiled = _compiled(of_shape, True)
    for n in LENGTHS:
        _same(spec, inputs, (compiled, of_shape), torch.empty(n))
    assert counters["stats"]["unique_graphs"] == 1


@each_number
@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_number_computed_from_a_shape_is_exported(spec: OpSpec, name: str, strict: bool) -> None:
    inputs, function = _call_with(spec, name)
    inputs = {key: x.detach() if isinstance(x, Tensor) else x for key, x in inputs.items()}

    class Call(torch.nn.Module):
        def forward(self, x: Tensor) -> Any:
            return function(1 / x.shape[0], inputs)

    x, *others = (torch.empty(n) for n in LENGTHS)
    program = torch.export.export(Call(), (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), strict=strict)
    for x in others:
        reseed()
        found = program.module()(x)
        reseed()
        torch.testing.assert_close(found, Call()(x), equal_nan=True)


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated
@each_number
def test_a_number_that_a_trace_takes_for_a_tensor(spec: OpSpec, name: str) -> None:
    """``torch.jit.trace`` shows sizes, and what is computed from them, as tensors without a dim."""
    inputs, function = _call_with(spec, name)
    inputs = {key: x.detach() if isinstance(x, Tensor) else x for key, x in inputs.items()}
    call = lambda x: function(1 / x.shape[0], inputs)[0]
    x = torch.empty(4)
    results = []
    for f in (torch.jit.trace(call, (x,), check_trace=False), call):
        reseed()
        results.append(f(x))
    torch.testing.assert_close(*results, equal_nan=True)


# Sizes that a graph knows, as those of a parameter are, beside sizes that are symbols.

ARGUMENTS = [
    pytest.param(spec, name, id=f"{spec.name}-{name}")
    for spec in SPECS.values()
    for name, x in draw(RICHEST[spec.name]).items()
    if tensors_of({name: x})
]


@pytest.mark.parametrize(("spec", "name"), ARGUMENTS)
def test_one_argument_whose_sizes_are_constants_of_the_graph(spec: OpSpec, name: str) -> None:
    case = RICHEST[spec.name]
    inputs = _inputs(spec, case, stand_in(spec))
    for x in tensors_of({name: inputs[name]}):
        torch._dynamo.mark_static(x)
    compiled = _compiled(spec.function, True)
    torch.testing.assert_close(call(spec, case, inputs, None, compiled), call(spec, case, inputs, None), equal_nan=True)


# PyTorch's default dtype.


@each_differentiable_backend
def test_pytorch_s_default_dtype_changes_no_result(spec: OpSpec, backend: str) -> None:
    """A quotient of integers, and a tensor made of a number, have that dtype: 8 bits of precision here."""
    case = RICHEST[spec.name]
    inputs = _inputs(spec, case, backend)
    want = run(spec, case, inputs, backend)
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = run(spec, case, inputs, backend)
    finally:
        torch.set_default_dtype(torch.float32)
    for name in ("outputs", "grads"):
        torch.testing.assert_close(getattr(found, name), getattr(want, name), rtol=0, atol=0, equal_nan=True)


# Gradients that a graph was not made for.


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated
@pytest.mark.parametrize("spec", DIFFERENTIABLE, ids=lambda spec: spec.name)
def test_a_trace_of_what_requires_a_gradient_passes_its_check(spec: OpSpec) -> None:
    """The check traces again under ``no_grad``."""
    case = UNSEEDED[spec.name]
    inputs = leaves_of(case, _inputs(spec, case, stand_in(spec)))
    function = lambda *some: flatten(spec.function(**inputs | dict(zip(case.grads, some, strict=True))))[0]
    leaves = tuple(inputs[name] for name in case.grads)
    results = [f(*leaves) for f in (torch.jit.trace(function, leaves), function)]
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*(torch.autograd.grad(x.sum(), leaves) for x in results))


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated
@pytest.mark.parametrize("spec", DIFFERENTIABLE, ids=lambda spec: spec.name)
@pytest.mark.parametrize("way", ["torch.jit.trace", "torch.export"])
def test_gradients_through_a_graph_that_was_made_without(spec: OpSpec, way: str) -> None:
    case, op = UNSEEDED[spec.name], spec.function
    inputs = _inputs(spec, case, stand_in(spec))
    function = lambda *some: flatten(op(**inputs | dict(zip(case.grads, some, strict=True))))[0]

    class Call(torch.nn.Module):
        def forward(self, *some: Tensor) -> Tensor:
            return function(*some)

    values = tuple(inputs[name] for name in case.grads)
    made = torch.jit.trace(function, values, check_trace=False) if way == "torch.jit.trace" else None
    made = made or torch.export.export(Call(), values).module()
    leaves = [x.clone().requires_grad_() for x in values]
    found, want = (torch.autograd.grad(f(*leaves).sin().sum(), leaves) for f in (made, function))
    torch.testing.assert_close(found, want)
