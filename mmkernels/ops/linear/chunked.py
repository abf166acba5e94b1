"""The linear ops in plain PyTorch: chunks of rows, each with all tokens. Their choice waits for the device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmkernels.ops.common.dtypes import wide_dtype
from mmkernels.ops.linear.formula import (
    BEST,
    IGNORED,
    MOMENT,
    PICKED,
    REFERENCE,
    STATES_OF_ROW,
    SUM,
    TOTAL,
    best_index,
    capped,
    capped_gradient,
    products_of,
    y_gradient,
)

CHUNK_BYTES = 2**24  # of one chunk's logits; about four of them are alive at once


class Chunk(NamedTuple):
    """Some rows that take part."""

    at: Tensor | slice  # which of all rows
    hidden: Tensor  # [rows, d]
    target: Tensor  # int64 [rows]


def chunks(args: Any) -> Iterator[Chunk]:
    """Yields the rows that are not ignored, as many at a time as CHUNK_BYTES allows."""
    hidden, target = args.hidden, args.target
    step = max(1, CHUNK_BYTES // (wide_dtype(hidden).itemsize * len(args.weight)))
    live = target != IGNORED
    if bool(live.all()):
        for first in range(0, len(hidden), step):
            at = slice(first, min(first + step, len(hidden)))
            yield Chunk(at, hidden[at], target[at])
        return
    for index in live.nonzero()[:, 0].split(step):
        yield Chunk(index, hidden[index], target[index])


def products(args: Any, chunk: Chunk) -> Tensor:
    """Returns the products of a chunk with all tokens, and the bias added, wide [rows, V]."""
    z = (chunk.hidden @ args.weight.mT).to(wide_dtype(args.hidden))
    return z if args.bias is None else z.add_(args.bias)


def softmax(y: Tensor) -> tuple[Tensor, Tensor]:
    """Returns of each row a reference near its largest logit, and the exponentials of the logits above it."""
    reference = y.amax(1)
    return reference, (y - reference.masked_fill(reference == -torch.inf, 0.0)[:, None]).exp_()


def states(args: Any) -> tuple[Tensor, Tensor]:
    """Returns `rows.States`."""
    found = args.hidden.new_zeros((STATES_OF_ROW, len(args.hidden)), dtype=wide_dtype(args.hidden))
    found[SUM] = 1.0
    index = torch.full_like(args.target, -1) if args.best else args.target.new_empty(0)
    for chunk in chunks(args):
        y = capped(products(args, chunk), args.softcap, args.temperature).y
        reference, weights = softmax(y)
        found[REFERENCE, chunk.at] = reference
        found[SUM, chunk.at] = weights.sum(1)
        found[PICKED, chunk.at] = picked(y, chunk.target)
        if args.entropy:
            deviations = (y - reference[:, None]).masked_fill_(weights == 0, 0.0)
            found[MOMENT, chunk.at] = weights.mul_(deviations).sum(1)
        if args.token_weight is not None:
            found[TOTAL, chunk.at] = y @ args.token_weight
        if args.best:
            found[BEST, chunk.at] = reference
            index[chunk.at] = best_index(y)
    return found, index


def picked(y: Tensor, target: Tensor) -> Tensor:
    """Returns [rows], the targets' logits, -inf where the token is elsewhere; y: [rows, V]."""
    found = y.gather(1, target.clamp(0, y.shape[1] - 1)[:, None])[:, 0]
    return found.where((target >= 0) & (target < y.shape[1]), -torch.inf)


class GradientSums:
    """The gradients of hidden, weight and bias, to which chunks add.

    Args:
        args: a record with hidden, weight and bias.
        hidden, weight, bias: the dtypes of the results; None: not wanted.
    """

    def __init__(
        self, args: Any, hidden: torch.dtype | None, weight: torch.dtype | None, bias: torch.dtype | None
    ) -> None:
        self.weight, self.wide = args.weight, wide_dtype(args.hidden)
        self.dtypes = weight, bias
        self.of_hidden = None if hidden is None else torch.zeros_like(args.hidden, dtype=hidden).contiguous()
        self.of_weight = None if weight is None else args.weight.new_zeros(args.weight.shape, dtype=self.wide)
        self.of_bias = None if bias is None else args.weight.new_zeros(len(args.weight), dtype=self.wide)

    def add(self, chunk: Chunk, flow: Tensor) -> None:
        """Add what the gradient of a chunk's products, wide [rows, V], gives."""
        times = products_of(flow, chunk.hidden.dtype)
        if self.of_hidden is not None:
            self.of_hidden[chunk.at] = times(self.weight, False).to(self.of_hidden.dtype)
        if self.of_weight is not None:
            self.of_weight += times(chunk.hidden, True)
        if self.of_bias is not None:
            self.of_bias += flow.sum(0)

    def results(self) -> tuple[Tensor | None, ...]:
        weight, bias = self.dtypes
        return (
            self.of_hidden,
            None if self.of_weight is None or weight is None else self.of_weight.to(weight),
            None if self.of_bias is None or bias is None else self.of_bias.to(bias),
        )


def gradients(args: Any) -> tuple[Tensor, ...]:
    """Returns `rows.Gradients`."""
    hidden, weight, bias = args.hidden, args.weight, args.bias
    sums = GradientSums(
        args,
        (wide_dtype(hidden) if args.wide else hidden.dtype) if args.need_hidden else None,
        weight.dtype if args.need_weight else None,
        bias.dtype if args.need_bias and bias is not None else None,
    )
    for chunk in chunks(args):
        y, tanh = capped(products(args, chunk), args.softcap, args.temperature)
        flow = y_gradient(args, y, args.rows[:, chunk.at], args.softmax[:, chunk.at], chunk.target)
        sums.add(chunk, capped_gradient(flow, tanh, args.temperature))
    of_hidden, of_weight, of_bias = (hidden.new_empty(0) if x is None else x for x in sums.results())
    return of_hidden, of_weight, of_bias
