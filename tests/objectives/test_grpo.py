"""GRPO and its kin against their formulas, from rewards and hidden states to the loss, and what bad input says."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from objective_formulas import check_against, head, logits_of, token_logprobs
from torch import Tensor

import mmkernels
from mmkernels.objectives import group_advantages, grpo_loss

LENGTHS = torch.tensor([6, 3, 1, 0, 5, 6])  # the fourth answer has no token
MASK = torch.arange(6) < LENGTHS[:, None]
TARGETS = torch.randint(23, (6, 6), generator=torch.Generator().manual_seed(0)).masked_fill(~MASK, -100)
ADVANTAGES = torch.tensor([1.0, -1.5, 0.5, 2.0, -0.7, 0.0], dtype=torch.float64)
MAX_LENGTH, TOTAL = 9, 40.0
LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo")


def logprobs(seed: int = 0, spread: float = 0.3) -> tuple[Tensor, Tensor, Tensor]:
    """Returns log-probabilities, and of the models that sampled and of reference, float64 ``[B, L]``."""
    generator = torch.Generator().manual_seed(seed)
    new = -torch.rand(6, 6, generator=generator, dtype=torch.float64) * 4
    old, ref = (new + spread * torch.randn(6, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    return new, old, ref


def formula(
    new: Tensor, old: Tensor, ref: Tensor, advantages: Tensor, beta: float, low: float, high: float, loss_type: str
) -> Tensor:
    """Token by token."""
    total, rows = new.new_zeros(()), []
    for i, length in enumerate(LENGTHS.tolist()):
        row = new.new_zeros(())
        for t in range(length):
            ratio = (new[i, t] - old[i, t]).exp()
            bounded = ratio.clamp(1 - low, 1 + high)
            a = advantages[i] if advantages.dim() == 1 else advantages[i, t]
            k3 = (ref[i, t] - new[i, t]).exp() - (ref[i, t] - new[i, t]) - 1
            row = row - torch.minimum(ratio * a, bounded * a) + beta * k3
        rows.append(row / max(length, 1))
        total = total + row
    if loss_type == "grpo":
        return torch.stack(rows).mean()
    return total / {"bnpo": int(LENGTHS.sum()), "dr_grpo": 6 * MAX_LENGTH, "dapo": TOTAL}[loss_type]


@pytest.mark.parametrize("advantages", [ADVANTAGES, ADVANTAGES[:, None] * torch.linspace(0.5, 1, 6).double()])
@pytest.mark.parametrize(("beta", "low", "high"), [(0.0, 0.2, 0.2), (0.04, 0.1, 0.3)])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_loss_against_the_formula(loss_type: str, beta: float, low: float, high: float, advantages: Tensor) -> None:
    new, old, ref = logprobs()
    options = {"max_length": MAX_LENGTH, "total_tokens": TOTAL, "loss_type": loss_type, "beta": beta}
    check_against(
        lambda x: (
            grpo_loss(
                x, advantages, MASK, old_logprobs=old, ref_logprobs=ref, epsilon_low=low, epsilon_high=high, **options
            ).loss
        ),
        lambda x: formula(x, old, ref, advantages, beta, low, high, loss_type),
        new,
    )


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo"])
def test_from_hidden_states(loss_type: str) -> None:
    """The first step: the model that sampled is the one that is trained. Temperature and entropy are of the op."""
    _, _, ref = logprobs()

    def ours(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        new, entropy = mmkernels.linear_logprobs(hidden, weight, TARGETS, bias=bias, return_entropy=True)
        out = grpo_loss(new, ADVANTAGES, MASK, ref_logprobs=ref, beta=0.1, loss_type=loss_type, entropy=entropy)
        p = logits_of(hidden, weight, bias).softmax(-1)
        torch.testing.assert_close(out.entropy, -(p * p.log()).sum(-1)[MASK].mean().detach())
        return out.loss

    def expected(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        new = token_logprobs(hidden, weight, bias, TARGETS)
        return formula(new, new.detach(), ref, ADVANTAGES, 0.1, 0.2, 0.2, loss_type)

    check_against(ours, expected, *head(6, 6))


def test_metrics() -> None:
    new, old, ref = logprobs()
    out = grpo_loss(
        new.requires_grad_(), ADVANTAGES, MASK.int(), old_logprobs=old, ref_logprobs=ref, epsilon_high=0.3, entropy=-new
    )
    ratio, away = (new - old).exp(), ref - new
    torch.testing.assert_close(out.kl, (away.exp() - away - 1)[MASK].mean().detach())
    torch.testing.assert_close(out.entropy, -new[MASK].mean().detach())
    low = ((ratio < 0.8) & (ADVANTAGES[:, None] < 0))[MASK].double().mean()
    high = ((ratio > 1.3) & (ADVANTAGES[:, None] > 0))[MASK].double().mean()
    assert float(low) > 0 and float(high) > 0
    torch.testing.assert_close((out.clipped_low.double(), out.clipped_high.double()), (low, high), rtol=1e-6, atol=0)
    assert not any(x.requires_grad for x in out[1:])
    plain = grpo_loss(new, ADVANTAGES, MASK)
    assert plain.entropy is None and float(plain.kl) == float(plain.clipped_low) == 0


@pytest.mark.parametrize("loss_type", LOSSES)
def test_what_the_mask_hides_reaches_nothing(loss_type: str) -> None:
    new, old, ref = logprobs()
    options = {"loss_type": loss_type, "max_length": MAX_LENGTH, "beta": 0.1}
    results = []
    for hide in (lambda x: x, lambda x: x.masked_fill(~MASK, torch.nan), lambda x: x.masked_fill(~MASK, -torch.inf)):
        leaf = hide(new).detach().requires_grad_()
        advantages = hide(ADVANTAGES[:, None].expand(6, 6))
        out = grpo_loss(leaf, advantages, MASK, old_logprobs=hide(old), ref_logprobs=hide(ref), entropy=leaf, **options)
        results.append((*out, torch.autograd.grad(out.loss, leaf)[0]))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    assert not results[0][-1][~MASK].any() and bool(results[0][-1][MASK].any())


def test_constants_of_another_dtype_do_not_widen_the_loss() -> None:
    new, old, ref = logprobs()
    constants = {"advantages": ADVANTAGES, "old_logprobs": old, "ref_logprobs": ref.bfloat16()}
    assert grpo_loss(new.float(), mask=MASK, beta=0.1, **constants).loss.dtype == torch.float32


def test_an_empty_mask_and_no_mask() -> None:
    new, old, _ = logprobs()
    for loss_type in LOSSES:
        out = grpo_loss(new, ADVANTAGES, torch.zeros(6, 6).bool(), max_length=9, loss_type=loss_type)
        assert float(out.loss) == 0.0 and out.kl.isnan()
    every = grpo_loss(new, ADVANTAGES, old_logprobs=old).loss
    assert torch.equal(every, grpo_loss(new, ADVANTAGES, torch.ones(6, 6).bool(), old_logprobs=old).loss)
    bnpo, dapo = (grpo_loss(new, ADVANTAGES, MASK, old_logprobs=old, loss_type=name).loss for name in ("bnpo", "dapo"))
    assert torch.equal(bnpo, dapo)
    total = torch.tensor([40])
    split = grpo_loss(new, ADVANTAGES, MASK, old_logprobs=old, loss_type="dapo", total_tokens=total).loss
    torch.testing.assert_close(split * 40, dapo * MASK.sum())


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_against_the_formula(scale: str) -> None:
    rewards = torch.randn(20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = group_advantages(rewards, 5, scale=scale, eps=1e-3)
    for i in range(4):
        group = rewards[5 * i : 5 * i + 5]
        deviation = {"group": group.std(), "batch": rewards.std(), "none": 1 - 1e-3}[scale] + 1e-3
        torch.testing.assert_close(found[5 * i : 5 * i + 5], (group - group.mean()) / deviation)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_groups_that_teach_nothing(scale: str) -> None:
    nan = math.nan
    rewards = torch.tensor([0.1, 0.1, 0.1, nan, nan, nan, nan, 0.7, nan, nan, 1.0, 0.0], requires_grad=True)
    found = group_advantages(rewards, 3, scale=scale, eps=0.0)
    assert not found[:9].any() and not found.requires_grad
    assert float(found[9]) == 0.0 and float(found[10]) == -float(found[11]) > 0
    assert not group_advantages(rewards, 1, scale=scale, eps=0.0).any()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rewards": torch.zeros(2, 3)}, ValueError, r"rewards must be \[B\], got shape \(2, 3\)"),
        ({"rewards": torch.zeros(6).long()}, TypeError, "rewards must be float16"),
        ({"group_size": 4}, ValueError, "group_size must divide the number of rewards, 6; got 4"),
        ({"group_size": 0}, ValueError, "group_size must be a positive integer, got 0"),
        ({"scale": "std"}, ValueError, "scale must be one of group, batch, none, got 'std'"),
        ({"eps": -1.0}, ValueError, r"eps must be a finite number >= 0, got -1\.0"),
    ],
)
def test_bad_rewards(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        group_advantages(**{"rewards": torch.zeros(6), "group_size": 3} | change)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logprobs": torch.zeros(6)}, ValueError, r"logprobs must be \[B, L\], got shape \(6,\)"),
        ({"logprobs": torch.zeros(2, 4).long()}, TypeError, "logprobs must be float16"),
        ({"advantages": torch.zeros(3)}, ValueError, r"advantages must be \[2\] or \[2, 4\], got shape \(3,\)"),
        ({"advantages": torch.zeros(2).int()}, TypeError, "advantages must be float16"),
        ({"mask": torch.ones(2, 5).int()}, ValueError, r"mask must be \[2, 4\] as logprobs, got shape \(2, 5\)"),
        ({"mask": torch.ones(2, 4)}, TypeError, "mask must be bool or integers, got torch.float32"),
        ({"old_logprobs": torch.zeros(2)}, ValueError, r"old_logprobs must be \[2, 4\] as logprobs"),
        ({"ref_logprobs": torch.zeros(2).long()}, TypeError, "ref_logprobs must be float16"),
        ({"entropy": torch.zeros(2)}, ValueError, r"entropy must be \[2, 4\] as logprobs"),
        ({"beta": -0.1}, ValueError, r"beta must be a finite number >= 0, got -0\.1"),
        ({"beta": 0.1}, ValueError, "ref_logprobs must be given where beta is not 0, got None"),
        ({"epsilon_low": -1}, ValueError, "epsilon_low must be a finite number >= 0, got -1"),
        ({"epsilon_high": math.inf}, ValueError, "epsilon_high must be a finite number >= 0, got inf"),
        ({"loss_type": "ppo"}, ValueError, "loss_type must be one of grpo, bnpo, dr_grpo, dapo, got 'ppo'"),
        ({"loss_type": "dr_grpo"}, ValueError, 'max_length must be given with loss_type "dr_grpo", got None'),
        ({"loss_type": "dr_grpo", "max_length": 0}, ValueError, "max_length must be a positive integer, got 0"),
        ({"loss_type": "dapo", "total_tokens": 0}, ValueError, "total_tokens must be a tensor or a finite number >= 1"),
        ({"loss_type": "dapo", "total_tokens": torch.ones(2)}, ValueError, "total_tokens must have one element"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        grpo_loss(**{"logprobs": torch.zeros(2, 4), "advantages": torch.zeros(2)} | change)
