"""Gradients that lose digits easily: of a mean in float16, of logits near their cap. See also the cases of each op."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from harness import SPECS, backends, each_backend, generator
from torch import Tensor

import mmkernels

Loss = Callable[[Tensor, Tensor], Tensor]


def gradients(loss: Loss, hidden: Tensor, weight: Tensor, scale: float = 1.0) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in (hidden, weight)]
    return [x.double() for x in torch.autograd.grad(loss(*leaves) * scale, leaves)]


def error(ours: Tensor, exact: Tensor) -> float:
    return float((ours - exact).norm() / exact.norm())


@each_backend("linear_cross_entropy", interpreted=False)
def test_small_gradients_in_float16(backend: str) -> None:
    """As of a mean over many tokens: those of logits are below float16's least number until a loss scale multiplies."""
    g = generator(5)
    hidden, weight = torch.randn(64, 16, generator=g).half(), (0.1 * torch.randn(1000, 16, generator=g)).half()
    target, classes = torch.randint(1000, (64,), generator=g), torch.full((1000,), 2.0**-15)

    def naive(h: Tensor, w: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(h, w), target, classes.to(h.dtype), reduction="sum")

    def fused(h: Tensor, w: Tensor) -> Tensor:
        return mmkernels.linear_cross_entropy(h, w, target, weight=classes, reduction="sum", backend=backend)

    exact = gradients(naive, hidden.double(), weight.double(), 2.0**16)
    ours = gradients(fused, hidden, weight, 2.0**16)
    assert all(error(x, y) < 2.0**-11 for x, y in zip(ours, exact, strict=True))


def test_a_bad_row_does_not_reach_the_scale_of_float16() -> None:
    hidden, weight = torch.randn(4, 8, generator=generator(6)).half(), torch.randn(50, 8, generator=generator(7)).half()
    hidden[1] = torch.nan
    of_hidden, _ = gradients(
        lambda h, w: mmkernels.linear_cross_entropy(h, w, torch.arange(4), backend="chunked"), hidden, weight
    )
    assert of_hidden[[0, 2, 3]].isfinite().all() and (of_hidden[[0, 2, 3]] != 0).any()


def test_large_weights_in_float16() -> None:
    """What is multiplied so that float16 holds it does not overflow: the gradients are 20,000 each."""
    hidden, weight = torch.full((3, 1), 1e-3).half(), torch.tensor([[30000.0], [-30000.0]] * 25).half()
    of_hidden, _ = gradients(
        lambda h, w: mmkernels.linear_cross_entropy(h, w, torch.ones(3).long(), backend="chunked"), hidden, weight
    )
    torch.testing.assert_close(of_hidden, torch.full((3, 1), 20000.0, dtype=torch.float64), rtol=1e-3, atol=0.0)


@each_backend("linear_cross_entropy", interpreted=False)
def test_gradients_of_capped_logits(backend: str) -> None:
    """The slope 1 - tanh^2 is near 0, so that tanh must not be taken back from rounded logits."""
    ours, theirs = [], []
    for seed in range(12):
        g = generator(20 + seed)
        hidden, weight = torch.randn(5, 33, generator=g), torch.randn(64, 33, generator=g) * 17.0
        target = torch.randint(64, (5,), generator=g)

        def naive(h: Tensor, w: Tensor, target: Tensor = target) -> Tensor:
            return F.cross_entropy(7.0 * torch.tanh(F.linear(h, w) / 7.0), target)

        def fused(h: Tensor, w: Tensor, target: Tensor = target) -> Tensor:
            return mmkernels.linear_cross_entropy(h, w, target, softcap=7.0, backend=backend)

        exact = gradients(naive, hidden.double(), weight.double())
        ours.append([error(x, y) for x, y in zip(gradients(fused, hidden, weight), exact, strict=True)])
        theirs.append([error(x, y) for x, y in zip(gradients(naive, hidden, weight), exact, strict=True)])
    assert all(
        x <= 2 * y + 1e-7 for mine, own in zip(ours, theirs, strict=True) for x, y in zip(mine, own, strict=True)
    )


def test_smoothed_targets_near_the_probabilities() -> None:
    """In bfloat16 a probability may differ from a smoothed target by less than its own rounding."""
    g = generator(9)
    hidden, weight = torch.randn(16, 32, generator=g).bfloat16(), (torch.randn(64, 32, generator=g) * 2e-3).bfloat16()
    target = torch.randint(64, (16,), generator=g)
    step = lambda backend, *x: gradients(
        lambda h, w: mmkernels.linear_cross_entropy(h, w, target, label_smoothing=1.0, backend=backend), *x
    )
    exact = step("reference", hidden.double(), weight.double())
    theirs = step("reference", hidden, weight)
    for backend in backends(SPECS["linear_cross_entropy"], torch.bfloat16):
        for x, y, z in zip(step(backend, hidden, weight), theirs, exact, strict=True):
            assert error(x, z) <= 2 * error(y, z) + 1e-7, backend
