"""Second derivatives of an op by its naive formula, differentiated twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def second_derivatives(
    formula: Callable[[list[Any]], Sequence[Tensor]],
    tensors: Sequence[Tensor | None],
    places: Sequence[int],
    cotangents: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """What flows back through an op's backward pass.

    Args:
        formula: the op's tensors -> its outputs, differentiable.
        tensors: of the op.
        places: of the tensors whose gradients the backward pass gave.
        cotangents: what it was given for each output; None: nothing.
        grads: what comes back for the gradient of each place; None: nothing.

    Returns:
        the gradients of the cotangents, and of the tensors at `places`.
    """
    again = torch.is_grad_enabled()
    with torch._C._DisableAutocast(), torch.enable_grad():
        given = [_apart(x) if n in places and x is not None else x for n, x in enumerate(tensors)]
        directions = [None if x is None else _apart(x) for x in cotangents]
        outputs = [(y, g) for y, g in zip(formula(given), directions, strict=True) if g is not None]
        leaves = [x for n in places if (x := given[n]) is not None]
        first = torch.autograd.grad(
            [y for y, _ in outputs], leaves, [g for _, g in outputs], create_graph=True, allow_unused=True
        )
        wanted = [g for n, g in zip(places, grads, strict=True) if given[n] is not None]
        back = [(x, g) for x, g in zip(first, wanted, strict=True) if x is not None and g is not None]
        if not back:
            return [None] * len(directions), [None] * len(places)
        inputs = [g for _, g in outputs] + leaves
        second = list(
            torch.autograd.grad(
                [x for x, _ in back], inputs, [g for _, g in back], create_graph=again, allow_unused=True
            )
        )
    of_directions = [None if g is None else second.pop(0) for g in directions]
    return of_directions, [None if given[n] is None else second.pop(0) for n in places]


def _apart(x: Tensor) -> Tensor:
    """x as a node of its own: a cotangent may itself come from an input, and that path is not this function's."""
    return x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
