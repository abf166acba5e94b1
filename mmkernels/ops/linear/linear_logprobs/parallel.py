"""The forward and backward pass of `linear_logprobs`: states of this process's tokens, merged over a group of ranks.

Vocabulary-parallel: each rank holds all rows and some of the tokens, in the order of ranks. What passes between them
is one state a row, and hidden's gradient, which is summed.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from mmkernels.ops.common.dtypes import wide_dtype
from mmkernels.ops.linear.formula import (
    BEST,
    IGNORED,
    MOMENT,
    OF_ENTROPY,
    OF_PROBABILITY,
    OF_TARGET,
    OF_TOKENS,
    PICKED,
    REFERENCE,
    SUM,
    TOTAL,
    RowResults,
    best_index,
    formula,
    formula_of_logits,
    logits_of,
)
from mmkernels.ops.linear.rows import GRADIENTS, STATES, GradientArguments, gradients_of, states_of
from mmkernels.runtime.dispatch import TABLES, Backend, Op
from mmkernels.runtime.group import Group

CALL = "linear_logprobs"


class _Shard:
    """Where this process's tokens stand among all ranks' tokens, and what passes between the ranks.

    Args:
        args: the record of a forward or a backward pass.
        pass_name: for errors.
        same: what must be the same on every rank, besides what the arguments say.
    """

    def __init__(self, args: Any, pass_name: str, same: dict[str, Any]) -> None:
        self.group = Group(args.group, pass_name, args.hidden.device) if args.group else None
        self.first, self.vocabulary = 0, len(args.weight)
        if self.group is not None:
            said = self.group.agree(
                {**_shape(args), **same, **_options(args)}, {"tokens": len(args.weight), **_targets(args.target)}
            )
            tokens = [x["tokens"] for x in said]
            self.first, self.vocabulary = sum(tokens[: self.group.rank]), sum(tokens)
            _check_targets(said, self.vocabulary)

    def local(self, args: Any) -> Any:
        """Returns the record with this shard's targets and token weights."""
        target, weights = args.target, args.token_weight
        if weights is not None and len(weights) != self.vocabulary:
            raise ValueError(
                f"weight must be [{self.vocabulary}], one for each token of all ranks, got [{len(weights)}]"
            )
        if not args.average:
            weights = None
        elif weights is None:
            weights = args.hidden.new_ones(len(args.weight), dtype=wide_dtype(args.hidden))
        else:
            weights = weights[self.first : self.first + len(args.weight)]
        if self.group is None:
            return args._replace(token_weight=weights)
        index = target - self.first
        inside = (index >= 0) & (index < len(args.weight))
        local = torch.where(inside, index, len(args.weight)).masked_fill(target == IGNORED, IGNORED)
        return args._replace(target=local, token_weight=weights)


def _shape(args: Any) -> dict[str, Any]:
    return {
        "the number of rows": len(args.hidden),
        "the number of channels": args.hidden.shape[1],
        "the dtype": str(args.hidden.dtype),
        "the type of device": args.hidden.device.type,
        "whether there is a bias": args.bias is not None,
        "the number of class weights": 0 if args.token_weight is None else len(args.token_weight),
    }


def _options(args: Any) -> dict[str, Any]:
    return {name: getattr(args, name) for name in ("softcap", "temperature", "entropy", "average", "best")}


def _targets(target: Tensor) -> dict[str, Any]:
    """What a rank says of its targets: on an accelerator nothing, which would wait for it."""
    if not target.is_cpu or not len(target):
        return {"low": IGNORED, "high": IGNORED, "sum": 0}
    low, high = (int(x) for x in target.aminmax())
    places = torch.arange(1, len(target) + 1)
    return {"low": low, "high": high, "sum": int((target * places).sum())}


def _check_targets(said: list[dict[str, Any]], vocabulary: int) -> None:
    if any(x["sum"] != said[0]["sum"] for x in said):
        raise ValueError("target must be the same on every rank of the group, as must hidden")
    if said[0]["high"] >= vocabulary:
        raise ValueError(
            f"target must be below {vocabulary}, as many tokens as all ranks have, or ignore_index; "
            f"got {said[0]['high']}"
        )


def forward(args: Any, kernels: str) -> tuple[Tensor, ...]:
    """Returns the op's `Results`."""
    if kernels == "reference" and not args.group:
        return reference(args)
    shard = _Shard(args, CALL, {})
    states, index = states_of(shard.local(args), kernels)
    if shard.group is not None:
        states, index = _merged(shard.group, states, index + shard.first)
    found = _finished(args, states, shard.vocabulary)
    softmax = torch.stack([states[REFERENCE], states[SUM].log()])
    if args.best:
        index = index.masked_fill(args.target == IGNORED, IGNORED)
    return *found, softmax, index


def reference(args: Any) -> tuple[Tensor, ...]:
    """Returns the op's `Results` by the naive formula, which PyTorch can differentiate."""
    y = logits_of(args)
    reference = y.detach().amax(1)
    softmax = torch.stack([reference, (y.detach() - reference[:, None]).exp().sum(1).log()])
    index = args.target.new_empty(0)
    if args.best:
        index = best_index(y.detach()).masked_fill(args.target == IGNORED, IGNORED)
    return *formula_of_logits(args, y), softmax, index


