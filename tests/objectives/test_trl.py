"""DPO and GRPO against the losses of trl's trainers, which get their log-probabilities from the test.

The trainers' `_compute_loss` is called with an object that has what it reads, instead of a trainer with a model.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mmkernels.objectives import dpo_loss, group_advantages, grpo_loss

trl = pytest.importorskip("trl", minversion="1.16")

BATCH, LENGTH = 4, 6  # pairs, or answers, and tokens
MASK = torch.arange(LENGTH) < torch.tensor([6, 3, 1, 5, 2, 6, 4, 6])[:, None]
ALONE = SimpleNamespace(  # a process of one
    device=torch.device("cpu"),
    num_processes=1,
    gather=lambda x: x,
    gather_for_metrics=lambda x: x,
    reduce=lambda x, reduction: x,
)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def trl_dpo(tokens: Tensor, references: Tensor, loss_type: str, beta: float, smoothing: float) -> tuple[Tensor, Any]:
    """Returns trl's loss and metrics for tokens' log-probabilities ``[2 B, L]``, the chosen answers first."""
    completion = torch.cat([torch.zeros(2 * BATCH, 1, dtype=torch.long), MASK.long()], dim=1)  # a prompt of one token
    zeros = torch.zeros_like(tokens)
    outputs = SimpleNamespace(log_probs=tokens, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=ALONE, aux_loss_enabled=False, ld_alpha=None,
        precompute_ref_logps=True, f_divergence_type="reverse_kl", loss_types=[loss_type], loss_weights=[1.0],
        beta=beta, label_smoothing=smoothing, use_weighting=False, _total_train_tokens=0, _tp_size=1,
        _metrics={"train": defaultdict(list)},
    )  # fmt: skip
    chosen, rejected = references.chunk(2)
    inputs = {
        "input_ids": completion, "attention_mask": completion, "completion_mask": completion,
        "ref_chosen_logps": chosen, "ref_rejected_logps": rejected,
    }  # fmt: skip
    loss = trl.DPOTrainer._compute_loss(trainer, lambda **given: outputs, inputs, False)
    return loss, trainer._metrics["train"]


@pytest.mark.parametrize(("loss_type", "smoothing"), [("sigmoid", 0.0), ("robust", 0.2), ("hinge", 0.0), ("ipo", 0.0)])
def test_dpo(loss_type: str, smoothing: float) -> None:
    tokens = (draw(2 * BATCH, LENGTH, seed=0) - 2).mul(MASK).requires_grad_()
    references = (tokens.detach().sum(1) + draw(2 * BATCH, seed=1)).detach()
    theirs, metrics = trl_dpo(tokens, references, loss_type, 0.3, smoothing)
    divisor = MASK.sum(1) if loss_type == "ipo" else torch.ones(2 * BATCH)  # trl divides for "ipo" by itself
    chosen, rejected = (tokens.sum(1) / divisor).chunk(2)
    ref_chosen, ref_rejected = (references / divisor).chunk(2)
    ours = dpo_loss(
        chosen, rejected, ref_chosen, ref_rejected, beta=0.3, loss_type=loss_type, label_smoothing=smoothing
    )
    torch.testing.assert_close(ours.loss, theirs)
    torch.testing.assert_close(torch.autograd.grad(ours.loss, tokens), torch.autograd.grad(theirs, tokens))
    if loss_type != "ipo":
        assert float(ours.chosen_rewards.mean()) == pytest.approx(metrics["rewards/chosen"][0])
        assert float(ours.rejected_rewards.mean()) == pytest.approx(metrics["rewards/rejected"][0])
        assert float(ours.margins.mean()) == pytest.approx(metrics["rewards/margins"][0])
        assert float(ours.accuracy) == pytest.approx(metrics["rewards/accuracies"][0])


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
def test_grpo(loss_type: str, beta: float) -> None:
    new = (draw(2 * BATCH, LENGTH, seed=0) - 2).requires_grad_()
    old, ref = (new.detach() + 0.3 * draw(2 * BATCH, LENGTH, seed=seed) for seed in (1, 2))
    entropy, advantages = draw(2 * BATCH, LENGTH, seed=3).abs(), draw(2 * BATCH, seed=4)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=ALONE, aux_loss_enabled=False, top_entropy_quantile=1.0,
        off_policy_mask_threshold=None, importance_sampling_level="token", beta=beta, loss_type=loss_type,
        epsilon_low=0.1, epsilon_high=0.3, use_vllm=False, current_gradient_accumulation_steps=1,
        max_completion_length=9, _entropy_bonus_enabled=False, _metrics={"train": defaultdict(list)},
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        _get_per_token_logps_and_entropies=lambda *args, **options: (new, entropy, None),
    )  # fmt: skip
    prompt = torch.ones(2 * BATCH, 1, dtype=torch.long)
    inputs = {
        "prompt_ids": prompt, "prompt_mask": prompt, "completion_ids": MASK.long(), "completion_mask": MASK.long(),
        "advantages": advantages, "old_per_token_logps": old, "ref_per_token_logps": ref,
        "num_items_in_batch": torch.tensor(40),
    }  # fmt: skip
    theirs = trl.GRPOTrainer._compute_loss(trainer, None, inputs)
    ours = grpo_loss(
        new, advantages, MASK, old_logprobs=old, ref_logprobs=ref, beta=beta, epsilon_low=0.1, epsilon_high=0.3,
        loss_type=loss_type, max_length=9, total_tokens=40, entropy=entropy,
    )  # fmt: skip
    torch.testing.assert_close(ours.loss, theirs)
    torch.testing.assert_close(torch.autograd.grad(ours.loss, new), torch.autograd.grad(theirs, new))
    metrics = trainer._metrics["train"]
    assert float(ours.entropy) == pytest.approx(metrics["entropy"][0])
    assert float(ours.clipped_low) == pytest.approx(metrics["clip_ratio/low_mean"][0])
    assert float(ours.clipped_high) == pytest.approx(metrics["clip_ratio/high_mean"][0])
    if beta:
        assert float(ours.kl) == pytest.approx(metrics["kl"][0])


def test_the_deviation_of_advantages() -> None:
    from trl.trainer.utils import nanstd

    rewards = draw(12, seed=0)
    rewards[4] = torch.nan
    groups = rewards.view(4, 3)
    theirs = (groups - groups.nanmean(1, keepdim=True)) / (nanstd(groups, dim=1, keepdim=True) + 1e-4)
    torch.testing.assert_close(group_advantages(rewards, 3), theirs.nan_to_num(0.0).flatten())
