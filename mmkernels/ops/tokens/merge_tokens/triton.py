"""Merged tokens in Triton: a program for each group, or for each token, and for tiles of channels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmkernels.ops.tokens.merge_tokens.spec import Arguments
from mmkernels.ops.tokens.triton.groups import dots_with_groups, group_means, groups_of, spread_groups, sum_groups
from mmkernels.plan import Config
from mmkernels.runtime.tuning import config

OP = "merge_tokens"


def forward(args: Arguments) -> tuple[Tensor, Tensor]:
    """Returns the means [N', C] and the sums of sizes, float32 [N']."""
    groups = groups_of(args.assignment, sum(args.kept))
    return group_means(args.x, args.sizes, groups, args.x.dtype, _plan("sum", args.x))


def backward(args: Any) -> tuple[Tensor, Tensor]:
    """Returns the gradients of x and sizes, see `reference_backward`."""
    x, total, flow = args.x, args.merged_sizes, args.grad_merged
    groups = groups_of(args.assignment, sum(args.kept))
    sizes = torch.ones_like(total[groups.group]) if args.sizes is None else args.sizes
    weights = sizes / total[groups.group]
    grad_x, grad_sizes = x.new_empty(0), x.new_empty(0)
    if args.need_x:
        if flow is None:
            grad_x = torch.zeros_like(x, memory_format=torch.contiguous_format)
        else:
            grad_x = spread_groups(flow, groups, weights, _plan("spread", x))
    if args.need_sizes:
        of_sizes = args.grad_merged_sizes
        grad_sizes = torch.zeros_like(weights) if of_sizes is None else of_sizes[groups.group]
        if flow is not None:
            dots = dots_with_groups(x, flow, groups, _plan("dots", x))
            means = sum_groups(dots[:, None], groups, weights, torch.float32, _plan("sum", x))[:, 0]
            grad_sizes = grad_sizes + (dots - means[groups.group]) / total[groups.group]
    return grad_x, grad_sizes


def _plan(kernel: str, x: Tensor) -> Config:
    return config(OP, kernel, x.device, x.dtype, x.shape[1])
