"""A model of two towers, and one pass over its chunks, with which `CachedContrastive` is compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mmkernels

WIDTH = 12


class Model(nn.Module):
    """Two towers with dropout, and a temperature and a bias that only the loss uses."""

    def __init__(self, dropout: float = 0.3, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Linear(10, 16), nn.GELU(), nn.Dropout(dropout), nn.Linear(16, WIDTH))
        self.text = nn.Sequential(nn.Linear(6, 16), nn.Dropout(dropout), nn.GELU(), nn.Linear(16, WIDTH))
        self.log_scale = nn.Parameter(torch.tensor(1.5))
        self.bias = nn.Parameter(torch.tensor(-2.0))
        self.to(dtype)

    def encode_image(self, pixels: Tensor) -> Tensor:
        return F.normalize(self.image(pixels), dim=1)

    def encode_text(self, tokens: Tensor) -> Tensor:
        return F.normalize(self.text(tokens), dim=1)

    def info_nce(self, image: Tensor, text: Tensor, **options: Any) -> Any:
        return mmkernels.info_nce(image, text, self.log_scale.exp(), **options)

    def sigmoid(self, image: Tensor, text: Tensor) -> Tensor:
        return mmkernels.sigmoid_contrastive(image, text, self.log_scale.exp(), self.bias)


def batch(n: int = 23, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    return tuple(torch.randn(n, width, generator=generator, dtype=dtype) for width in (10, 6))  # type: ignore


def grads(model: nn.Module) -> dict[str, Tensor]:
    return {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}


def one_pass(
    encoders: Sequence[Callable[..., Tensor]], loss: Callable[..., Any], inputs: Sequence[Tensor], chunks: Sequence[int]
) -> Tensor:
    """Backpropagates the loss of all chunks in one graph."""
    features = [
        torch.cat([encoder(x) for x in rows.split(size)])
        for encoder, rows, size in zip(encoders, inputs, chunks, strict=True)
    ]
    value = loss(*features)
    value.backward()
    return value.detach()


def assert_equal(
    actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-12, what: str = ""
) -> None:
    """Relative to each gradient's largest value."""
    assert list(actual) == list(expected), f"{what}: {list(actual)}"
    for name, want in expected.items():
        apart = float((actual[name] - want).abs().max() / want.abs().max().clamp(min=1e-30))
        assert apart <= tolerance, f"{what} {name}: {apart}"
