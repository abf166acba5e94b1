"""What the contrastive loss is: the naive formula, its cases, the shapes that it is measured at."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels.ops.common.dtypes import wide_dtype
from mmkernels.ops.contrastive import parts
from mmkernels.ops.contrastive.cases import contrastive_cost
from mmkernels.ops.contrastive.formula import LOG2E, Pairs, best_scores, pairs, queries_of, ranks
from mmkernels.ops.contrastive.info_nce.cases import BENCHMARKS, CASES
from mmkernels.ops.contrastive.info_nce.reduction import Arguments
from mmkernels.spec import OpSpec


def reference(args: Arguments, need_states: bool = True) -> tuple[Tensor, ...]:
    """The naive formula's rows, differentiable by PyTorch."""
    image, text, logit_scale, hard_texts = args.image, args.text, args.logit_scale, args.hard_texts
    image_ids, text_ids, ignore, label_smoothing = args.image_ids, args.text_ids, args.ignore, args.label_smoothing
    scores, of_hard = _logits(image, text, logit_scale, hard_texts)
    rows = scores if of_hard is None else torch.cat([scores, of_hard], 1)
    if image_ids is None:  # the usual formula, at its usual cost
        target = torch.arange(scores.shape[0], device=scores.device)
        losses = [
            F.cross_entropy(x, target, reduction="none", label_smoothing=label_smoothing) for x in (rows, scores.mT)
        ]
    else:
        both = pairs(image_ids, text_ids, ignore, (0, image.shape[0]), (0, text.shape[0]), image.device)
        losses = [
            _cross_entropy(rows, _of_rows(both, rows.shape[1]), label_smoothing),
            _cross_entropy(scores.mT, both.turned(), label_smoothing),
        ]
    wide = wide_dtype(image)
    outputs = [x.to(wide) for x in losses]
    if not need_states and not args.stats:
        return (*outputs, *(scores.new_empty(0) for _ in range(4)))
    with torch.no_grad():
        both = pairs(image_ids, text_ids, ignore, (0, image.shape[0]), (0, text.shape[0]), image.device)
        sides = (rows, _of_rows(both, rows.shape[1])), (scores.mT, both.turned())
        states = [_state(x.to(wide), side) for x, side in sides]
        none = torch.empty(0, dtype=torch.int64, device=image.device)
        found = [_ranks(x, side) if args.stats else none.clone() for x, side in sides]
    return (*outputs, *states, *found)


