"""Models of a named size with random weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Model = TypeVar("Model", bound=nn.Module)
Config = TypeVar("Config", bound="DataclassInstance")


def build(
    make: Callable[[Config], Model],
    sizes: Mapping[str, Config],
    size: str,
    *,
    seed: int,
    dtype: torch.dtype,
    device: torch.device | str,
    **changes: Any,
) -> Model:
    """Returns a model of a named size with random weights.

    Args:
        changes: values that replace fields of the size's configuration; None: not replaced.
    """
    if not isinstance(size, str) or size not in sizes:
        raise ValueError(f"size must be one of {', '.join(sizes)}, got {size!r}")
    check_dtype(dtype)
    config = replace(sizes[size], **{name: value for name, value in changes.items() if value is not None})
    with torch.device("meta"):
        model = make(config)
    return draw_weights(model.to_empty(device=device).to(dtype), seed)


def check_dtype(dtype: torch.dtype) -> None:
    """Raises unless `dtype` is a floating dtype."""
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating dtype, got {dtype!r}")


def draw_weights(model: Model, seed: int) -> Model:
    """Redraws every parameter in place and returns the model. The values are the same on every device.

    Norms get weight 1 and bias 0, gates are open, and all other layers have unit gain.
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
