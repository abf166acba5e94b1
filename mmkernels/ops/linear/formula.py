"""What the linear ops share: logits, states of rows and gradients, as their definitions have them."""

from __future__ import annotations

from collections.abc import Callable
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
LOG_SUM = 1
"""The row behind REFERENCE m of a softmax [2, T]: log sum_c exp(y_c - m). Probabilities are exp((y - m) - LOG_SUM):
where logits are large, a log-sum-exp in one number would not hold what tells a probability near 1 from 1."""

OF_PROBABILITY, OF_ENTROPY, OF_TARGET, OF_TOKENS = range(4)
"""The rows of [4, T] that give the logits' gradient, with log p_c = (y_c - m) - LOG_SUM:

dy_c = p_c (OF_PROBABILITY + OF_ENTROPY log p_c) + OF_TARGET [c = target] + OF_TOKENS token_weight_c"""


def without_ignored(hidden: Tensor, target: Tensor) -> Tensor:
    """Returns hidden [T, d] with 0 in ignored rows, so that nothing of them, NaN neither, reaches a gradient."""
    return hidden.masked_fill((target == IGNORED)[:, None], 0.0)


class Logits(NamedTuple):
    """Logits, and what their gradient needs."""

    y: Tensor
    tanh: Tensor | None  # tanh(z / softcap), as y does not give it back exactly; None without a softcap


def capped(z: Tensor, softcap: float, temperature: float) -> Logits:
    """Returns the logits of products z."""
    tanh = torch.tanh(z / softcap) if softcap else None
    y = z if tanh is None else softcap * tanh
    return Logits(y / temperature if temperature != 1.0 else y, tanh)


def capped_logits_of(args: Any) -> Logits:
    """Returns the logits, wide [T, V]: products in hidden's dtype, everything else wide."""
    z = (without_ignored(args.hidden, args.target) @ args.weight.mT).to(wide_dtype(args.hidden))
    return capped(z if args.bias is None else z + args.bias, args.softcap, args.temperature)


def logits_of(args: Any) -> Tensor:
    """Returns `Logits.y` of all rows."""
    return capped_logits_of(args).y


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
    return formula_of_logits(args, logits_of(args))


def formula_of_logits(args: Any, y: Tensor) -> RowResults:
    """Returns the results of logits y, wide [T, V]."""
    live, vocabulary = args.target != IGNORED, y.shape[1]
    every = y.log_softmax(1)
    token = args.target.clamp(0, vocabulary - 1)[:, None]
    picked = every.gather(1, token)[:, 0].where(args.target < vocabulary, torch.nan).where(live, 0.0)
    entropy, average = y.new_empty(0), y.new_empty(0)
    if args.entropy:
        p = every.exp()
        entropy = -(p * every.masked_fill(p == 0, 0.0)).sum(1).where(live, 0.0)
    if args.average:
        every = every if args.token_weight is None else every * args.token_weight.to(y.dtype)
        average = every.mean(1).where(live, 0.0)
    return RowResults(picked, y.logsumexp(1).where(live, 0.0), entropy, average)


def y_gradient(args: Any, y: Tensor, rows: Tensor, softmax: Tensor, target: Tensor) -> Tensor:
    """Returns the gradient of logits y, wide [T, V].

    Args:
        args: a record with token_weight and entropy.
        rows: [4, T], see `OF_PROBABILITY`. softmax: [2, T], see `LOG_SUM`. target: [T].
    """
    of_p, of_entropy, of_target, of_tokens = rows[:, :, None]
    every = (y - softmax[REFERENCE][:, None]) - softmax[LOG_SUM][:, None]
    p = every.exp()
    flow = p * of_p
    if args.entropy:
        flow += p * every.masked_fill_(p == 0, 0.0) * of_entropy
    if args.token_weight is not None:
        flow += of_tokens * args.token_weight.to(flow.dtype)
    here = (target >= 0) & (target < y.shape[1])
    return flow.scatter_add_(1, target.clamp(0, y.shape[1] - 1)[:, None], of_target.where(here[:, None], 0.0))


def capped_gradient(flow: Tensor, tanh: Tensor | None, temperature: float) -> Tensor:
    """Returns the gradient of the products, from that of the logits, which it writes; tanh: see `Logits`."""
    if tanh is not None:
        flow *= 1 - tanh * tanh
    return flow.div_(temperature) if temperature != 1.0 else flow


def products_of(flow: Tensor, dtype: torch.dtype) -> Callable[[Tensor, bool], Tensor]:
    """Returns a function that multiplies the gradient of some rows' products, wide [rows, V], in `dtype`.

    It takes the weight [V, d], or, with its rows as columns, hidden [rows, d], and returns their gradient's share.

    float16 holds the gradient of a mean over many tokens only if that is multiplied: here by the largest power of two
    with which no sum can pass 2^15. The sums are divided again in float32.
    """
    if dtype != torch.float16 or not flow.numel():
        narrow = flow.to(dtype)
        return lambda x, transposed: (narrow.mT if transposed else narrow) @ x
    total = flow.abs().sum(1).nan_to_num(0.0, 0.0, 0.0).sum().clamp(min=1e-30)  # without rows with NaN

    def times(x: Tensor, transposed: bool) -> Tensor:
        low, high = (end.float() for end in x.aminmax())
        largest = torch.maximum(-low, high).clamp(min=1.0).nan_to_num(1.0, 1.0, 1.0)
        scale = torch.exp2((2.0**15 / (total * largest)).log2().floor())
        narrow = (flow * scale).to(dtype)
        return ((narrow.mT if transposed else narrow) @ x).to(flow.dtype) / scale

    return times


def gradients(args: Any) -> tuple[Tensor, ...]:
    """Returns the gradients of hidden, weight and bias by the naive formula; see `rows.Gradients`."""
    (y, tanh), live = capped_logits_of(args), args.target != IGNORED
    flow = y_gradient(args, y, args.rows.masked_fill(~live, 0.0), args.softmax, args.target)
    found = head_gradients(args, flow.masked_fill_(~live[:, None], 0.0), tanh)
    dtypes = (wide_dtype(args.hidden) if args.wide else args.hidden.dtype, args.weight.dtype, None)
    needs = (args.need_hidden, args.need_weight, args.need_bias and args.bias is not None)
    return tuple(
        x.to(dtype or args.bias.dtype) if need and x is not None else args.hidden.new_empty(0)
        for x, dtype, need in zip(found, dtypes, needs, strict=True)
    )


def head_gradients(args: Any, flow: Tensor, tanh: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of hidden, weight and bias, wide, from that of the logits [T, V], which it writes."""
    hidden = without_ignored(args.hidden, args.target)
    flow = capped_gradient(flow, tanh, args.temperature)
    times = products_of(flow, hidden.dtype)
    return times(args.weight, False), times(hidden, True), flow.sum(0)
