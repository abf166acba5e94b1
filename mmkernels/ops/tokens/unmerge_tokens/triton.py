"""Unmerged tokens in Triton: copies out of groups, and back the sums into them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mmkernels.ops.tokens.triton.groups import groups_of, spread_groups, sum_groups
from mmkernels.ops.tokens.unmerge_tokens.spec import Arguments
from mmkernels.plan import Config
from mmkernels.runtime.tuning import config

OP = "unmerge_tokens"


def forward(args: Arguments) -> Tensor:
    """Returns [N, C]."""
    return spread_groups(args.x, groups_of(args.assignment, args.x.shape[0]), None, _plan("spread", args.x))


def backward(args: Any) -> Tensor:
    """Returns the gradient of x, [N', C]."""
    flow: Tensor = args.grad_tokens
    groups = groups_of(args.assignment, args.x.shape[0])
    return sum_groups(flow, groups, None, flow.dtype, _plan("sum", flow))


def _plan(kernel: str, x: Tensor) -> Config:
    return config(OP, kernel, x.device, x.dtype, x.shape[1])
