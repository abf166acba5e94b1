"""A grouped linear layer in plain PyTorch, one product for each group that has rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmkernels.ops.common.results import or_empty
from mmkernels.ops.linear.grouped_linear.groups import sizes_of
from mmkernels.ops.linear.grouped_linear.spec import Arguments, reference, reference_backward


def forward(args: Arguments) -> Tensor:
    """Returns [R, O]. Where the number of rows lies on a device, as the reference: that waits for none."""
    sizes = sizes_of(args.lengths, args.x.shape[0])
    if sizes is None:
        return reference(args)
    return _products(args.x, args.weight, sizes, args.bias)


def backward(args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of x, weight and bias, empty where none is wanted."""
    x, weight, flow = args.x, args.weight, args.grad_y
    sizes = sizes_of(args.lengths, x.shape[0])
    if sizes is None:
        return reference_backward(args)
    of_x = of_weight = of_bias = None
    if args.need_x:
        of_x = _products(flow, weight.mT, sizes, None)
    if args.need_weight:
        of_weight = weight.new_empty(weight.shape)
        for group, (part, rows) in enumerate(zip(_parts(flow, sizes), _parts(x, sizes), strict=True)):
            if sizes[group]:
                torch.mm(part.mT, rows, out=of_weight[group])
            else:
                of_weight[group].zero_()
    if args.need_bias:
        of_bias = weight.new_empty(weight.shape[:2])
        for group, part in enumerate(_parts(flow, sizes)):
            torch.sum(part, 0, out=of_bias[group])
    return or_empty(of_x, x), or_empty(of_weight, x), or_empty(of_bias, x)


def _parts(x: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
    """Returns the rows of each group."""
    return x[: sum(sizes)].split(sizes)


def _products(x: Tensor, weight: Tensor, sizes: list[int], bias: Tensor | None) -> Tensor:
    y = x.new_empty(x.shape[0], weight.shape[1])
    total = sum(sizes)
    y[total:].zero_()
    for group, (rows, out) in enumerate(zip(_parts(x, sizes), _parts(y, sizes), strict=True)):
        if not sizes[group]:
            continue
        if bias is None:
            torch.mm(rows, weight[group].mT, out=out)
        else:
            torch.addmm(bias[group], rows, weight[group].mT, out=out)
    return y
