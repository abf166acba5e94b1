"""Choosing the next token."""

from __future__ import annotations

import torch
from torch import Tensor


def sample(
    logits: Tensor, temperature: float = 0.0, top_p: float = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    """Returns one token for each row, int64 ``[B]``.

    Args:
        logits: ``[B, V]``.
        temperature: the logits are divided by it; 0: take the most likely token.
        top_p: sample from the smallest set of most likely tokens whose probabilities add up to `top_p`.
        generator: for a reproducible draw, on the device of `logits`.

    Source: Holtzman et al., "The Curious Case of Neural Text Degeneration", 2020, section 3.1.

    Example:
        >>> import torch
        >>> sample(torch.tensor([[0.0, 2.0, 1.0]]))
        tensor([1])
    """
    check_sampling(temperature, top_p)
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.double()
    # The maximum is subtracted first, in float64, so that no temperature makes a logit infinite.
    probabilities = ((logits - logits.amax(-1, keepdim=True)) / max(temperature, 1e-300)).softmax(-1).float()
    if top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True)
        before = ordered.cumsum(-1) - ordered  # 0 for the most likely token, which is always kept
        probabilities = torch.zeros_like(ordered).scatter(-1, order, ordered.masked_fill(before >= top_p, 0.0))
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


def check_sampling(temperature: float, top_p: float) -> None:
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be >= 0 and finite, got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
