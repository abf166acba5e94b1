"""Log-probabilities of whole sequences, which preference objectives compare."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from mmkernels.objectives.checks import check_hidden, check_token_ids
from mmkernels.ops.linear.linear_logprobs import linear_logprobs
from mmkernels.runtime.checks import check_bool

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def sequence_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    average: bool = False,
    bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    group: ProcessGroup | None = None,
    backend: str | None = None,
) -> Tensor:
    """Returns ``log p(y | x)`` of each sequence: the sum, or mean, of its tokens' log-probabilities.

    Logits are never built, and rows without a target are not multiplied.

    Args:
        hidden: the model's output ``[B, L, d]``, float16, bfloat16, float32 or float64.
        weight: of the head ``[V, d]``, hidden's dtype.
        targets: int64 ``[B, L]``, what each position predicts; see `generation_targets` and `shifted_targets`.
        average: whether to divide by the number of a sequence's targets.
        bias, softcap, temperature, ignore_index, group, backend: as in `mmkernels.linear_logprobs`.

    Returns:
        float32 ``[B]`` (float64 for float64 inputs), 0 for a sequence without a target. Differentiable by hidden,
        weight and bias.

    Raises:
        TypeError, ValueError: as `mmkernels.linear_logprobs`, or hidden has another B and L than `targets`.

    Source: Rafailov et al., "Direct Preference Optimization", 2023, appendix B (the sum); Azar et al., "A General
    Theoretical Paradigm to Understand Learning from Human Preferences" (IPO), 2023, uses the mean in its experiments.

    Example:
        >>> import torch
        >>> from mmkernels.objectives import generation_targets, sequence_logprobs
        >>> targets = generation_targets(torch.randint(100, (4, 12)), prompt_lengths=5)
        >>> sequence_logprobs(torch.randn(4, 12, 16), torch.randn(100, 16), targets).shape
        torch.Size([4])
    """
    check_token_ids("targets", targets)
    check_hidden(hidden, targets, "targets")
    check_bool("average", average)
    tokens = linear_logprobs(
        hidden,
        weight,
        targets.long(),
        bias=bias,
        softcap=softcap,
        temperature=temperature,
        ignore_index=ignore_index,
        group=group,
        backend=backend,
    )
    assert isinstance(tokens, Tensor)
    total = tokens.sum(1)
    return total / (targets != ignore_index).sum(1).clamp(min=1) if average else total
