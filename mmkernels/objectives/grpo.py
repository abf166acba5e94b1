"""Group relative policy optimisation: answers that were rewarded above the mean of their group become more likely."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mmkernels.nn.checks import check_choice, check_positive
from mmkernels.objectives.checks import check_pair_values, check_shape, checked_mask
from mmkernels.runtime.checks import check_floating, check_number

_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo")


def group_advantages(rewards: Tensor, group_size: int, *, scale: str = "group", eps: float = 1e-4) -> Tensor:
    """Returns how much better than its group each answer was: ``(r - mean(r)) / (std(r) + eps)``.

    Args:
        rewards: floating ``[B]``, as a verifier gave them; each `group_size` in a row answer one prompt. NaN: the
            verifier has no opinion; the answer does not count in its group, and its advantage is 0.
        group_size: how many answers a prompt has; B is a multiple.
        scale: "group": the standard deviation (with Bessel's correction) of the group; "batch": of all rewards; "none":
            the difference is not divided (Dr. GRPO).
        eps: >= 0, added to the standard deviation.

    Returns:
        ``[B]`` in rewards' dtype, no gradient. In a group whose rewards are all equal, of one answer or without a
        reward that is a number, all advantages are exactly 0: it teaches nothing.

    Raises:
        TypeError: a wrong dtype or type. ValueError: a wrong shape or choice, a negative eps, or B is no multiple of
            `group_size`.

    Source: Shao et al., "DeepSeekMath", 2024, section 4.1.2; "none": Liu et al., "Understanding R1-Zero-Like Training"
    (Dr. GRPO), 2025. Names are those of trl's ``scale_rewards``.

    Example:
        >>> import torch
        >>> from mmkernels.objectives import group_advantages
        >>> group_advantages(torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0]), 4, scale="none")
        tensor([ 0.5000, -0.5000,  0.5000, -0.5000,  0.0000,  0.0000,  0.0000,  0.0000])
    """
    check_pair_values("rewards", rewards)
    check_positive("group_size", group_size)
    check_choice("scale", scale, ("group", "batch", "none"))
    check_number("eps", eps, "a finite number >= 0", 0.0)
    if rewards.shape[0] % group_size:
        raise ValueError(f"group_size must divide the number of rewards, {rewards.shape[0]}; got {group_size}")
    groups = rewards.detach().reshape(-1, group_size)
    centred = groups - groups.nanmean(1, keepdim=True)
    if scale != "none":
        deviation = _deviation(groups, groups) if scale == "group" else _deviation(rewards.detach()[None], groups)
        centred = centred / (deviation + eps)
    # Equal rewards differ from their rounded mean, and a small eps would enlarge that.
    unknown = groups.isnan()
    largest = groups.masked_fill(unknown, -torch.inf).amax(1, keepdim=True)
    equal = ((groups == largest) | unknown).all(1, keepdim=True)
    return centred.masked_fill(equal | unknown, 0).flatten()


def _deviation(x: Tensor, like: Tensor) -> Tensor:
    """Returns the standard deviation of each row's numbers, NaN left out."""
    count = (~x.isnan()).sum(1, keepdim=True)
    squares = (x - x.nanmean(1, keepdim=True)).square().nansum(1, keepdim=True)
    return (squares / (count - 1).clamp(min=1)).sqrt().to(like.dtype)


class GRPOResult(NamedTuple):
    """What `grpo_loss` returns. All but `loss` are metrics: scalars without a gradient, means over all tokens.

    Args:
        loss: a scalar.
        kl: the estimated divergence from the reference model; 0 without one.
        entropy: the mean of the given entropies; None without them.
        clipped_low, clipped_high: the share of tokens whose ratio was clipped, by each bound.
    """

    loss: Tensor
    kl: Tensor
    entropy: Tensor | None
    clipped_low: Tensor
    clipped_high: Tensor


