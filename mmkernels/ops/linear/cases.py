"""Inputs of the linear ops' cases and benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor

from mmkernels.ops.common.cases import normal
from mmkernels.spec import Cost, Inputs


def head(
    g: Generator, rows: int, tokens: int, dim: int, scale: float = 4.0, transposed: bool = False, strided: bool = False
) -> tuple[Tensor, Tensor]:
    """Returns hidden [rows, dim] and weight [tokens, dim] in float64, whose products have the deviation `scale`."""
    hidden = normal(g, rows, dim * (2 if strided else 1))
    weight = normal(g, dim, tokens).mT if transposed else normal(g, tokens, dim)
    return (hidden[:, ::2] if strided else hidden), weight * (scale * dim**-0.5)


def targets(g: Generator, rows: int, tokens: int, ignored: float = 0.0, ignore_index: int = -100) -> Tensor:
    """Returns int64 [rows], of which a share is ignored."""
    target = torch.randint(tokens, (rows,), generator=g)
    return target.masked_fill(torch.rand(rows, generator=g) < ignored, ignore_index)


def inputs_of(
    g: Generator,
    rows: int,
    tokens: int,
    dim: int,
    *,
    ignored: float = 0.0,
    bias: bool = False,
    scale: float = 4.0,
    transposed: bool = False,
    strided: bool = False,
    **options: Any,
) -> Inputs:
    """Returns the arguments of `linear_logprobs`."""
    hidden, weight = head(g, rows, tokens, dim, scale, transposed, strided)
    inputs: Inputs = {"hidden": hidden, "weight": weight, "target": targets(g, rows, tokens, ignored)}
    if bias:
        inputs["bias"] = normal(g, tokens)
    return inputs | options


def large(g: Generator, rows: int, tokens: int, dim: int, ignored: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Returns hidden, weight and targets of a published head, drawn in float32 on the generator's device."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, device=g.device)

    hidden, weight = draw(rows, dim), draw(tokens, dim).mul_(4.0 * dim**-0.5)
    target = torch.randint(tokens, (rows,), generator=g, device=g.device)
    return hidden, weight, target.masked_fill(torch.rand(rows, generator=g, device=g.device) < ignored, -100)


def linear_cost(products: int, names: tuple[str, str] = ("hidden", "weight")) -> Callable[[Inputs, bool], Cost]:
    """Returns the cost of an op with one matrix product forward, and `products` in a training step."""

    def cost(inputs: Inputs, backward: bool) -> Cost:
        hidden, weight = (inputs[name] for name in names)
        target = inputs["target"]
        live = int((target != inputs.get("ignore_index", -100)).sum()) if target.dtype == torch.int64 else len(target)
        product = 2.0 * live * weight.numel()
        read = (hidden.numel() + weight.numel()) * hidden.element_size()
        return Cost(product * (products if backward else 1), read * (3 if backward else 1))

    return cost
