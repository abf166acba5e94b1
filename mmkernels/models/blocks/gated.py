"""The last layer of a gated feed-forward, which keeps less for its backward pass."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkernels.nn.linear_layer import is_plain, linear
from mmkernels.runtime.checks import in_graph
from mmkernels.runtime.eager import transform_active


def gated_down(gate: Tensor, up: Tensor, activation: nn.Module, down: nn.Linear) -> Tensor:
    """Returns ``down(activation(gate) * up)``, ``[..., dim]`` of ``gate [..., hidden]`` and ``up [..., hidden]``.

    The backward pass gets `gate` and `up`, and computes from them again what stands between them and the last layer:
    PyTorch would keep both it and ``activation(gate)``, half of what a gated feed-forward keeps. A graph's compiler
    decides this itself, and a layer put in place of `down`, such as LoRA's, is called as it is.
    """
    if not is_plain(down) or not torch.is_grad_enabled() or in_graph() or transform_active():
        return linear(down, activation(gate) * up)
    out: Tensor = _GatedDown.apply(gate, up, down.weight, down.bias, activation)
    return out


class _GatedDown(torch.autograd.Function):
    @staticmethod
    def forward(gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None, activation: nn.Module) -> Tensor:
        return F.linear(activation(gate) * up, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        gate, up, weight, _, ctx.activation = inputs
        ctx.save_for_backward(gate, up, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, weight = ctx.saved_tensors
        of_gate, of_up, of_weight, of_bias, _ = ctx.needs_input_grad
        twice = torch.is_grad_enabled()  # second derivatives are wanted
        if not twice:
            gate, up = gate.detach(), up.detach()
        with torch.enable_grad():
            # Leaves of a graph of their own, unless second derivatives go through them.
            g = gate if gate.requires_grad else gate.detach().requires_grad_()
            u = up if up.requires_grad else up.detach().requires_grad_()
            hidden = ctx.activation(g) * u
        wanted = [x for x, need in ((g, of_gate), (u, of_up)) if need]
        found = iter(torch.autograd.grad(hidden, wanted, grad @ weight, create_graph=twice) if wanted else ())
        by_input = [next(found) if need else None for need in (of_gate, of_up)]
        rows = grad.reshape(-1, grad.shape[-1])
        hidden = (hidden if twice else hidden.detach()).reshape(-1, hidden.shape[-1])
        return *by_input, rows.T @ hidden if of_weight else None, rows.sum(0) if of_bias else None, None
