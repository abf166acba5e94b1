"""The cross-entropy of a linear head in plain PyTorch: chunks of rows, with loss and gradients from the same logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmkernels.ops.common.dtypes import wide_dtype
from mmkernels.ops.common.kept import kept_dtype
from mmkernels.ops.linear.chunked import GradientSums, chunks, picked, products, softmax
from mmkernels.ops.linear.formula import best_index, capped, capped_gradient
from mmkernels.ops.linear.linear_cross_entropy.spec import PICK, SPREAD, SQUARE, kept, y_gradient


def forward(args: Any) -> tuple[Tensor, ...]:
    """Returns `spec.Results`."""
    hidden, wide = args.hidden, wide_dtype(args.hidden)
    logprobs, lse = (hidden.new_zeros(len(hidden), dtype=wide) for _ in range(2))
    index = torch.full_like(args.target, -1) if args.best else args.target.new_empty(0)
    inputs = (args.input, args.linear_weight, args.linear_bias)
    dtypes = (kept_dtype(x) if keep and x is not None else None for x, keep in zip(inputs, args.keep, strict=True))
    sums, loss = GradientSums(args, *dtypes), hidden.new_zeros((), dtype=wide)
    weights = args.token_weight
    for chunk in chunks(args):
        y, tanh = capped(products(args, chunk), args.softcap, 1.0)
        reference, exponentials = softmax(y)
        log_sum = exponentials.sum(1).log()
        of_rows = lse[chunk.at] = reference + log_sum
        rows = args.rows[:, chunk.at]
        targets = None if args.probabilities is None else args.probabilities[chunk.at].to(wide)
        if targets is None:
            chosen = (picked(y, chunk.target) - reference) - log_sum
            chosen = chosen.masked_fill(chunk.target >= len(args.weight), torch.nan)
            logprobs[chunk.at] = chosen
        else:
            targets = targets if weights is None else targets * weights
            chosen = (targets * ((y - reference[:, None]) - log_sum[:, None])).sum(1)
        loss += (rows[SQUARE] * of_rows**2 - rows[PICK] * chosen).sum()
        if weights is not None:
            loss -= (rows[SPREAD] * (((y - reference[:, None]) - log_sum[:, None]) @ weights)).sum()
        if args.best:
            index[chunk.at] = best_index(y)
        if any(args.keep):
            some = args._replace(
                target=chunk.target,
                rows=rows,
                probabilities=None if args.probabilities is None else args.probabilities[chunk.at],
            )
            sums.add(chunk, capped_gradient(y_gradient(some, y, reference, log_sum), tanh, 1.0))
    return (loss, *kept(sums.results(), args), logprobs, lse, index)
