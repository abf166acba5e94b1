"""Random weights for models that are built by size."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)


def draw_weights(model: Model, seed: int) -> Model:
    """Redraw every parameter in place, alike on every device: norms that do nothing, open gates, unit gain elsewhere.

    Returns:
        `model`.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_draw(name, parameter, generator))
    return model


def _draw(name: str, parameter: Tensor, generator: torch.Generator) -> Tensor:
    if name.endswith("_gate") or (parameter.dim() == 1 and name.endswith("weight")):
        return torch.ones(parameter.shape)
    if name.endswith("bias"):
        return torch.zeros(parameter.shape)
    fan_in = parameter[0].numel() if parameter.dim() > 1 else parameter.numel()
    return torch.randn(parameter.shape, generator=generator) * fan_in**-0.5
