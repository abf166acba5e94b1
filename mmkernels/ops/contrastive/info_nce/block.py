"""The contrastive loss of a part of all pairs: this process's images and some texts from anywhere.

Three ops without a gradient of their own, of which a loss over several processes is made: `BEST` finds the best
positives, `BLOCK` sums the softmaxes of both directions, `BACKWARD` takes the sums of all blocks and returns what this
block adds to the gradients. Text j's partner is image ``first_text + j``, if there is one: without ids the only
positive, as in ``info_nce``. Sums and gradients are float32, float64 for float64 features: "wide".
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmkernels.ops.common.dtypes import wide_dtype
from mmkernels.ops.common.results import or_empty
from mmkernels.ops.contrastive.formula import (
    Pairs,
    best_scores,
    count_before,
    pairs,
    queries_of,
    score_gradients,
)
from mmkernels.ops.contrastive.info_nce import chunked_block
from mmkernels.ops.contrastive.info_nce.merging import logits_in_base_2
from mmkernels.runtime.backends import cpu_kernel, triton_kernel
from mmkernels.runtime.dispatch import Backend, define


class BestArguments(NamedTuple):
    """The record of `info_nce_best`."""

    image: Tensor  # [N, d] or [N, Q, d]
    text: Tensor  # [M, d]
    logit_scale: Tensor  # one element
    image_ids: Tensor | None  # int64 [N]
    text_ids: Tensor | None  # int64 [M]
    first_text: int
    ignore: bool  # see `formula.pairs`


class Best(NamedTuple):
    """The best positive of each row of both directions.

    Scores are in the order of logits, and their unit is the backend's own: a dot times the scale's sign, or times the
    scale. -inf: the row has no positive here; NaN, if a positive's is, is the best. The index is that of the text among
    the block's, or of the image, the lowest of equals; it means nothing where there is no positive.
    """

    image_best: Tensor  # wide [N]
    image_index: Tensor  # int64 [N]
    text_best: Tensor  # wide [M]
    text_index: Tensor  # int64 [M]


class BlockArguments(NamedTuple):
    """The record of `info_nce_block`: with the best positives over all blocks, or without them and without ranks.

    An index is relative to this block's first text, or to the first image; it may be negative or past the end.
    """

    image: Tensor
    text: Tensor
    logit_scale: Tensor
    image_ids: Tensor | None
    text_ids: Tensor | None
    first_text: int
    ignore: bool
    smooth: bool  # whether `merging.ALL_DOTS` is wanted
    image_best: Tensor | None  # wide [N], scores as `info_nce_best` of the same backend returns them
    image_index: Tensor | None  # int64 [N]
    text_best: Tensor | None  # wide [M]
    text_index: Tensor | None  # int64 [M]


class Block(NamedTuple):
    """What `info_nce_block` returns: sums, see `merging.POSITIVE_DOTS`, and how many negatives rank before the best
    positive."""

    image_sums: Tensor  # wide [6, N]
    text_sums: Tensor  # wide [6, M]
    image_before: Tensor  # int64 [N], or [0] without the best positives
    text_before: Tensor  # int64 [M], or [0]


class BackwardArguments(NamedTuple):
    """The record of `info_nce_block_backward`."""

    image: Tensor
    text: Tensor
    logit_scale: Tensor
    image_ids: Tensor | None
    text_ids: Tensor | None
    first_text: int
    ignore: bool
    ranked: bool  # whether the sums were made beside ranks: then dots are summed in the order that comparing them needs
    label_smoothing: float
    middle: float  # dots are measured from here in the scale's gradient, where over all blocks a constant cancels
    image_state: Tensor  # [4, N], the first rows of the sums over all blocks
    text_state: Tensor  # [4, M]
    grad_image_loss: Tensor | None  # wide [N]
    grad_text_loss: Tensor | None  # wide [M]
    need_image: bool
    need_text: bool
    need_logit_scale: bool


class BlockGradients(NamedTuple):
    """This block's share of the gradients, wide and contiguous; [0] where none is needed."""

    of_image: Tensor  # as image
    of_text: Tensor  # [M, d]
    of_scale: Tensor  # []


def _pairs(args: Any) -> Pairs:
    return pairs(
        args.image_ids, args.text_ids, ignore=args.ignore,
        images=slice(0, len(args.image)), texts=slice(0, len(args.text)), device=args.image.device,
        first_text=args.first_text,
    )  # fmt: skip


def _dots(args: Any) -> Tensor:
    """Returns [N, M] in the wide dtype."""
    wide = wide_dtype(args.image)
    return best_scores(args.image.to(wide), args.text.to(wide))


def _base_2(dots: Tensor, logit_scale: Tensor) -> Tensor:
    return logits_in_base_2(dots, logit_scale, narrow=dots.dtype != torch.float64)


def reference_best(args: BestArguments) -> tuple[Tensor, ...]:
    """Returns `Best` by the naive formula."""
    dots, positive = _dots(args), _pairs(args).positive
    scores = (dots * args.logit_scale.reshape(()).sign().to(dots.dtype)).masked_fill(~positive, -torch.inf)
    return scores.amax(1), scores.argmax(1), scores.amax(0), scores.argmax(0)


