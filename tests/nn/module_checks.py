"""What tests of modules share: the same results and gradients as another module's, and bad input."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import pytest
import torch
from torch import Tensor, nn


def equal_to(
    ours: nn.Module,
    theirs: nn.Module,
    names: dict[str, str],
    call: Callable[[nn.Module, Tensor], Tensor],
    their_call: Callable[[nn.Module, Tensor], Tensor],
    x: Tensor,
    rounding: float = 1e-10,
) -> None:
    """Asserts that two modules with the same parameters have the same results, and gradients of x and all parameters.

    In float64 but for rounding, and in float32, on the default backend, with at most twice the error of `theirs`: the
    largest of all results, each relative to its largest value.

    Args:
        names: what a parameter's name in `ours` starts with -> in `theirs`; each of both has its counterpart.
        x: float64.
        rounding: of `theirs` in float64; some classes compute parts in float32 always.
    """
    mine, others = zip(*_pairs(ours, theirs, names))
    parameters, weights = dict(ours.double().named_parameters()), dict(theirs.double().named_parameters())
    ours.load_state_dict({name: weights[other].view_as(parameters[name]) for name, other in zip(mine, others)})
    truth = _results(ours, call, x, mine)
    expected = _results(theirs, their_call, x, others)
    for name, y, want in zip(("the result", "x", *mine), truth, expected, strict=True):
        close = {"rtol": rounding, "atol": rounding, "msg": lambda text, name=name: f"{name}: {text}"}
        torch.testing.assert_close(y, want.view_as(y), **close)
    baseline = _results(theirs.float(), their_call, x.float(), others)
    found = _results(ours.float(), call, x.float(), mine)
    largest = max(float(want.abs().max()) for want in truth)
    # A gradient that is 0, such as that of a key's bias, is a sum of terms that cancel: its rounding has their size.
    sizes = [size if (size := float(want.abs().max())) > 1e-12 * largest else largest for want in truth]
    error, budget = (
        max(float((y.view_as(want) - want).abs().max()) / size for y, want, size in zip(ys, truth, sizes, strict=True))
        for ys in (found, baseline)
    )
    assert error <= 2.0 * budget + 1e-6, (error, budget)


def _pairs(ours: nn.Module, theirs: nn.Module, names: dict[str, str]) -> list[tuple[str, str]]:
    """Returns the names of each parameter in both modules."""
    mine = [name for name, _ in ours.named_parameters()]
    starts = {name: next(start for start in names if name.startswith(start)) for name in mine}
    pairs = [(name, names[start] + name.removeprefix(start)) for name, start in starts.items()]
    assert sorted(other for _, other in pairs) == sorted(name for name, _ in theirs.named_parameters())
    return pairs


def _results(
    module: nn.Module, call: Callable[[nn.Module, Tensor], Tensor], x: Tensor, order: Sequence[str]
) -> tuple[Tensor, ...]:
    """Returns the result, and the gradients of x and of the parameters, in the order of their names."""
    x = x.clone().requires_grad_()
    y = call(module, x)
    flow = torch.cos(torch.arange(y.numel(), dtype=torch.float64)).view(y.shape).to(y.dtype)
    parameters = dict(module.named_parameters())
    return y.detach(), *torch.autograd.grad(y, [x, *(parameters[name] for name in order)], flow)


def refused(calls: Iterable[tuple[Callable[[], object], type[Exception], str]]) -> None:
    for call, error, match in calls:
        with pytest.raises(error, match=match):
            call()
