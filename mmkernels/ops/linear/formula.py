"""What the linear ops share: logits, states of rows and gradients, as their definitions have them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmkernels.ops.common.dtypes import wide_dtype

IGNORED = -1
"""The target of a row that takes no part."""

REFERENCE, SUM, PICKED, MOMENT, TOTAL, BEST = range(6)
"""The rows of a state [6, T] over some tokens c, with their logits y_c:

REFERENCE  m, a number near the largest logit; -inf where all are
SUM        sum_c exp(y_c - m)
PICKED     the target's logit, -inf where the token is elsewhere
MOMENT     sum_c exp(y_c - m) (y_c - m), for the entropy; else 0
TOTAL      sum_c token_weight_c y_c; 0 without token_weight
BEST       the largest logit, if it is wanted; else 0

An ignored row has a SUM of 1, and 0 in all else."""
STATES_OF_ROW = 6

OF_PROBABILITY, OF_ENTROPY, OF_TARGET, OF_TOKENS = range(4)
"""The rows of [4, T] that give the logits' gradient, with p_c = exp(y_c - lse):

dy_c = p_c (OF_PROBABILITY + OF_ENTROPY (y_c - lse)) + OF_TARGET [c = target] + OF_TOKENS token_weight_c"""


def without_ignored(hidden: Tensor, target: Tensor) -> Tensor:
    """Returns hidden [T, d] with 0 in ignored rows, so that nothing of them, NaN neither, reaches a gradient."""
    return hidden.masked_fill((target == IGNORED)[:, None], 0.0)


def capped(z: Tensor, softcap: float, temperature: float) -> Tensor:
    """Returns the logits y of products z."""
    y = softcap * torch.tanh(z / softcap) if softcap else z
    return y / temperature if temperature != 1.0 else y


def logits_of(args: Any) -> Tensor:
    """Returns the logits, wide [T, V]: products in hidden's dtype, everything else wide."""
    z = without_ignored(args.hidden, args.target) @ args.weight.mT
    z = z if args.bias is None else z + args.bias
    return capped(z.to(wide_dtype(args.hidden)), args.softcap, args.temperature)


def best_index(y: Tensor) -> Tensor:
    """Returns int64 [T], each row's largest logit, the lowest of equals; y: [T, V]."""
    tokens = torch.arange(y.shape[1], device=y.device)
    return torch.where(y == y.amax(1, keepdim=True), tokens, y.shape[1] - 1).amin(1)


class RowResults(NamedTuple):
    """What a row's softmax gives, wide [T] each, 0 in ignored rows; entropy and average are empty unless wanted."""

    logprobs: Tensor  # of the target; NaN where it is no token
    lse: Tensor
    entropy: Tensor
    average: Tensor  # the mean over the vocabulary of token_weight_c times c's log-probability


def formula(args: Any) -> RowResults:
    """Returns the results by the naive formula, which PyTorch can differentiate."""
    y = logits_of(args)
    live = args.target != IGNORED
    vocabulary = y.shape[1]
    every = y.log_softmax(1)
    none = y.new_empty(0)
    token = args.target.clamp(0, vocabulary - 1)[:, None]
    entropy, average = none, none
    if args.entropy:
        p = every.exp()
        entropy = -(p * every.masked_fill(p == 0, 0.0)).sum(1).where(live, 0.0)
    if args.token_weight is not None:
        average = ((every * args.token_weight.to(y.dtype)).sum(1) / vocabulary).where(live, 0.0)
    picked = every.gather(1, token)[:, 0].where(args.target < vocabulary, torch.nan).where(live, 0.0)
    return RowResults(picked, y.logsumexp(1).where(live, 0.0), entropy, average)


def logits_gradient(args: Any, z: Tensor, rows: Tensor, lse: Tensor, target: Tensor) -> Tensor:
    """Returns the gradient of the products z [T, V], which it writes.

    Args:
        args: a record with softcap, temperature, token_weight, entropy.
        rows: [4, T], see `OF_PROBABILITY`. lse, target: [T].
    """
    slope = None
    if args.softcap:
        z = torch.tanh(z / args.softcap)
        slope = 1 - z * z
        z = z * args.softcap
    y = z / args.temperature if args.temperature != 1.0 else z
    of_p, of_entropy, of_target, of_tokens = rows[:, :, None]
    p = (y - lse[:, None]).exp()
    flow = p * of_p
    if args.entropy:
        flow += (p * (y - lse[:, None]).masked_fill(p == 0, 0.0)) * of_entropy
    if args.token_weight is not None:
        flow += of_tokens * args.token_weight.to(flow.dtype)
    here = (target >= 0) & (target < y.shape[1])
    flow.scatter_add_(1, target.clamp(0, y.shape[1] - 1)[:, None], of_target.where(here[:, None], 0.0))
    if slope is not None:
        flow *= slope
    return flow / args.temperature if args.temperature != 1.0 else flow


def gradients(args: Any) -> tuple[Tensor, ...]:
    """Returns the gradients of hidden, weight and bias by the naive formula; see `rows.Gradients`."""
    hidden, weight, bias = without_ignored(args.hidden, args.target), args.weight, args.bias
    wide, none = wide_dtype(hidden), hidden.new_empty(0)
    z = hidden @ weight.mT
    z = (z if bias is None else z + bias).to(wide)
    live = args.target != IGNORED
    flow = logits_gradient(args, z, args.rows.masked_fill(~live, 0.0), args.lse, args.target)
    flow = flow.masked_fill(~live[:, None], 0.0)
    narrow = flow.to(hidden.dtype)
    of_hidden = narrow @ weight
    return (
        (of_hidden.to(wide) if args.wide else of_hidden) if args.need_hidden else none,
        narrow.mT @ hidden if args.need_weight else none,
        flow.sum(0).to(bias.dtype) if args.need_bias and bias is not None else none,
    )
