"""DPO and its kin against their formulas, from hidden states to the loss, and what bad input says."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from objective_formulas import check_against, head, token_logprobs
from torch import Tensor

from mmkernels.objectives import dpo_loss, sequence_logprobs

TARGETS = torch.randint(23, (6, 7), generator=torch.Generator().manual_seed(0))
TARGETS[0, :4] = TARGETS[1, 2:] = TARGETS[4, 1:6] = -100
TARGETS[5] = -100  # a sequence without a target

VARIANTS = [("sigmoid", 0.0), ("sigmoid", 0.2), ("robust", 0.2), ("hinge", 0.0), ("ipo", 0.0)]


def pairs(count: int = 8, seed: int = 0) -> list[Tensor]:
    """Returns chosen, rejected and both references, float64 ``[B]``."""
    generator = torch.Generator().manual_seed(seed)
    return list(-20 + 8 * torch.randn(4, count, generator=generator, dtype=torch.float64))


def log_sigmoid(x: Tensor) -> Tensor:
    return -torch.log(1 + torch.exp(-x))


def formula(
    chosen: Tensor, rejected: Tensor, references: list[Tensor], beta: float, loss_type: str, e: float
) -> Tensor:
    h = (chosen - references[0]) - (rejected - references[1])
    right, wrong = -log_sigmoid(beta * h), -log_sigmoid(-beta * h)
    return {
        "sigmoid": (1 - e) * right + e * wrong,
        "robust": ((1 - e) * right - e * wrong) / (1 - 2 * e),
        "hinge": (1 - beta * h).clamp(min=0),
        "ipo": (h - 1 / (2 * beta)) ** 2,
    }[loss_type]


@pytest.mark.parametrize("average", [False, True])
def test_sequence_logprobs_against_the_formula(average: bool) -> None:
    def expected(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        total = token_logprobs(hidden, weight, bias, TARGETS).sum(1)
        return total / (TARGETS >= 0).sum(1).clamp(min=1) if average else total

    inputs = head(6, 7)
    check_against(lambda h, w, b: sequence_logprobs(h, w, TARGETS, bias=b, average=average), expected, *inputs)
    assert float(sequence_logprobs(*inputs[:2], TARGETS, average=average)[5]) == 0.0


@pytest.mark.parametrize(("loss_type", "smoothing"), VARIANTS)
def test_loss_against_the_formula(loss_type: str, smoothing: float) -> None:
    """From hidden states and weights of the head on."""
    references = pairs(3, seed=1)[:2]

    def ours(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        chosen, rejected = sequence_logprobs(hidden, weight, TARGETS, bias=bias, average=loss_type == "ipo").chunk(2)
        return dpo_loss(chosen, rejected, *references, beta=0.3, loss_type=loss_type, label_smoothing=smoothing).loss

    def expected(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        tokens = token_logprobs(hidden, weight, bias, TARGETS)
        total = tokens.sum(1) / ((TARGETS >= 0).sum(1).clamp(min=1) if loss_type == "ipo" else 1)
        return formula(total[:3], total[3:], references, 0.3, loss_type, smoothing).mean()

    check_against(ours, expected, *head(6, 7))


@pytest.mark.parametrize(("loss_type", "smoothing"), VARIANTS)
def test_gradients_by_the_log_probabilities(loss_type: str, smoothing: float) -> None:
    chosen, rejected, *references = pairs()
    options = {"beta": 0.3, "loss_type": loss_type, "label_smoothing": smoothing}
    for reduction in ("none", "sum", "mean"):

        def ours(a: Tensor, b: Tensor, reduction: str = reduction) -> Tensor:
            return dpo_loss(a, b, *references, reduction=reduction, **options).loss

        def expected(a: Tensor, b: Tensor, reduction: str = reduction) -> Tensor:
            losses = formula(a, b, references, 0.3, loss_type, smoothing)
            return losses if reduction == "none" else getattr(losses, reduction)()

        check_against(ours, expected, chosen, rejected)


def test_metrics() -> None:
    chosen, rejected, ref_chosen, ref_rejected = inputs = pairs()
    out = dpo_loss(*(x.requires_grad_() for x in inputs), beta=0.25)
    torch.testing.assert_close(out.chosen_rewards, 0.25 * (chosen - ref_chosen).detach())
    torch.testing.assert_close(out.rejected_rewards, 0.25 * (rejected - ref_rejected).detach())
    torch.testing.assert_close(out.margins, out.chosen_rewards - out.rejected_rewards)
    assert 0 < float(out.accuracy) < 1 and float(out.accuracy) == float((out.margins > 0).double().mean())
    assert not any(x.requires_grad for x in out[1:])
    out.loss.backward()
    assert chosen.grad is not None and ref_chosen.grad is None and ref_rejected.grad is None


def test_a_masked_pair_is_a_constant_and_large_margins_are_finite() -> None:
    zero = torch.zeros(1, requires_grad=True)
    out = dpo_loss(zero, zero, zero, zero)
    assert out.loss.item() == pytest.approx(math.log(2)) and float(out.accuracy) == 0.0
    far = torch.tensor([1e4], requires_grad=True)
    for sign in (-1, 1):
        loss = dpo_loss(sign * far, -sign * far, zero, zero, beta=1.0).loss
        assert loss.isfinite() and torch.autograd.grad(loss, far)[0].isfinite()
    assert dpo_loss(*torch.zeros(4, 0)).loss.isnan()
    wide = zero.detach().double()
    assert all(x.dtype == torch.float32 for x in dpo_loss(zero, zero, wide, wide))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"chosen_logprobs": torch.zeros(2, 3)}, ValueError, r"chosen_logprobs must be \[B\], got shape \(2, 3\)"),
        ({"rejected_logprobs": torch.zeros(3)}, ValueError, r"rejected_logprobs must be \[2\] as chosen_logprobs"),
        ({"ref_chosen_logprobs": torch.zeros(2).long()}, TypeError, "ref_chosen_logprobs must be float16"),
        ({"ref_rejected_logprobs": None}, TypeError, "ref_rejected_logprobs must be a tensor, got NoneType"),
        ({"beta": -0.1}, ValueError, r"beta must be a finite number above 0, got -0\.1"),
        ({"beta": 0}, ValueError, "beta must be a finite number above 0, got 0"),
        ({"beta": math.nan}, ValueError, "beta must be a finite number above 0, got nan"),
        ({"loss_type": "dpo"}, ValueError, "loss_type must be one of sigmoid, robust, hinge, ipo, got 'dpo'"),
        ({"label_smoothing": 0.5}, ValueError, r"label_smoothing must be a number from 0 to below 0\.5, got 0\.5"),
        ({"label_smoothing": 0.1, "loss_type": "ipo"}, ValueError, "label_smoothing must be 0 with loss_type 'ipo'"),
        ({"reduction": "batchmean"}, ValueError, "reduction must be one of mean, sum, none"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    names = ("chosen_logprobs", "rejected_logprobs", "ref_chosen_logprobs", "ref_rejected_logprobs")
    with pytest.raises(error, match=message):
        dpo_loss(**dict.fromkeys(names, torch.zeros(2)) | change)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"targets": TARGETS[0]}, ValueError, r"targets must be \[B, L\]"),
        ({"targets": TARGETS[:5]}, ValueError, r"hidden must be \[5, 7, d\] as targets, got shape \(6, 7, 5\)"),
        ({"average": "no"}, TypeError, "average must be a bool, got str"),
    ],
)
def test_bad_input_of_sequences(change: dict[str, Any], error: type[Exception], message: str) -> None:
    hidden, weight, _ = head(6, 7)
    with pytest.raises(error, match=message):
        sequence_logprobs(**{"hidden": hidden, "weight": weight, "targets": TARGETS} | change)
