"""The cross-entropy of a linear head in Triton: loss and gradients in one pass, from three matrix products.

The least time on an H200, at its 790 TFLOP/s of bfloat16 products: T = 8192 rows, d = 4096 and V = 128,256 take 10.9 ms
a product, 32.7 ms in all three. Beside them the exponentials are written, read and written in place, and read twice,
10.5 GB or 2.4 ms. With T = 8192, d = 2304 and V = 256,000 a product takes 12.2 ms; four chunks read and write the
weight's gradient in float32, 15.3 GB or 3.6 ms in all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.ops.common.kept import kept_dtype
from mmkernels.ops.common.results import or_empty
from mmkernels.ops.linear import formula
from mmkernels.ops.linear.linear_cross_entropy.spec import PICK, SPREAD, SQUARE, Arguments
from mmkernels.ops.linear.triton.call import Head
from mmkernels.ops.linear.triton.gradients import Wanted, live_factors, strip_gradients, unit_of
from mmkernels.ops.linear.triton.products import Unit
from mmkernels.ops.linear.triton.states import all_states
from mmkernels.ops.linear.triton.stored import Factors, StoredGradients

OP = "linear_cross_entropy"


def forward(args: Arguments) -> tuple[Tensor, ...]:
    """Returns `spec.Results`; the public function takes plain PyTorch for targets that are probabilities."""
    weight, token_weight = args.linear_weight, args.token_weight
    token_weight = None if token_weight is None else token_weight.contiguous()
    head = Head(OP, args.input, weight, args.linear_bias, args.target, args.softcap, 1.0)
    inputs = (args.input, weight, args.linear_bias)
    wanted = Wanted(
        *(kept_dtype(x) if keep and x is not None else None for x, keep in zip(inputs, args.keep, strict=True))
    )
    rows = live_factors(head, args.target, args.rows)
    if not any(args.keep):
        states, best_index = all_states(head, token_weight, entropy=False, best=args.best)
        grads = wanted
    elif args.softcap and token_weight is not None:
        # The slope of the softcap counts for every token then, also where an exponential is 0.
        states, best_index = all_states(head, token_weight, entropy=False, best=args.best)
        softmax = _softmax(states)
        factors = row_factors(rows, softmax.sum(0), token_weight)
        grads = strip_gradients(head, token_weight, softmax, factors, wanted, entropy=False, temperature=1.0)
    else:
        states, best_index, grads = _with_stored_gradients(args, head, token_weight, rows, wanted)
    loss, logprobs, lse = _finished(head, states, rows, token_weight)
    unpacked = (head.rows.unpacked(x) for x in (logprobs, lse))
    index = or_empty(None if best_index is None else head.rows.unpacked(best_index), args.target)
    return loss, *(or_empty(x, args.input) for x in grads), *unpacked, index


def row_factors(rows: Tensor, lse: Tensor, token_weight: Tensor | None) -> Tensor:
    """Returns [4, rows], see `formula.OF_PROBABILITY`.

    Args:
        rows: [3, rows], see `spec.PICK`.
    """
    factors = torch.zeros((4, rows.shape[1]), dtype=rows.dtype, device=rows.device)
    factors[formula.OF_PROBABILITY] = rows[PICK] + 2 * rows[SQUARE] * lse
    factors[formula.OF_TARGET] = -rows[PICK]
    if token_weight is not None:
        factors[formula.OF_PROBABILITY] += rows[SPREAD] * token_weight.sum()
        factors[formula.OF_TOKENS] = -rows[SPREAD]
    return factors


def _with_stored_gradients(
    args: Arguments, head: Head, token_weight: Tensor | None, rows: Tensor, wanted: Wanted
) -> tuple[Tensor, Tensor | None, Wanted]:
    """Returns the states [6, T] and the largest logits' tokens, in packed order, and the gradients."""
    states = rows.new_empty(formula.STATES_OF_ROW, head.rows.total)
    best_index = head.rows.order.new_empty(head.rows.total) if args.best else None
    stored = StoredGradients(head, token_weight, wanted)
    for at in stored.chunks:
        partials = stored.forward(at, states, best_index)
        of_chunk = states[:, at]
        softmax = _softmax(of_chunk)
        factors = row_factors(rows[:, at], softmax.sum(0), token_weight)
        tensor = unit_of(factors, token_weight, head.dtype)
        if tensor is not None:
            factors = factors / tensor
        of_probability, _, of_target, of_tokens = factors
        logprobs = _logprobs(of_chunk)
        at_target = (of_probability + of_target) * logprobs.exp() - of_target * logprobs.expm1()
        if token_weight is not None:
            at_target += of_tokens * token_weight[head.rows.targets[at].clamp(0, head.tokens - 1)]
        if args.softcap:
            ratio = of_chunk[formula.PICKED] / args.softcap
            at_target *= 1 - ratio * ratio
        stored.backward(
            at, partials, Factors(softmax[0], softmax[1], of_probability, of_tokens, at_target), Unit(1.0, tensor)
        )
    return states, best_index, stored.results()


def _softmax(states: Tensor) -> Tensor:
    """Returns [2, rows], `formula.REFERENCE` and `LOG_SUM`; their sum is 0 where ignored."""
    return torch.stack([states[formula.REFERENCE], states[formula.SUM].log()])


def _logprobs(states: Tensor) -> Tensor:
    """Returns the targets' log-probabilities, precise also near 0: the reference is subtracted first."""
    return (states[formula.PICKED] - states[formula.REFERENCE]) - states[formula.SUM].log()


def _finished(head: Head, states: Tensor, rows: Tensor, token_weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the loss, and the log-probabilities and log-sum-exps [T] in packed order."""
    lse = _softmax(states).sum(0)
    nowhere = (head.rows.targets[: head.rows.total] < 0) & (states[formula.PICKED] == -torch.inf)
    logprobs = _logprobs(states).masked_fill(nowhere, torch.nan)
    loss = rows[SQUARE] * lse**2 - rows[PICK] * logprobs
    if token_weight is not None:
        loss -= rows[SPREAD] * (states[formula.TOTAL] - token_weight.sum() * lse)
    return loss.sum(), logprobs, lse
