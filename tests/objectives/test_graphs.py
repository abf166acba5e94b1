"""Every objective is one graph for ``torch.compile``, and takes 16-bit inputs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from objective_formulas import head
from torch import Generator, Tensor

import mmkernels
from mmkernels import objectives
from mmkernels.nn import LinearCrossEntropyLoss

HIDDEN, WEIGHT, _ = head(4, 9)
IDS = torch.randint(23, (4, 9), generator=Generator().manual_seed(0))
MASK = torch.arange(9) < torch.tensor([9, 4, 7, 9])[:, None]


def generation(hidden: Tensor, weight: Tensor) -> Tensor:
    given = {"prompt_lengths": torch.tensor([1, 2, 3, 4]), "image_mask": IDS == 5, "attention_mask": MASK}
    return objectives.conditional_generation_loss(hidden, weight, IDS, **given)


def masked_language(hidden: Tensor, weight: Tensor) -> Tensor:
    targets = objectives.mask_tokens(IDS, 4, 23, special_ids=(0, 1), probability=1.0, attention_mask=MASK).targets
    return objectives.masked_language_modelling_loss(hidden, weight, targets)


def matching(hidden: Tensor, weight: Tensor) -> Tensor:
    image, text = hidden[:, 0], hidden[:, 1]
    pairs = objectives.matching_pairs(image, text, 1e6)  # so sharp that only the hardest are drawn
    return objectives.image_text_matching_loss(image[pairs.images] * text[pairs.texts], weight[:2], pairs.labels)


def preferences(hidden: Tensor, weight: Tensor) -> Tensor:
    targets = objectives.generation_targets(IDS, prompt_lengths=3)
    chosen, rejected = objectives.sequence_logprobs(hidden, weight, targets).chunk(2)
    return objectives.dpo_loss(chosen, rejected, rejected.detach(), chosen.detach()).loss


def rewards(hidden: Tensor, weight: Tensor) -> Tensor:
    logprobs, entropy = mmkernels.linear_logprobs(hidden, weight, IDS.masked_fill(~MASK, -100), return_entropy=True)
    advantages = objectives.group_advantages(torch.tensor([1.0, 0.0, 0.0, 1.0]), 4)
    return objectives.grpo_loss(
        logprobs, advantages, MASK, ref_logprobs=logprobs.detach() - 0.1, beta=0.1, entropy=entropy
    ).loss


def module(hidden: Tensor, weight: Tensor) -> Tensor:
    loss = LinearCrossEntropyLoss(lse_square_scale=0.01, return_z_loss=True, use_token_scaling=True)
    return loss(weight, hidden.flatten(0, 1), IDS.flatten()).loss


FUNCTIONS = (generation, masked_language, matching, preferences, rewards, module)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_one_graph(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    leaves = [x.clone().requires_grad_() for x in (HIDDEN, WEIGHT)]
    results = []
    for run in (compiled, function):
        loss = run(*leaves)
        results.append((loss, *torch.autograd.grad(loss, leaves)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_16_bit_inputs(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    """In bfloat16, and in float32 under autocast: the loss is float32, and right but for bfloat16's rounding."""
    exact = function(HIDDEN, WEIGHT)
    low = [x.bfloat16().requires_grad_() for x in (HIDDEN, WEIGHT)]
    loss = function(*low)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=0.05, atol=0.02)
    assert all(x.dtype == torch.bfloat16 and x.isfinite().all() for x in torch.autograd.grad(loss, low))
    with torch.autocast("cpu", torch.bfloat16):
        automatic = function(HIDDEN.float(), WEIGHT.float())
    assert automatic.dtype == torch.float32
    torch.testing.assert_close(automatic.double(), exact, rtol=0.05, atol=0.02)
