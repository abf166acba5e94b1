"""States of rows and their gradients in Triton, of which `linear_logprobs` is made.

The least time on an H200, at its 790 TFLOP/s of bfloat16 products: T = 8192 rows, d = 4096 and V = 128,256 take 10.9 ms
a product, 43.6 ms in all four (one forward, and three backward, where the logits are computed again). Beside them a
strip of the logits' gradients is written once and read twice, 6.3 GB or 1.5 ms in all, and hidden's sums are read and
written once a strip, 2.0 GB or 0.5 ms.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.ops.common.results import or_empty
from mmkernels.ops.linear.rows import GradientArguments, StateArguments
from mmkernels.ops.linear.triton.call import Head
from mmkernels.ops.linear.triton.gradients import Wanted, live_factors, strip_gradients
from mmkernels.ops.linear.triton.states import all_states

OP = "linear_logprobs"


def states(args: StateArguments) -> tuple[Tensor, Tensor]:
    """Returns `rows.States`."""
    head = Head(OP, args.hidden, args.weight, args.bias, args.target, args.softcap, args.temperature)
    found, best_index = all_states(head, _contiguous(args.token_weight), entropy=args.entropy, best=args.best)
    rows = head.rows
    index = None if best_index is None else rows.unpacked(best_index)
    return rows.unpacked(found), or_empty(index, args.target)


def gradients(args: GradientArguments) -> tuple[Tensor, ...]:
    """Returns `rows.Gradients`."""
    hidden, bias = args.hidden, args.bias
    head = Head(OP, hidden, args.weight, bias, args.target, args.softcap, args.temperature)
    wanted = Wanted(
        (torch.float32 if args.wide else hidden.dtype) if args.need_hidden else None,
        args.weight.dtype if args.need_weight else None,
        bias.dtype if args.need_bias and bias is not None else None,
    )
    found = strip_gradients(
        head,
        _contiguous(args.token_weight),
        head.rows.packed(args.softmax),
        live_factors(head, args.target, args.rows),
        wanted,
        entropy=args.entropy,
        temperature=args.temperature,
    )
    return tuple(or_empty(x, hidden) for x in found)


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()