def _merged(group: Group, states: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the states of all ranks' tokens, by the order of ranks, so that all ranks get the same bits."""
    all_states = group.gather(states)  # [ranks, 6, T]
    merged = all_states[0].clone()
    reference = all_states[:, REFERENCE].amax(0)
    base = reference.masked_fill(reference == -torch.inf, 0.0)
    shift = all_states[:, REFERENCE] - base  # [ranks, T], -inf where a rank has no logit above that
    factor, shift = shift.exp(), shift.masked_fill(shift == -torch.inf, 0.0)
    merged[REFERENCE] = reference
    merged[SUM] = (all_states[:, SUM] * factor).sum(0)
    merged[PICKED] = all_states[:, PICKED].amax(0)
    merged[MOMENT] = ((all_states[:, MOMENT] + all_states[:, SUM] * shift) * factor).sum(0)
    merged[TOTAL] = all_states[:, TOTAL].sum(0)
    merged[BEST] = all_states[:, BEST].amax(0)
    if index.numel():
        indices = group.gather(index)
        best = all_states[:, BEST] == merged[BEST]
        index = indices.masked_fill(~best, torch.iinfo(torch.int64).max).amin(0)
    return merged, index


def _finished(args: Any, states: Tensor, vocabulary: int) -> RowResults:
    """Returns the results of rows, from the states of all `vocabulary` tokens."""
    ignored = args.target == IGNORED
    reference, log_sum = states[REFERENCE], states[SUM].log()
    lse = reference + log_sum
    logprobs = (states[PICKED] - reference) - log_sum
    logprobs = logprobs.masked_fill(args.target >= vocabulary, torch.nan).masked_fill(ignored, 0.0)
    entropy, average = states.new_empty(0), states.new_empty(0)
    if args.entropy:
        entropy = (log_sum - states[MOMENT] / states[SUM]).masked_fill(ignored, 0.0)
    if args.average:
        average = (states[TOTAL] / vocabulary - _mean_weight(args) * lse).masked_fill(ignored, 0.0)
    return RowResults(logprobs, lse.masked_fill(ignored, 0.0), entropy, average)


def _mean_weight(args: Any) -> Tensor | float:
    """Returns the mean of all tokens' weights."""
    return 1.0 if args.token_weight is None else args.token_weight.mean()


def backward(args: Any, kernels: str) -> tuple[Tensor, ...]:
    """Returns the gradients of hidden, weight and bias, empty where none is needed."""
    shard = _Shard(args, f"{CALL}, backward", {"whether hidden needs a gradient": args.need_hidden})
    local = shard.local(args)
    wide = shard.group is not None
    call = GradientArguments(
        hidden=args.hidden,
        weight=args.weight,
        bias=args.bias,
        target=local.target,
        token_weight=local.token_weight,
        softmax=args.softmax,
        rows=_gradient_rows(args, shard.vocabulary),
        softcap=args.softcap,
        temperature=args.temperature,
        entropy=args.entropy and args.grad_entropy_of_rows is not None,
        wide=wide,
        need_hidden=args.need_hidden,
        need_weight=args.need_weight,
        need_bias=args.need_bias,
    )
    of_hidden, of_weight, of_bias = gradients_of(call, kernels)
    if shard.group is not None and args.need_hidden:
        of_hidden = shard.group.sum(of_hidden).to(args.hidden.dtype)
    return of_hidden, of_weight, of_bias


def _gradient_rows(args: Any, vocabulary: int) -> Tensor:
    """Returns wide [4, T], see `formula.OF_PROBABILITY`: 0 in ignored rows, and where the target is no token."""
    none = torch.zeros_like(args.softmax[0])
    picked, lse, entropy, average = (
        none if x is None else x
        for x in (args.grad_logprobs, args.grad_lse, args.grad_entropy_of_rows, args.grad_average)
    )
    rows = torch.zeros((4, len(none)), dtype=wide_dtype(args.hidden), device=args.hidden.device)
    rows[OF_PROBABILITY] = lse - picked
    rows[OF_TARGET] = picked
    if args.entropy:
        rows[OF_PROBABILITY] -= entropy * args.entropy_of_rows
        rows[OF_ENTROPY] = -entropy
    if args.average:
        rows[OF_PROBABILITY] -= average * _mean_weight(args)
        rows[OF_TOKENS] = average / vocabulary
    return rows.masked_fill((args.target == IGNORED) | (args.target >= vocabulary), 0.0)


def fake(args: Any) -> tuple[Tensor, ...]:
    """Returns outputs of the right shapes and dtypes, and nothing in them."""
    rows, wide = args.hidden.shape[0], wide_dtype(args.hidden)
    row_results = (
        args.hidden.new_empty(rows if wanted else 0, dtype=wide) for wanted in (True, True, args.entropy, args.average)
    )
    softmax = args.hidden.new_empty((2, rows), dtype=wide)
    return *row_results, softmax, args.target.new_empty(rows if args.best else 0)


def formula_of_pass(args: Any) -> RowResults:
    """Returns the differentiable results by the naive formula, for second derivatives."""
    if args.group:
        raise NotImplementedError("linear_logprobs over a group has no second derivatives, and none in forward mode")
    return formula(args)


def backends(of: Op, run: Any) -> list[Backend]:
    """Returns the backends of `of`, with whose kernels `run` computes the pass."""
    return [Backend(entry.name, partial(run, kernels=entry.name), entry.why_not) for entry in TABLES[of.name]]


FORWARD, BACKWARD = backends(STATES, forward), backends(GRADIENTS, backward)
