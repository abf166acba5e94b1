"""The naive formulas that the tests of objectives share: logits are built, in float64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def head(batch: int, length: int, vocab: int = 23, dim: int = 5, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Returns hidden ``[B, L, d]``, weight ``[V, d]`` and bias ``[V]``, float64."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, length, dim), (vocab, dim), (vocab,)
    hidden, weight, bias = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return hidden, weight, bias


def logits_of(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None = None) -> Tensor:
    z = hidden @ weight.T
    z = z if bias is None else z + bias
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def token_logprobs(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """Returns ``log p(target)`` ``[B, L]``, 0 where it is negative."""
    logprobs = logits_of(hidden, weight, bias).log_softmax(-1)
    return logprobs.gather(-1, targets.clamp(min=0)[..., None])[..., 0] * (targets >= 0)


def check_against(ours: Callable[..., Tensor], formula: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Asserts that both have the same value, and the same gradient by each input, in float64."""
    results = []
    for function in (ours, formula):
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = function(*leaves)
        flows = torch.linspace(1.0, 2.0, out.numel(), dtype=out.dtype).reshape(out.shape)
        results.append((out, *torch.autograd.grad(out, leaves, flows)))
    for actual, expected in zip(*results, strict=True):
        assert actual.dtype == expected.dtype == torch.float64
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-13)
    assert all(bool(gradient.abs().sum() > 0) for gradient in results[1][1:])