def grpo_loss(
    logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    beta: float = 0.0,
    epsilon_low: float = 0.2,
    epsilon_high: float | None = None,
    loss_type: str = "grpo",
    max_length: int | None = None,
    total_tokens: Tensor | float | None = None,
    entropy: Tensor | None = None,
) -> GRPOResult:
    """The clipped policy-gradient loss of sampled answers, by the log-probabilities of their tokens.

    With ``r = exp(logprobs - old_logprobs)`` and ``q = ref_logprobs - logprobs``, the loss of a token is

    ``-min(r A, clip(r, 1 - epsilon_low, 1 + epsilon_high) A) + beta (exp(q) - q - 1)``

    where the last factor is the k3 estimate of the divergence from the reference model. B answers become one number:

    ========= ================================================================================== =====================
    loss_type the losses' sum over ...                                                           source
    ========= ================================================================================== =====================
    "grpo"    each answer's tokens, divided by their number; then the mean over answers          DeepSeekMath
    "bnpo"    all tokens of this batch, divided by their number                                  trl's name
    "dr_grpo" all tokens, divided by B `max_length`                                              Dr. GRPO
    "dapo"    all tokens, divided by `total_tokens`                                              DAPO
    ========= ================================================================================== =====================

    Args:
        logprobs: floating ``[B, L]`` of the model that is trained: what `mmkernels.linear_logprobs` returns for the
            answers' tokens, at the temperature that they were sampled with.
        advantages: floating ``[B]``, of `group_advantages`, or ``[B, L]``; taken as constants.
        mask: bool or integers ``[B, L]``, 0: the token takes no part (padding, a tool's output); None: all do. Whatever
            stands at such a token, NaN too, reaches nothing.
        old_logprobs: ``[B, L]`` of the model that sampled the answers; None: it was this one, the ratio is 1.
        ref_logprobs: ``[B, L]`` of the reference model; needed if beta is not 0.
        beta: >= 0, the weight of the divergence.
        epsilon_low, epsilon_high: >= 0, how far a ratio may go below and above 1; `epsilon_high` None: as low.
        loss_type: of the table.
        max_length: the longest answer that sampling allows; for "dr_grpo", which needs it.
        total_tokens: for "dapo": tokens of all answers that one step of the optimiser sees, divided by the number of
            ranks if gradients are averaged over ranks; a number >= 1 or a tensor of one element. None: those of this
            batch, which makes it "bnpo".
        entropy: ``[B, L]`` of `linear_logprobs` with return_entropy, for the metric.

    Returns:
        `GRPOResult`, the loss in logprobs' dtype. An answer without a token adds nothing, but counts among B; a batch
        without a token gives 0, and NaN metrics.

    Raises:
        TypeError: a wrong dtype or type. ValueError: a wrong shape, range or choice; beta without `ref_logprobs`, or
            "dr_grpo" without `max_length`.

    Source: Shao et al., "DeepSeekMath", 2024, equations 3 and 4; Yu et al., "DAPO", 2025, equation 8; Liu et al.,
    "Understanding R1-Zero-Like Training" (Dr. GRPO), 2025, section 3.2; k3: Schulman, "Approximating KL Divergence",
    2020. Names are those of trl's `GRPOConfig`.

    Example:
        >>> import torch, mmkernels
        >>> from mmkernels.objectives import grpo_loss, group_advantages
        >>> hidden, head = torch.randn(4, 12, 16, requires_grad=True), torch.randn(100, 16)
        >>> answers, mask = torch.randint(100, (4, 12)), torch.arange(12) < torch.tensor([[12], [9], [12], [5]])
        >>> targets = answers.masked_fill(~mask, -100)
        >>> logprobs, entropy = mmkernels.linear_logprobs(hidden, head, targets, return_entropy=True)
        >>> advantages = group_advantages(torch.tensor([1.0, 0.0, 1.0, 0.0]), group_size=4)
        >>> out = grpo_loss(logprobs, advantages, mask, entropy=entropy)
        >>> out.loss.backward()
        >>> hidden.grad[3, 5:].abs().max()  # after the end of an answer
        tensor(0.)
    """
    shown = _check(logprobs, advantages, mask, old_logprobs, ref_logprobs, entropy)
    check_number("beta", beta, "a finite number >= 0", 0.0)
    check_number("epsilon_low", epsilon_low, "a finite number >= 0", 0.0)
    high = epsilon_low if epsilon_high is None else epsilon_high
    check_number("epsilon_high", high, "a finite number >= 0", 0.0)
    check_choice("loss_type", loss_type, _LOSSES)
    if beta and ref_logprobs is None:
        raise ValueError(f"ref_logprobs must be given where beta is not 0, got None with beta {beta}")

    # Hidden before `exp`: its gradient at a hidden token must be 0, not 0 times inf.
    old = logprobs.detach() if old_logprobs is None else old_logprobs.detach().to(logprobs.dtype)
    ratio = (logprobs - old).masked_fill(~shown, 0).exp()
    advantage = (advantages[:, None] if advantages.dim() == 1 else advantages).detach().to(logprobs.dtype)
    losses = -torch.min(ratio * advantage, ratio.clamp(1 - epsilon_low, 1 + high) * advantage)
    kl = torch.zeros_like(ratio)
    if ref_logprobs is not None:
        away = (ref_logprobs.detach().to(logprobs.dtype) - logprobs).masked_fill(~shown, 0)
        kl = away.exp() - away - 1
        if beta:
            losses = losses + beta * kl
    losses = losses.masked_fill(~shown, 0)
    return GRPOResult(
        _reduced(losses, shown.sum(1), loss_type, max_length, total_tokens),
        _mean(kl, shown),
        None if entropy is None else _mean(entropy, shown),
        _mean((ratio < 1 - epsilon_low) & (advantage < 0), shown),
        _mean((ratio > 1 + high) & (advantage > 0), shown),
    )


