"""Direct preference optimisation: of two answers the better one becomes more likely than under a reference model."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels.nn.checks import check_choice
from mmkernels.objectives.checks import check_pair_values
from mmkernels.runtime.checks import FINITE, check_number

_LOSSES = ("sigmoid", "robust", "hinge", "ipo")


class DPOResult(NamedTuple):
    """What `dpo_loss` returns. All but `loss` are without a gradient.

    Args:
        loss: a scalar, or ``[B]`` with reduction="none".
        chosen_rewards, rejected_rewards: ``[B]``, beta times the log-ratio to the reference model.
        margins: ``[B]``, their difference.
        accuracy: a scalar, the share of pairs whose margin is above 0; NaN without a pair.
    """

    loss: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    margins: Tensor
    accuracy: Tensor


def dpo_loss(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor,
    ref_rejected_logprobs: Tensor,
    *,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> DPOResult:
    """The loss of pairs of a chosen and a rejected answer to one prompt, by their log-probabilities.

    With ``h = (chosen - ref_chosen) - (rejected - ref_rejected)`` and the label smoothing e, the loss of a pair is

    ========= ====================================================================== ==================================
    loss_type loss                                                                   source
    ========= ====================================================================== ==================================
    "sigmoid" ``-(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h)``              DPO; with e > 0 conservative DPO
    "robust"  ``(-(1 - e) log sigmoid(beta h) + e log sigmoid(-beta h)) / (1 - 2e)`` robust DPO: unbiased if a share e
                                                                                     of the labels is flipped
    "hinge"   ``max(0, 1 - beta h)``                                                 SLiC-HF
    "ipo"     ``(h - 1 / (2 beta))^2``                                               IPO; needs mean log-probabilities
    ========= ====================================================================== ==================================

    Args:
        chosen_logprobs, rejected_logprobs: floating ``[B]`` of the model that is trained, usually `sequence_logprobs`:
            sums over tokens, or means (``average=True``), as authors and trl use them for "ipo".
        ref_chosen_logprobs, ref_rejected_logprobs: the same of the reference model, taken as constants.
        beta: above 0, how much a log-ratio counts; for "ipo" the regularisation, called tau in the paper.
        loss_type: of the table.
        label_smoothing: 0 to below 0.5, the probability that a label is wrong; for "sigmoid" and "robust" only.
        reduction: "mean", "sum" or "none".

    Returns:
        `DPOResult`, in the dtype of the trained model's log-probabilities. A pair that is masked altogether (both
        log-probabilities 0, and their references) has h = 0: it adds a constant and no information. B = 0: the mean is
        NaN.

    Raises:
        TypeError: a wrong dtype or type. ValueError: a wrong shape, range or choice.

    Source: Rafailov et al., "Direct Preference Optimization", 2023, equation 7; Mitchell, "A note on DPO with noisy
    preferences", 2023; Chowdhury et al., "Provably Robust DPO", 2024; Zhao et al., "SLiC-HF",
    2023; Azar et al., "A General Theoretical Paradigm to Understand Learning from Human Preferences" (IPO), 2023,
    equation 17. Names are those of trl's `DPOConfig`.

    Example:
        >>> import torch
        >>> from mmkernels.objectives import dpo_loss, generation_targets, sequence_logprobs
        >>> hidden, head = torch.randn(8, 12, 16, requires_grad=True), torch.randn(100, 16)
        >>> targets = generation_targets(torch.randint(100, (8, 12)), prompt_lengths=5)
        >>> chosen, rejected = sequence_logprobs(hidden, head, targets).chunk(2)  # 4 chosen answers, then 4 rejected
        >>> out = dpo_loss(chosen, rejected, chosen.detach(), rejected.detach())  # the reference is the start
        >>> out.loss.backward()
        >>> round(out.loss.item(), 3)
        0.693
    """
    check_pair_values("chosen_logprobs", chosen_logprobs)
    for name, x in (
        ("rejected_logprobs", rejected_logprobs),
        ("ref_chosen_logprobs", ref_chosen_logprobs),
        ("ref_rejected_logprobs", ref_rejected_logprobs),
    ):
        check_pair_values(name, x, chosen_logprobs, "chosen_logprobs")
    check_number("beta", beta, "a finite number above 0", torch.finfo(torch.float32).tiny, FINITE)
    check_choice("loss_type", loss_type, _LOSSES)
    check_choice("reduction", reduction, ("mean", "sum", "none"))
    check_number("label_smoothing", label_smoothing, "a number from 0 to below 0.5", 0.0, 0.5 - 1e-9)
    if label_smoothing and loss_type in ("hinge", "ipo"):
        raise ValueError(f"label_smoothing must be 0 with loss_type {loss_type!r}, got {label_smoothing}")

    chosen = chosen_logprobs - ref_chosen_logprobs.detach().to(chosen_logprobs.dtype)
    rejected = rejected_logprobs - ref_rejected_logprobs.detach().to(rejected_logprobs.dtype)
    losses = _losses(chosen - rejected, beta, loss_type, label_smoothing)
    loss = losses if reduction == "none" else losses.sum() if reduction == "sum" else losses.mean()
    rewards = beta * chosen.detach(), beta * rejected.detach()
    margins = rewards[0] - rewards[1]
    return DPOResult(loss, *rewards, margins, (margins > 0).to(margins.dtype).mean())


def _losses(difference: Tensor, beta: float, loss_type: str, smoothing: float) -> Tensor:
    if loss_type == "hinge":
        return F.relu(1 - beta * difference)
    if loss_type == "ipo":
        return (difference - 1 / (2 * beta)) ** 2
    right, wrong = -F.logsigmoid(beta * difference), -F.logsigmoid(-beta * difference)
    if loss_type == "sigmoid":
        return (1 - smoothing) * right + smoothing * wrong
    return ((1 - smoothing) * right - smoothing * wrong) / (1 - 2 * smoothing)
