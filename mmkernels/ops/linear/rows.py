"""Rows of logits ``hidden weight'`` that are never stored: what a softmax over some tokens sums, and its gradients.

Two ops without a gradient of their own, of which log-probabilities and losses are made, also where the vocabulary is
spread over processes: each computes the `STATES` of its tokens, and takes those of all tokens together to `GRADIENTS`.
With z = hidden weight' + bias the logits are ``y = softcap tanh(z / softcap) / temperature``. Sums and states are
float32, float64 beside float64: "wide".

A target is -1 where the row is ignored, which is then not multiplied; V, where the token is elsewhere; else the token.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmkernels.ops.common.dtypes import wide_dtype
from mmkernels.ops.linear import chunked
from mmkernels.ops.linear.formula import IGNORED, STATES_OF_ROW, best_index, logits_of
from mmkernels.ops.linear.formula import gradients as formula_gradients
from mmkernels.runtime.backends import cpu_kernel, triton_kernel
from mmkernels.runtime.dispatch import Backend, define


class StateArguments(NamedTuple):
    """The record of `linear_states`."""

    hidden: Tensor  # [T, d]
    weight: Tensor  # [V, d]
    bias: Tensor | None  # [V]
    target: Tensor  # int64 [T]
    token_weight: Tensor | None  # wide [V], what `formula.TOTAL` is summed with
    softcap: float  # 0: none
    temperature: float
    entropy: bool  # whether `formula.MOMENT` is wanted
    best: bool  # whether `formula.BEST` and best_index are


class States(NamedTuple):
    """What `linear_states` returns."""

    states: Tensor  # wide [6, T], see `formula.REFERENCE`
    best_index: Tensor  # int64 [T], the token with the largest logit, the lowest of equals; [0] unless `best`


class GradientArguments(NamedTuple):
    """The record of `linear_gradients`."""

    hidden: Tensor  # [T, d]
    weight: Tensor  # [V, d]
    bias: Tensor | None  # [V]
    target: Tensor  # int64 [T]
    token_weight: Tensor | None  # wide [V]
    softmax: Tensor  # wide [2, T], REFERENCE and `formula.LOG_SUM` of the logits of all tokens, elsewhere too
    rows: Tensor  # wide [4, T], see `formula.OF_PROBABILITY`
    softcap: float
    temperature: float
    entropy: bool  # whether `formula.OF_ENTROPY` is looked at
    wide: bool  # whether hidden's gradient is wanted wide
    need_hidden: bool
    need_weight: bool
    need_bias: bool


class Gradients(NamedTuple):
    """What `linear_gradients` returns; empty where a gradient is not needed."""

    of_hidden: Tensor  # [T, d], hidden's dtype or wide; 0 in ignored rows
    of_weight: Tensor  # [V, d], contiguous
    of_bias: Tensor  # [V]


def reference_states(args: StateArguments) -> tuple[Tensor, Tensor]:
    """Returns `States` by the naive formula."""
    y = logits_of(args)
    live, none = args.target != IGNORED, y.new_zeros(len(y))
    reference = y.amax(1)
    weights = (y - reference.masked_fill(reference == -torch.inf, 0.0)[:, None]).exp()
    deviations = (y - reference[:, None]).masked_fill(weights == 0, 0.0)
    token = args.target.clamp(0, y.shape[1] - 1)[:, None]
    here = (args.target >= 0) & (args.target < y.shape[1])
    states = torch.stack(
        [
            reference.where(live, 0.0),
            weights.sum(1).where(live, 1.0),
            y.gather(1, token)[:, 0].where(here, -torch.inf).where(live, 0.0),
            (weights * deviations).sum(1).where(live, 0.0) if args.entropy else none,
            none if args.token_weight is None else (y @ args.token_weight.to(y.dtype)).where(live, 0.0),
            reference.where(live, 0.0) if args.best else none,
        ]
    )
    return states, best_index(y).where(live, -1) if args.best else args.target.new_empty(0)


def reference_gradients(args: GradientArguments) -> tuple[Tensor, ...]:
    """Returns `Gradients` by the naive formula."""
    return formula_gradients(args)


def _fake_states(args: StateArguments) -> tuple[Tensor, Tensor]:
    count = args.hidden.shape[0]
    states = args.hidden.new_empty((STATES_OF_ROW, count), dtype=wide_dtype(args.hidden))
    return states, args.target.new_empty(count if args.best else 0)


def _fake_gradients(args: GradientArguments) -> tuple[Tensor, ...]:
    hidden, weight, bias = args.hidden, args.weight, args.bias
    return (
        hidden.new_empty(hidden.shape if args.need_hidden else 0, dtype=wide_dtype(hidden) if args.wide else None),
        weight.new_empty(weight.shape if args.need_weight else 0),
        hidden.new_empty(0) if not args.need_bias or bias is None else bias.new_empty(bias.shape),
    )


_TRITON = "mmkernels.ops.linear.linear_logprobs.triton"

STATES = define(
    "linear_states",
    StateArguments,
    States,
    fake=_fake_states,
    backends=[
        triton_kernel(_TRITON, "states"),
        cpu_kernel("linear_states_cpu"),
        Backend("chunked", chunked.states),
        Backend("reference", reference_states),
    ],
)

GRADIENTS = define(
    "linear_gradients",
    GradientArguments,
    Gradients,
    fake=_fake_gradients,
    backends=[
        triton_kernel(_TRITON, "gradients"),
        cpu_kernel("linear_gradients_cpu"),
        Backend("chunked", chunked.gradients),
        Backend("reference", reference_gradients),
    ],
)


def states_of(args: Any, kernels: str) -> tuple[Tensor, Tensor]:
    """Returns `States` of a record that has `StateArguments`' fields; none is computed without a row or a token."""
    hidden, target = args.hidden, args.target
    call = StateArguments(*(getattr(args, name) for name in StateArguments._fields))
    if len(hidden) and len(args.weight):
        found: tuple[Tensor, Tensor] = STATES(call, kernels)
        return found
    states = hidden.new_zeros((STATES_OF_ROW, len(hidden)), dtype=wide_dtype(hidden))
    ignored = target == IGNORED
    states[0] = torch.where(ignored, 0.0, -torch.inf)
    states[1] = ignored
    states[2] = states[0]
    if args.best:
        states[5] = states[0]
    return states, torch.full_like(target, -1) if args.best else target.new_empty(0)


def gradients_of(args: GradientArguments, kernels: str) -> tuple[Tensor, ...]:
    """Returns `Gradients`: zeros without a row or a token."""
    if len(args.hidden) and len(args.weight):
        found: tuple[Tensor, ...] = GRADIENTS(args, kernels)
        return found
    return tuple(x.zero_() for x in _fake_gradients(args))
