"""Continuing a text token by token, and the loss of predicting each one: the same for all language models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkernels.models.blocks.kv_cache import KVCache
from mmkernels.models.blocks.sampling import check_sampling, sample
from mmkernels.nn.checks import check_positive
from mmkernels.objectives import shifted_targets
from mmkernels.ops.linear.linear_cross_entropy import linear_cross_entropy


def continue_text(
    step: Callable[..., Tensor],
    input_ids: Tensor,
    kv_cache: KVCache,
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int | None,
    eos_token_id: int | Sequence[int],
    pad_token_id: int,
    most: int | None = None,
    **inputs: Any,
) -> Tensor:
    """Returns the tokens that a model generates, int64 ``[B, n]``; padding follows the end-of-text token of a row.

    Args:
        step: takes new tokens ``[B, L]`` (none after the first call: the last token is `kv_cache.pending`) and, in the
            first call, `inputs`; returns the scores ``[B, vocab]`` of the next token.
        input_ids: the prompt ``[B, L]``.
        kv_cache: of the model; afterwards the last token is pending in it.
        max_new_tokens: the largest number of tokens to generate.
        temperature, top_p: as in `blocks.sampling.sample`; temperature 0 takes the most likely token.
        seed: for a reproducible draw; None: PyTorch's global generator.
        eos_token_id: the tokens that end a row; (): none.
        pad_token_id: what follows the end of a row.
        most: the most tokens that the cache may hold, at which a text ends; None: no limit.
    """
    check_positive("max_new_tokens", max_new_tokens)
    check_sampling(temperature, top_p)
    ends = input_ids.new_tensor([eos_token_id] if isinstance(eos_token_id, int) else eos_token_id)
    generator = None if seed is None else torch.Generator(input_ids.device).manual_seed(seed)
    scores = step(input_ids, **inputs)
    tokens: list[Tensor] = []
    alive = torch.ones_like(input_ids[:, 0], dtype=torch.bool)
    while True:
        token = sample(scores, temperature, top_p, generator)
        token = torch.where(alive, token, pad_token_id)
        tokens.append(token)
        kv_cache.pending = token[:, None], alive[:, None]
        alive = alive & ~torch.isin(token, ends)
        full = most is not None and kv_cache.num_tokens >= most
        if full or len(tokens) == max_new_tokens or (len(ends) and not alive.any()):
            return torch.stack(tokens, dim=1)
        scores = step(input_ids[:, :0])


def next_token_loss(head: nn.Linear, hidden: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Returns the mean cross-entropy, fp32, of the tokens that are not ignored, each given those before it.

    It builds no logits, and rows that predict an ignored token are not multiplied: see
    `mmkernels.linear_cross_entropy`.

    Args:
        head: the last layer. A layer put in its place, such as LoRA's, is called, and all logits are computed.
        hidden: ``[B, L, width]``.
        labels: ``[B, L]``, -100: ignored.
        label_smoothing: as in `mmkernels.linear_cross_entropy`.
    """
    targets = shifted_targets(labels)
    if getattr(head.forward, "__func__", None) is nn.Linear.forward:  # some put in its place inherit from Linear
        return linear_cross_entropy(
            hidden, head.weight, targets, linear_bias=head.bias, label_smoothing=label_smoothing
        )
    logits = head(hidden).flatten(0, 1).float()
    return F.cross_entropy(logits, targets.flatten(), label_smoothing=label_smoothing)
