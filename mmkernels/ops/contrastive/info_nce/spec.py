"""The definition of the contrastive loss: the naive formula, and its gradients written out."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels.ops.common.dtypes import wide_dtype
from mmkernels.ops.contrastive import parts
from mmkernels.ops.contrastive.cases import contrastive_cost
from mmkernels.ops.contrastive.formula import (
    LOG2E,
    Pairs,
    best_scores,
    count_before,
    hard_pairs,
    pairs,
    queries_of,
    ranks,
    score_gradients,
)
from mmkernels.ops.contrastive.info_nce.cases import BENCHMARKS, CASES
from mmkernels.ops.contrastive.info_nce.reduction import Arguments
from mmkernels.spec import OpSpec


def reference(args: Arguments, need_states: bool = True) -> tuple[Tensor, ...]:
    """Returns `Results` but for the loss, by the naive formula, which PyTorch can differentiate."""
    image_logits, text_logits = _logits(args)
    if args.image_ids is None:  # the usual formula, at its usual cost
        target = torch.arange(len(args.image), device=args.image.device)
        image_loss, text_loss = (
            F.cross_entropy(x, target, reduction="none", label_smoothing=args.label_smoothing)
            for x in (image_logits, text_logits)
        )
    else:
        of_images, of_texts = _pairs(args)
        image_loss = _cross_entropy(image_logits, of_images, args.label_smoothing)
        text_loss = _cross_entropy(text_logits, of_texts, args.label_smoothing)
    wide = wide_dtype(args.image)
    losses = image_loss.to(wide), text_loss.to(wide)
    if not need_states and not args.stats:
        return *losses, *(image_logits.new_empty(0) for _ in range(4))
    with torch.no_grad():
        of_images, of_texts = _pairs(args)
        states = _state(image_logits.to(wide), of_images), _state(text_logits.to(wide), of_texts)
        if not args.stats:
            return *losses, *states, *(image_logits.new_empty(0, dtype=torch.int64) for _ in range(2))
        return *losses, *states, _ranks(image_logits, of_images), _ranks(text_logits, of_texts)


def _logits(args: Any) -> tuple[Tensor, Tensor]:
    """Returns the logits of images [N, M + K] and of texts [M, N]."""
    scale = args.logit_scale.reshape(()).to(args.image.dtype)
    logits = scale * best_scores(args.image, args.text)
    if args.hard_texts is None:
        return logits, logits.mT
    return torch.cat([logits, scale * best_scores(args.image, args.hard_texts)], 1), logits.mT


def _pairs(args: Any) -> tuple[Pairs, Pairs]:
    """Returns the pairs of images [N, M + K] and of texts [M, N]."""
    found = pairs(
        args.image_ids, args.text_ids, ignore=args.ignore,
        images=slice(0, len(args.image)), texts=slice(0, len(args.text)), device=args.image.device,
    )  # fmt: skip
    if args.hard_texts is None:
        return found, found.transposed()
    hard = hard_pairs(args.image_ids, args.hard_text_ids, args.ignore)
    return found.with_hard_texts(len(args.hard_texts), hard), found.transposed()


def _cross_entropy(logits: Tensor, pairs: Pairs, label_smoothing: float) -> Tensor:
    """Returns [rows], 0 where a row has no positive."""
    log_p = pairs.visible(logits, -torch.inf).log_softmax(1)
    count = pairs.positive.sum(1)
    loss = -log_p.masked_fill(~pairs.positive, 0.0).sum(1) / count.clamp(min=1)
    if label_smoothing > 0.0:
        mean = pairs.visible(log_p, 0.0).sum(1) / pairs.classes()
        loss = (1.0 - label_smoothing) * loss - label_smoothing * mean
    return torch.where(count > 0, loss, 0.0)


def _state(logits: Tensor, pairs: Pairs) -> Tensor:
    """Returns [4, rows], see `reduction.REFERENCE`."""
    logits = pairs.visible(logits, -torch.inf)
    largest = logits.amax(1)
    total = (logits - largest[:, None]).exp().sum(1)
    return torch.stack([largest * LOG2E, total, pairs.positive.sum(1).to(logits), pairs.classes().to(logits)])


def _ranks(logits: Tensor, pairs: Pairs) -> Tensor:
    """Returns int64 [rows], -1 where a row has no positive."""
    positives = logits.masked_fill(~pairs.positive, -torch.inf)
    best, negative = positives.amax(1), pairs.negative
    before = count_before(logits, best, positives.argmax(1), negative)
    return ranks(before, best, negative.sum(1), pairs.positive.any(1))


def reference_backward(args: Any) -> tuple[Tensor, ...]:
    """Returns the gradients, written out: autograd does not record inside of an op boundary."""
    needs = (args.need_image, args.need_text, args.need_logit_scale, args.need_hard_texts)
    texts = args.text if args.hard_texts is None else torch.cat([args.text, args.hard_texts])
    best, winner = (queries_of(args.image) @ texts.mT).max(1)  # [N, M + K]
    logits_grad = _logits_gradient(args)
    scale = args.logit_scale.reshape(()).to(args.image.dtype)
    image_grad, texts_grad = score_gradients(scale * logits_grad, winner, args.image, texts)
    scale_grad = (logits_grad * best).sum(dtype=wide_dtype(args.image)).reshape(args.logit_scale.shape)
    text_grad, hard_grad = texts_grad[: len(args.text)], texts_grad[len(args.text) :]
    inputs = (args.image, args.text, args.logit_scale, args.hard_texts)
    grads = (image_grad, text_grad, scale_grad, hard_grad)
    return tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format).copy_(grad)
        if need and x is not None
        else args.image.new_empty(0)
        for x, grad, need in zip(inputs, grads, needs, strict=True)
    )


def _logits_gradient(args: Any) -> Tensor:
    """Returns the gradient of the images' logits [N, M + K], from both directions' losses."""
    image_logits, text_logits = _logits(args)
    of_images, of_texts = _pairs(args)
    total = torch.zeros_like(image_logits)
    if args.grad_image_loss is not None:
        total += logit_gradient(image_logits, of_images, args.grad_image_loss, args.label_smoothing)
    if args.grad_text_loss is not None:
        of_direction = logit_gradient(text_logits, of_texts, args.grad_text_loss, args.label_smoothing)
        total[:, : len(args.text)] += of_direction.mT
    return total


def logit_gradient(logits: Tensor, pairs: Pairs, grad: Tensor, label_smoothing: float) -> Tensor:
    """Returns the gradient of one direction's losses by its logits [rows, columns].

    Args:
        grad: [rows], of the losses.
    """
    count = pairs.positive.sum(1, keepdim=True)
    target = pairs.positive.to(wide_dtype(logits)) / count.clamp(min=1)
    if label_smoothing > 0.0:
        uniform = pairs.visible(torch.ones_like(target), 0.0) / pairs.classes()[:, None]
        target = (1.0 - label_smoothing) * target + label_smoothing * uniform
    p = pairs.visible(logits, -torch.inf).softmax(1)
    gradient = (p - target.to(logits.dtype)) * grad[:, None].to(logits.dtype)
    return torch.where(count > 0, gradient, 0.0)


SPEC = OpSpec(
    name="info_nce",
    cases=CASES,
    cost=contrastive_cost(products_backward=3),
    benchmarks=BENCHMARKS,
    always_wide=frozenset({"logit_scale"}),
    parts=parts.INFO_NCE,
)