def _reduced(
    losses: Tensor, count: Tensor, loss_type: str, max_length: int | None, total_tokens: Tensor | float | None
) -> Tensor:
    """Returns one loss of the tokens' losses ``[B, L]``, of which each row has `count` that take part."""
    if loss_type == "grpo":
        return (losses.sum(1) / count.clamp(min=1)).mean()
    if loss_type == "dr_grpo":
        if max_length is None:
            raise ValueError('max_length must be given with loss_type "dr_grpo", got None')
        check_positive("max_length", max_length)
        return losses.sum() / (losses.shape[0] * max_length)
    if loss_type == "bnpo" or total_tokens is None:
        return losses.sum() / count.sum().clamp(min=1)
    if not isinstance(total_tokens, Tensor):
        return losses.sum() / check_number("total_tokens", total_tokens, "a tensor or a finite number >= 1", 1.0)
    if total_tokens.numel() != 1:
        raise ValueError(f"total_tokens must have one element, got shape {tuple(total_tokens.shape)}")
    return losses.sum() / total_tokens.reshape(()).clamp(min=1)


def _check(
    logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    entropy: Tensor | None,
) -> Tensor:
    """Checks the tensors; returns which tokens take part, bool ``[B, L]``."""
    check_floating("logprobs", logprobs)
    if logprobs.dim() != 2:
        raise ValueError(f"logprobs must be [B, L], got shape {tuple(logprobs.shape)}")
    shape = tuple(logprobs.shape)
    check_floating("advantages", advantages)
    if tuple(advantages.shape) not in (shape[:1], shape):
        raise ValueError(f"advantages must be [{shape[0]}] or {list(shape)}, got shape {tuple(advantages.shape)}")
    for name, x in (("old_logprobs", old_logprobs), ("ref_logprobs", ref_logprobs), ("entropy", entropy)):
        if x is not None:
            check_floating(name, x)
            check_shape(name, x, shape, "logprobs")
    if mask is None:
        return torch.ones_like(logprobs, dtype=torch.bool)
    return checked_mask("mask", mask, shape, "logprobs")


def _mean(x: Tensor, shown: Tensor) -> Tensor:
    """Returns the mean over the tokens that take part."""
    x = x.detach()
    x = x if x.is_floating_point() else x.float()
    return x.masked_fill(~shown, 0).sum() / shown.sum()
