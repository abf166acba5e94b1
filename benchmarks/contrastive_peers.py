"""The peers of the contrastive ops: open_clip's forms, compiled naive losses, a cached loss, a sort.

All are written from the formulas; only the cached loss is another package: ``pip install "mmkernels[peers]"``.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels.bench.peers import Call, CantRunError, Peer, check_room, compiled, first_line
from mmkernels.machine import matmul_rate
from mmkernels.spec import Inputs

_MOST_SECONDS = 10.0  # of a cached step's matrix products at the measured peak, above which it is left out
_CACHED_PRODUCTS = 6  # that a cached step makes at least: both directions' scores, and two gradients of each
_BLOCK = 1024  # queries whose scores the blocked ranks hold at once


# The softmax loss.


def open_clip(inputs: Inputs) -> Call:
    """open_clip's distributed form: each direction its own matrix product, and the mean of two cross-entropies."""
    image, text, scale = _losses_tensors(inputs, tensors=4)
    labels = torch.arange(len(image), device=image.device)

    def call() -> Tensor:
        logits_per_image, logits_per_text = scale * image @ text.T, scale * text @ image.T
        return _wide(F.cross_entropy(logits_per_image, labels) + F.cross_entropy(logits_per_text, labels)) / 2

    return call


def naive_loss(image: Tensor, text: Tensor, scale: Tensor, labels: Tensor) -> Tensor:
    """One matrix product, of several queries the largest scores, and two cross-entropies."""
    scores = image @ text.T
    logits = scale * (scores if image.dim() == 2 else scores.amax(1))
    return _wide(F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def compiled_loss(inputs: Inputs) -> Call:
    """`naive_loss` by ``torch.compile``."""
    image, text, scale = _losses_tensors(inputs, tensors=2, queries=True)
    return compiled(naive_loss, image, text, scale, torch.arange(len(image), device=image.device))


def cached(inputs: Inputs, mini_batch: int = 32) -> Call:
    """sentence-transformers' CachedMultipleNegativesRankingLoss, in both directions; 32 is its own mini-batch.

    Its model's output is the features. It computes gradients with the loss, mini-batch by mini-batch, as in training.
    That it embeds everything twice is not measured.
    """
    image, text, scale = _losses_tensors(inputs)
    seconds = _CACHED_PRODUCTS * 2.0 * image.numel() * len(text) / matmul_rate(image.dtype, image.device.type)
    if seconds > _MOST_SECONDS:
        raise CantRunError(f"would take {seconds:.0f} s a step at the measured peak: left out")
    loss = _cached_loss(mini_batch)
    return lambda: _Cached.apply(image, text, scale, loss)


class _Cached(torch.autograd.Function):
    """The loss and its gradients at once, as in the package's training step."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, text: Tensor, scale: Tensor, loss: Any) -> Tensor:
        need = any(ctx.needs_input_grad)
        leaves = [x.detach().requires_grad_(need) for x in (image, text)]
        batches = [[part.detach().requires_grad_(need) for part in x.split(loss.mini_batch_size)] for x in leaves]
        loss.scale = scale.detach().requires_grad_(need)
        with torch.set_grad_enabled(need):
            value = loss.calculate_loss(batches, with_backward=need)
        if need:
            ctx.save_for_backward(*(torch.cat([part.grad for part in parts]) for parts in batches), loss.scale.grad)
        loss.scale = 1.0
        return _wide(value.detach())

    @staticmethod
    def backward(ctx: Any, grad: Any) -> tuple[Tensor | None, ...]:
        return (*(x * grad.to(x.dtype) for x in ctx.saved_tensors), None)


@cache
def _cached_loss(mini_batch: int) -> Any:
    try:
        from sentence_transformers.util import dot_score

        try:
            from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
        except ImportError:
            from sentence_transformers.losses import CachedMultipleNegativesRankingLoss
    except ImportError as error:
        raise CantRunError(f'is not installed: pip install "mmkernels[peers]" ({first_line(error)})') from error
    model = torch.nn.Sequential(torch.nn.Identity())  # the loss only checks that it can take mini-batches
    both: Any = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
    try:
        return CachedMultipleNegativesRankingLoss(model, similarity_fct=dot_score, mini_batch_size=mini_batch, **both)
    except TypeError as error:
        raise CantRunError(f"is too old: pip install -U sentence-transformers ({first_line(error)})") from error


# The sigmoid loss.


def open_clip_sigmoid(inputs: Inputs) -> Call:
    """open_clip's form: a matrix of labels, 1 on the diagonal and -1 beside it."""
    image, text, scale, bias = (*_losses_tensors(inputs, tensors=3), inputs["logit_bias"])
    return lambda: naive_sigmoid_loss(image, text, scale, bias)


def naive_sigmoid_loss(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    logits = scale * image @ text.T + bias
    labels = 2 * torch.eye(len(image), device=image.device, dtype=image.dtype) - 1
    return _wide(-F.logsigmoid(labels * logits).sum()) / len(image)


def compiled_sigmoid(inputs: Inputs) -> Call:
    """`naive_sigmoid_loss` by ``torch.compile``."""
    return compiled(naive_sigmoid_loss, *_losses_tensors(inputs, tensors=2), inputs["logit_bias"])


# Ranks.


def argsort(inputs: Inputs) -> Call:
    """Sorts all scores, and looks up the place of each target."""
    query, gallery, target = (inputs[name] for name in ("query", "gallery", "target"))
    check_room(len(query) * len(gallery) * (query.element_size() + 8), query.device)

    def call() -> Tensor:
        order = (query @ gallery.T).argsort(dim=1, descending=True, stable=True)
        return (order == target[:, None]).int().argmax(1)

    return call


def blocks(inputs: Inputs) -> Call:
    """Counts the scores above the target's, for some queries at a time, as a user would write it to save memory.

    Ties are ignored, which the op counts.
    """
    query, gallery, target = (inputs[name] for name in ("query", "gallery", "target"))

    def call() -> Tensor:
        ranks = []
        for queries, targets in zip(query.split(_BLOCK), target.split(_BLOCK), strict=True):
            scores = queries @ gallery.T
            ranks.append((scores > scores.gather(1, targets[:, None])).sum(1))
        return torch.cat(ranks)

    return call


def _losses_tensors(inputs: Inputs, tensors: int = 0, *, queries: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the tensors of a plain call; `tensors` of the logits' size must fit into memory.

    Args:
        queries: whether an image may have several.
    """
    image, text, scale = (inputs[name] for name in ("image", "text", "logit_scale"))
    several = image.dim() != 2 and not queries
    if several or inputs.keys() - {"image", "text", "logit_scale", "logit_bias"}:
        raise CantRunError("only features [N, d] without ids, hard texts and smoothing")
    check_room(tensors * image.shape[:-1].numel() * len(text) * image.element_size(), image.device)
    return image, text, scale


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


INFO_NCE = (
    Peer("open_clip", open_clip),
    Peer("compiled", compiled_loss, slow=True),
    Peer("cached", cached, slow=True),
    Peer("cached 512", partial(cached, mini_batch=512), slow=True),
)
SIGMOID = (Peer("open_clip", open_clip_sigmoid), Peer("compiled", compiled_sigmoid, slow=True))
RANKS = (Peer("argsort", argsort), Peer("matmul", blocks))
