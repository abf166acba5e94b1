"""Every op under the transforms of torch.func, nested too, in forward mode, and compiled: equal to torch.autograd.

A new op folder is tested here without a line added.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from harness import SPECS, backends, call, draw, stand_in
from ops.test_calls import DIFFERENTIABLE, UNSEEDED, _inputs
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from mmkernels.spec import OpSpec, flatten

Loss = Callable[[Tensor], Tensor]


def _loss(spec: OpSpec, backend: str | None) -> tuple[Loss, Tensor, Tensor]:
    """Returns a function of one argument of a call, a value of it, and a direction."""
    case = UNSEEDED[spec.name]
    name, inputs = case.grads[0], _inputs(spec, case, backend or "reference")

    def loss(x: Tensor) -> Tensor:
        outputs = call(spec, case, inputs | {name: x}, backend)
        return sum((y.masked_fill(y == -torch.inf, 0.0).sin().sum() for y in outputs), x.new_zeros(()))

    return loss, inputs[name], torch.randn_like(inputs[name])


def _first(loss: Loss, x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(loss(leaf), leaf)[0]


def _second(loss: Loss, x: Tensor, direction: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    return torch.autograd.grad((first * direction).sum(), leaf)[0]


def _dual(loss: Loss, x: Tensor, direction: Tensor) -> Tensor:
    with forward_ad.dual_level():
        tangent: Tensor = forward_ad.unpack_dual(loss(forward_ad.make_dual(x, direction))).tangent
    return tangent


def _two(x: Tensor) -> Tensor:
    return torch.stack([x, 0.5 * x])


Transform = Callable[[Loss, Tensor, Tensor], Tensor]
REVERSE: dict[str, tuple[Transform, Transform]] = {
    "grad": (lambda f, x, _: grad(f)(x), lambda f, x, _: _first(f, x)),
    "vjp": (lambda f, x, _: vjp(f, x)[1](torch.ones_like(f(x)))[0], lambda f, x, _: _first(f, x)),
    "vmap of grad": (
        lambda f, x, _: vmap(grad(f))(_two(x)),
        lambda f, x, _: torch.stack([_first(f, each) for each in _two(x)]),
    ),
    "grad of vmap": (
        lambda f, x, _: grad(lambda y: vmap(f)(y).sum())(_two(x)),
        lambda f, x, _: torch.stack([_first(f, each) for each in _two(x)]),
    ),
    "jacrev": (lambda f, x, _: jacrev(lambda y: torch.stack([f(y), -f(y)]))(x)[1], lambda f, x, _: -_first(f, x)),
    "grad of grad": (lambda f, x, t: grad(lambda y: (grad(f)(y) * t).sum())(x), _second),
    "vmap of grad of grad": (lambda f, x, t: vmap(grad(lambda y: (grad(f)(y) * t).sum()))(_two(x))[0], _second),
}
FORWARD: dict[str, tuple[Transform, Transform]] = {
    "jvp": (lambda f, x, t: jvp(f, (x,), (t,))[1], lambda f, x, t: (_first(f, x) * t).sum()),
    "dual numbers": (_dual, lambda f, x, t: (_first(f, x) * t).sum()),
    "vmap of jvp": (
        lambda f, x, t: vmap(lambda y: jvp(f, (y,), (t,))[1])(_two(x)),
        lambda f, x, t: torch.stack([(_first(f, each) * t).sum() for each in _two(x)]),
    ),
    "jacfwd": (
        lambda f, x, _: jacfwd(lambda s: f(s * x))(torch.ones(()).to(x)),
        lambda f, x, _: (_first(f, x) * x).sum(),
    ),
    "jvp of grad": (lambda f, x, t: jvp(grad(f), (x,), (t,))[1], _second),
    "hessian": (
        lambda f, x, _: hessian(lambda s: f(s * x))(torch.ones(()).to(x)),
        lambda f, x, _: (_second(f, x, x) * x).sum(),
    ),
}


def _check(spec: OpSpec, backend: str | None, transform: Transform, want: Transform) -> None:
    loss, x, direction = _loss(spec, backend)
    close = {"rtol": 1e-3, "atol": 1e-4} if x.dtype == torch.float32 else {}
    torch.testing.assert_close(transform(loss, x, direction), want(loss, x, direction), **close)


@pytest.mark.parametrize(
    ("spec", "backend"),
    [pytest.param(s, x, id=f"{s.name}-{x}") for s in DIFFERENTIABLE for x in sorted({*backends(s)[:1], stand_in(s)})],
)
@pytest.mark.parametrize("transform", REVERSE)
def test_reverse_mode(spec: OpSpec, backend: str, transform: str) -> None:
    _check(spec, backend, *REVERSE[transform])


@pytest.mark.parametrize("spec", DIFFERENTIABLE, ids=lambda spec: spec.name)
@pytest.mark.parametrize("transform", FORWARD)
def test_forward_mode(spec: OpSpec, transform: str) -> None:
    """By the naive formula, as no kernel has a derivative in this direction: a forced kernel is an error."""
    _check(spec, None, *FORWARD[transform])
    loss, x, direction = _loss(spec, "chunked")
    with pytest.raises(
        NotImplementedError, match=f"^{spec.name} must have backend=None to be .* forward mode.*'chunked'"
    ):
        FORWARD[transform][0](loss, x, direction)


@pytest.mark.parametrize("spec", DIFFERENTIABLE, ids=lambda spec: spec.name)
@pytest.mark.parametrize(
    "transform",
    [
        "jvp",
        "dual numbers",
        *(pytest.param(x, marks=pytest.mark.slow) for x in ("grad", "vmap of grad", "grad of vmap")),
    ],
)
def test_compiled(spec: OpSpec, transform: str) -> None:
    """A boundary that the compiler sees has neither derivative: jvp would drop its share without a word."""
    function, want = (REVERSE | FORWARD)[transform]
    case, op = UNSEEDED[spec.name], spec.function
    name, inputs = case.grads[0], draw(case)

    def loss(x: Tensor) -> Tensor:
        found: Any = op(**inputs | {name: x})
        y: Tensor = found if isinstance(found, Tensor) else found[0]
        return y.sin().sum()

    x = inputs[name]
    direction = torch.randn_like(x)
    torch._dynamo.reset()
    compiled = partial(torch.compile, fullgraph=True, backend="aot_eager")
    if transform == "dual numbers":  # which are made outside of the graph
        found = function(compiled(loss), x, direction)
    else:
        found = compiled(lambda x: function(loss, x, direction))(x)
    torch.testing.assert_close(found, want(loss, x, direction))


@pytest.mark.parametrize("spec", DIFFERENTIABLE, ids=lambda spec: spec.name)
def test_dual_numbers_in_a_graph_that_was_made_without_are_refused(spec: OpSpec) -> None:
    case, op = UNSEEDED[spec.name], spec.function
    name, inputs = case.grads[0], draw(case)
    loss = lambda x: flatten(op(**inputs | {name: x}))[0].sum()
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    compiled(inputs[name])
    with pytest.raises(NotImplementedError, match=rf"^{spec.name} in a graph has no derivative in forward mode"):
        _dual(compiled, inputs[name], torch.ones_like(inputs[name]))


@pytest.mark.parametrize("spec", [x for x in SPECS.values() if x not in DIFFERENTIABLE], ids=lambda spec: spec.name)
def test_an_op_without_a_gradient_runs_within_a_transform(spec: OpSpec) -> None:
    case = UNSEEDED[spec.name]

    def total(x: Tensor) -> Tensor:
        found = call(spec, case, draw(case), None)
        return x * sum(y.sum() for y in found)

    want = sum(y.sum() for y in call(spec, case, draw(case), None))
    torch.testing.assert_close(torch.func.grad(total)(torch.ones((), dtype=torch.float64)).to(want), want)