def _logits(
    image: Tensor, text: Tensor, logit_scale: Tensor, hard_texts: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """[N, M] and [N, K]."""
    scale = logit_scale.reshape(()).to(image.dtype)
    of_hard = None if hard_texts is None else scale * best_scores(image, hard_texts)
    return scale * best_scores(image, text), of_hard


def _of_rows(both: Pairs, columns: int) -> Pairs:
    """With hard texts as columns that are nobody's positive."""
    more = columns - both.positive.shape[1]
    if more == 0:
        return both
    return Pairs(F.pad(both.positive, (0, more)), None if both.hidden is None else F.pad(both.hidden, (0, more)))


def _cross_entropy(logits: Tensor, side: Pairs, label_smoothing: float) -> Tensor:
    """[rows], 0 where a row has no positive."""
    if side.hidden is not None:
        logits = logits.masked_fill(side.hidden, -torch.inf)
    log_p = logits.log_softmax(1)
    count = side.positive.sum(1)
    loss = -log_p.masked_fill(~side.positive, 0.0).sum(1) / count.clamp(min=1)
    if label_smoothing > 0.0:
        if side.hidden is not None:
            log_p = log_p.masked_fill(side.hidden, 0.0)
        loss = (1.0 - label_smoothing) * loss - label_smoothing * log_p.sum(1) / _classes(side)
    return torch.where(count > 0, loss, 0.0)


def _classes(side: Pairs) -> Tensor:
    """[rows], how many columns each row's softmax compares."""
    rows, columns = side.positive.shape
    if side.hidden is None:
        return torch.full((rows,), columns, device=side.positive.device)
    return columns - side.hidden.sum(1)


def _state(logits: Tensor, side: Pairs) -> Tensor:
    if side.hidden is not None:
        logits = logits.masked_fill(side.hidden, -torch.inf)
    largest = logits.amax(1)
    total = (logits - largest[:, None]).exp().sum(1)
    return torch.stack([largest * LOG2E, total, side.positive.sum(1).to(logits), _classes(side).to(logits)])


def _ranks(logits: Tensor, side: Pairs) -> Tensor:
    """[rows], -1 where a row has no positive."""
    only = logits.masked_fill(~side.positive, -torch.inf)
    best, place = only.amax(1), only.argmax(1)
    negative = ~side.positive if side.hidden is None else ~(side.positive | side.hidden)
    found = torch.where(best.isnan(), negative.sum(1), ranks(logits, best, place, negative))
    return torch.where(side.positive.any(1), found, -1)


def reference_backward(args: Any) -> tuple[Tensor, ...]:
    """The gradients, written out: autograd does not record in an op boundary."""
    image, text, logit_scale, hard_texts = args.image, args.text, args.logit_scale, args.hard_texts
    image_ids, text_ids, ignore, label_smoothing = args.image_ids, args.text_ids, args.ignore, args.label_smoothing
    grad_image_loss, grad_text_loss = args.grad_image_loss, args.grad_text_loss
    needs = (args.need_image, args.need_text, args.need_logit_scale, args.need_hard_texts)
    scores, of_hard = _logits(image, text, logit_scale, hard_texts)
    rows = scores if of_hard is None else torch.cat([scores, of_hard], 1)
    both = pairs(image_ids, text_ids, ignore, (0, image.shape[0]), (0, text.shape[0]), image.device)
    of_logits = torch.zeros_like(rows)
    if grad_image_loss is not None:
        of_logits += logit_gradient(rows, _of_rows(both, rows.shape[1]), grad_image_loss, label_smoothing)
    if grad_text_loss is not None:
        side = both.turned()
        of_logits[:, : text.shape[0]] += logit_gradient(scores.mT, side, grad_text_loss, label_smoothing).mT
    texts = text if hard_texts is None else torch.cat([text, hard_texts])
    dots = queries_of(image) @ texts.mT  # [N, Q, M + K]
    best, query = dots.max(1)
    scale = logit_scale.reshape(()).to(image.dtype)
    of_dots = torch.zeros_like(dots).scatter_(1, query[:, None], (scale * of_logits)[:, None])
    of_image = (of_dots @ texts).reshape(image.shape)
    of_texts = torch.einsum("nqm,nqd->md", of_dots, queries_of(image))
    of_scale = (of_logits * best).sum(dtype=wide_dtype(image)).reshape(logit_scale.shape)
    of_text, of_more = of_texts[: text.shape[0]], of_texts[text.shape[0] :]
    inputs, grads = (image, text, logit_scale, hard_texts), (of_image, of_text, of_scale, of_more)
    return tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format).copy_(g)
        if need and x is not None
        else image.new_empty(0)
        for x, g, need in zip(inputs, grads, needs, strict=True)
    )


def logit_gradient(logits: Tensor, side: Pairs, grad: Tensor, label_smoothing: float) -> Tensor:
    """[rows, columns], of the rows' losses times `grad` [rows]."""
    if side.hidden is not None:
        logits = logits.masked_fill(side.hidden, -torch.inf)
    count = side.positive.sum(1, keepdim=True)
    target = side.positive / count.clamp(min=1)
    if label_smoothing > 0.0:
        even = torch.ones_like(target) if side.hidden is None else (~side.hidden).to(target)
        target = (1.0 - label_smoothing) * target + label_smoothing * even / _classes(side)[:, None]
    found = (logits.softmax(1) - target.to(logits.dtype)) * grad[:, None].to(logits.dtype)
    return torch.where(count > 0, found, 0.0)


SPEC = OpSpec(
    name="info_nce",
    cases=CASES,
    cost=contrastive_cost(products_backward=3),
    benchmarks=BENCHMARKS,
    always_wide=frozenset({"logit_scale"}),
    parts=parts.INFO_NCE,
)