def reference(args: BlockArguments) -> tuple[Tensor, ...]:
    """Returns `Block` by the naive formula."""
    dots, found = _dots(args), _pairs(args)
    scores = dots * args.logit_scale.reshape(()).sign().to(dots.dtype)
    results = []
    before = [args.image.new_empty(0, dtype=torch.int64) for _ in range(2)]
    directions = ((dots, scores, found), (dots.mT, scores.mT, found.transposed()))
    for n, (values, ordered, belongs) in enumerate(directions):
        results.append(_sums(values, belongs, args.logit_scale, args.smooth))
        best, index = ((args.image_best, args.image_index), (args.text_best, args.text_index))[n]
        if best is not None and index is not None:
            before[n] = count_before(ordered, best, index, belongs.negative)
    return (*results, *before)


def _sums(dots: Tensor, pairs: Pairs, logit_scale: Tensor, smooth: bool) -> Tensor:
    """Returns the sums [6, rows] of one direction."""
    logits = pairs.visible(_base_2(dots, logit_scale), -torch.inf)
    top = logits.amax(1)
    if dots.dtype != torch.float64:
        top = top.round().to(dots.dtype).double()
    base = top.masked_fill(top == -torch.inf, 0.0)
    total = torch.exp2(logits - base[:, None]).sum(1)
    wide = dots.double()
    all_dots = pairs.visible(wide, 0.0).sum(1) if smooth else torch.zeros_like(total)
    positive_dots = wide.masked_fill(~pairs.positive, 0.0).sum(1)
    rows = (top, total, pairs.positive.sum(1), pairs.classes(), positive_dots, all_dots)
    return torch.stack([x.to(dots.dtype) for x in rows])


def reference_backward(args: BackwardArguments) -> tuple[Tensor, ...]:
    """Returns `BlockGradients` by the naive formula."""
    wide = wide_dtype(args.image)
    image, text = args.image.to(wide), args.text.to(wide)
    dots, winner = (queries_of(image) @ text.mT).max(1)
    logits, found = _base_2(dots, args.logit_scale), _pairs(args)
    total = torch.zeros_like(logits)
    if args.grad_image_loss is not None:
        total += _logit_gradient(logits, found, args.image_state, args.grad_image_loss, args.label_smoothing)
    if args.grad_text_loss is not None:
        belongs = found.transposed()
        total += _logit_gradient(logits.mT, belongs, args.text_state, args.grad_text_loss, args.label_smoothing).mT
    of_scale = (total * (dots.double() - args.middle)).sum().to(wide)
    scale = args.logit_scale.reshape(()).double()
    of_image, of_text = score_gradients((scale * total).to(wide), winner, image, text)
    grads = (
        of_image.contiguous() if args.need_image else None,
        of_text.contiguous() if args.need_text else None,
        of_scale if args.need_logit_scale else None,
    )
    return tuple(or_empty(x, image) for x in grads)


def _logit_gradient(logits: Tensor, pairs: Pairs, state: Tensor, grad: Tensor, label_smoothing: float) -> Tensor:
    """Returns the gradient of one direction's losses by its base-e logits, float64 [rows, columns].

    Args:
        logits: to the base 2.
    """
    reference, total, positives, classes = state.double()[:, :, None]
    p = pairs.visible(torch.exp2(logits - reference) / total, 0.0)
    target = (1.0 - label_smoothing) * pairs.positive.double() / positives.clamp(min=1)
    target = target + pairs.visible(label_smoothing / classes.clamp(min=1).expand_as(p), 0.0)
    weight = torch.where((positives > 0) & (classes > 1), grad.double()[:, None], 0.0)
    return torch.where(weight == 0.0, 0.0, (p - target) * weight)


def _fake_best(args: BestArguments) -> tuple[Tensor, ...]:
    wide = wide_dtype(args.image)
    results = []
    for x in (args.image, args.text):
        results += [x.new_empty(x.shape[0], dtype=wide), x.new_empty(x.shape[0], dtype=torch.int64)]
    return tuple(results)


def _fake(args: BlockArguments) -> tuple[Tensor, ...]:
    image, wide = args.image, wide_dtype(args.image)
    sizes = (image.shape[0], args.text.shape[0])
    sums = [image.new_empty(6, n, dtype=wide) for n in sizes]
    return (*sums, *(image.new_empty(0 if args.image_best is None else n, dtype=torch.int64) for n in sizes))


def _fake_backward(args: BackwardArguments) -> tuple[Tensor, ...]:
    image, wide = args.image, wide_dtype(args.image)
    wanted = ((image.shape, args.need_image), (args.text.shape, args.need_text), ((), args.need_logit_scale))
    return tuple(image.new_empty(shape if need else (0,), dtype=wide) for shape, need in wanted)


BEST = define(
    "info_nce_best",
    BestArguments,
    Best,
    fake=_fake_best,
    backends=[
        triton_kernel("mmkernels.ops.contrastive.info_nce.triton.blocks", "best"),
        cpu_kernel("info_nce_best_cpu"),
        Backend("chunked", chunked_block.best),
        Backend("reference", reference_best),
    ],
)
BLOCK = define(
    "info_nce_block",
    BlockArguments,
    Block,
    fake=_fake,
    backends=[
        triton_kernel("mmkernels.ops.contrastive.info_nce.triton.blocks", "block"),
        cpu_kernel("info_nce_block_cpu"),
        Backend("chunked", chunked_block.block),
        Backend("reference", reference),
    ],
)
BACKWARD = define(
    "info_nce_block_backward",
    BackwardArguments,
    BlockGradients,
    fake=_fake_backward,
    backends=[
        triton_kernel("mmkernels.ops.contrastive.info_nce.triton.blocks", "backward"),
        cpu_kernel("info_nce_block_backward_cpu"),
        Backend("chunked", chunked_block.backward),
        Backend("reference", reference_backward),
    ],
)
