"""The contrastive ops by definitions that are not ours: open_clip's, transformers' and PyTorch's."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import dtype_of, each_backend
from ops.contrastive.tools import (
    BIAS,
    check_gradients,
    each_exact_backend,
    features,
    open_clip,
    open_clip_sigmoid,
    scores_of,
)
from torch import Tensor

from mmkernels import info_nce, sigmoid_contrastive
from mmkernels.spec import Inputs

# Against formulas that others publish.


def naive_logits(inputs: Inputs) -> Tensor:
    return inputs["logit_scale"] * scores_of(inputs["image"], inputs["text"])


def transformers_clip(inputs: Inputs) -> Tensor:
    """What `transformers.CLIPModel` computes from logits_per_text."""
    modeling_clip = pytest.importorskip("transformers.models.clip.modeling_clip")
    loss = getattr(modeling_clip, "image_text_contrastive_loss", None) or modeling_clip.clip_loss
    return loss(naive_logits(inputs).T)


def supervised(inputs: Inputs) -> Tensor:
    """Khosla et al., eq. 2: the mean over a row's positives of -log p, here across the two towers."""
    log_p, positive = naive_logits(inputs), inputs["image_ids"][:, None] == inputs["text_ids"]
    rows = [-(x.log_softmax(1) * y).sum(1) / y.sum(1) for x, y in ((log_p, positive), (log_p.T, positive.T))]
    return (rows[0].mean() + rows[1].mean()) / 2


def probabilities(inputs: Inputs) -> Tensor:
    """`F.cross_entropy` with the classes' probabilities, which it smooths as it does labels."""
    positive = (inputs["image_ids"][:, None] == inputs["text_ids"]).double()
    return (
        sum(
            F.cross_entropy(x, y / y.sum(1, keepdim=True), label_smoothing=inputs["label_smoothing"])
            for x, y in ((naive_logits(inputs), positive), (naive_logits(inputs).T, positive.T))
        )
        / 2
    )


def smoothed(inputs: Inputs) -> Tensor:
    """`F.cross_entropy` with numbers of classes."""
    labels = torch.arange(len(inputs["image"]))
    logits = naive_logits(inputs)
    rows, columns = (F.cross_entropy(x, labels, label_smoothing=inputs["label_smoothing"]) for x in (logits, logits.T))
    return (rows + columns) / 2


def without_false_negatives(inputs: Inputs) -> Tensor:
    """What shares an id, but is not the pair itself, has a logit of -inf."""
    labels = torch.arange(len(inputs["image"]))
    same = (inputs["image_ids"][:, None] == inputs["text_ids"]) & ~torch.eye(len(labels), dtype=torch.bool)
    logits = naive_logits(inputs).masked_fill(same, -math.inf)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def neg_clip(inputs: Inputs) -> Tensor:
    """NegCLIP: hard captions are more columns of the images' softmax, and no rows of the texts'."""
    image, text, scale = inputs["image"], inputs["text"], inputs["logit_scale"]
    labels = torch.arange(len(image))
    of_images = scale * image @ torch.cat([text, inputs["hard_texts"]]).T
    return (F.cross_entropy(of_images, labels) + F.cross_entropy(scale * text @ image.T, labels)) / 2


def one_direction(inputs: Inputs) -> Tensor:
    logits = naive_logits(inputs)
    return F.cross_entropy(logits if inputs["image_weight"] else logits.T, torch.arange(len(logits)))


def blip2(inputs: Inputs) -> Tensor:
    """BLIP-2's image-text contrast: each pair's best query."""
    image, text, labels = inputs["image"], inputs["text"], torch.arange(len(inputs["image"]))
    best = (image[:, None] @ text[None, :, :, None])[..., 0].amax(-1)  # [N, M] of [N, M, Q]
    logits = inputs["logit_scale"] * best
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


IDS = {"image_ids": torch.tensor([4, 9, 4, -1, 7, 9]), "text_ids": torch.tensor([9, 4, 7, -1, 7, 9, 4, 4, -1])}
SAME = {"image_ids": torch.tensor([4, 9, 4, 4, 7, 9, 0]), "text_ids": torch.tensor([4, 9, 4, 4, 7, 9, 0])}
PUBLISHED: dict[str, tuple[Callable[[Inputs], Tensor], Inputs]] = {
    "open_clip": (lambda inputs: open_clip(**inputs), features(11)),
    "transformers": (transformers_clip, features(11)),
    "one pair": (lambda inputs: open_clip(**inputs), features(1)),
    "one channel": (lambda inputs: open_clip(**inputs), features(6, dim=1)),
    "SupCon": (supervised, features(6, 9) | IDS),
    "probabilities": (probabilities, features(6, 9) | IDS | {"label_smoothing": 0.0}),
    "probabilities, smoothed": (probabilities, features(6, 9) | IDS | {"label_smoothing": 0.3}),
    "labels, smoothed": (smoothed, features(6) | {"label_smoothing": 0.1}),
    "nothing but smoothing": (smoothed, features(6) | {"label_smoothing": 1.0}),
    "false negatives": (without_false_negatives, features(7) | SAME | {"same_id": "ignore"}),
    "NegCLIP": (neg_clip, features(7) | {"hard_texts": features(4, seed=1)["text"]}),
    "images alone": (one_direction, features(9) | {"image_weight": 1.0}),
    "texts alone": (one_direction, features(9) | {"image_weight": 0.0}),
    "BLIP-2": (blip2, features(7, queries=3)),
}


@each_backend("info_nce")
@pytest.mark.parametrize("name", PUBLISHED)
def test_info_nce_is_what_others_publish(backend: str, name: str) -> None:
    formula, inputs = PUBLISHED[name]
    compare(backend, "info_nce", info_nce, formula, inputs)


@each_exact_backend
def test_float64_is_float64_to_its_last_digits(backend: str) -> None:
    """Counts of rows and of positives are integers, whose quotients have 24 bits unless they are converted."""
    ids = {"image_ids": torch.tensor([4, 4, 4, 1, 7, 0]), "text_ids": torch.tensor([4, 7, 4, 1, 7, 9, 4, 7, 5])}
    inputs = features(6, 9) | ids  # of the images 5 have a positive, of the texts 7
    leaves = [inputs[name].requires_grad_() for name in ("image", "text", "logit_scale")]
    loss, stats = info_nce(**inputs, return_stats=True, backend=backend)
    logits, positive = naive_logits(inputs), (ids["image_ids"][:, None] == ids["text_ids"]).double()
    both = [(x[y.any(1)], y[y.any(1)]) for x, y in ((logits, positive), (logits.T, positive.T))]
    want = torch.stack([(-(x.log_softmax(1) * y).sum(1) / y.sum(1)).mean() for x, y in both]).mean()
    exactly = {"rtol": 1e-13, "atol": 1e-14}
    torch.testing.assert_close(loss, want, **exactly)
    for found, true in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(want, leaves), strict=True):
        torch.testing.assert_close(found, true, **exactly)
    shares = [5 * stats.image_accuracy, 5 * stats.image_mean_rank, 7 * stats.text_accuracy, 7 * stats.text_mean_rank]
    torch.testing.assert_close(torch.stack(shares), torch.stack(shares).round(), **exactly)


@each_backend("info_nce")
def test_several_positives_are_counted_whatever_pytorch_s_default_dtype_is(backend: str) -> None:
    def found() -> list[Tensor]:
        floats = {name: x.to(dtype_of("info_nce", backend)).requires_grad_() for name, x in features(6, 9).items()}
        loss, stats = info_nce(**floats, **IDS, return_stats=True, backend=backend)
        return [loss.detach(), *torch.autograd.grad(loss, list(floats.values())), *stats]

    want = found()
    torch.set_default_dtype(torch.bfloat16)
    try:
        torch.testing.assert_close(found(), want, rtol=0, atol=0)
    finally:
        torch.set_default_dtype(torch.float32)


def compare(
    backend: str, op: str, function: Callable[..., Tensor], formula: Callable[[Inputs], Tensor], inputs: Inputs
) -> None:
    """Assert that loss and gradients are those of a formula in float64, on inputs as `backend` gets them."""
    dtype = dtype_of(op, backend)
    floats = {name: x for name, x in inputs.items() if isinstance(x, Tensor) and x.is_floating_point()}
    ours = {name: x.to(dtype).requires_grad_() for name, x in floats.items()}
    true = {name: x.detach().double().requires_grad_() for name, x in ours.items()}
    loss = function(**{**inputs, **ours}, backend=backend)
    want = formula({**inputs, **true})
    torch.testing.assert_close(loss, want.to(dtype))
    assert loss.dtype == dtype and loss.dim() == 0
    check_gradients((loss,), list(ours.values()), (want,), list(true.values()))


def transformers_siglip(inputs: Inputs) -> Tensor:
    """What `transformers.SiglipModel` computes, row by row of logits_per_text."""
    logits = (naive_logits(inputs) + inputs["logit_bias"]).T
    signs = -torch.ones_like(logits) + 2 * torch.eye(len(logits))
    return -torch.sum(F.logsigmoid(signs * logits), -1).mean()


def binary(inputs: Inputs) -> Tensor:
    """Every pair is a question with the answer yes or no, whose cross-entropy PyTorch has."""
    logits = naive_logits(inputs) + inputs["logit_bias"]
    positive = (inputs["image_ids"][:, None] == inputs["text_ids"]).double()
    return F.binary_cross_entropy_with_logits(logits, positive, reduction="sum") / len(logits)


PUBLISHED_SIGMOID: dict[str, tuple[Callable[[Inputs], Tensor], Inputs]] = {
    "open_clip": (lambda inputs: open_clip_sigmoid(**inputs), features(11) | BIAS),
    "transformers": (transformers_siglip, features(11) | BIAS),
    "one pair": (lambda inputs: open_clip_sigmoid(**inputs), features(1) | BIAS),
    "binary": (binary, features(6, 9) | BIAS | IDS),
    "binary, nothing shared": (binary, features(6, 9) | BIAS | {**IDS, "text_ids": torch.arange(100, 109)}),
    "binary, queries": (binary, features(6, 9, queries=3) | BIAS | IDS),
}


@each_backend("sigmoid_contrastive")
@pytest.mark.parametrize("name", PUBLISHED_SIGMOID)
def test_sigmoid_contrastive_is_what_others_publish(backend: str, name: str) -> None:
    formula, inputs = PUBLISHED_SIGMOID[name]
    compare(backend, "sigmoid_contrastive", sigmoid_contrastive, formula, inputs)


# What the parts of the result have to do with each other.


@each_backend("info_nce", interpreted=False)
@pytest.mark.parametrize("options", [{}, {**IDS, "label_smoothing": 0.2}], ids=["pairs", "ids"])
def test_reductions_are_those_of_the_rows(backend: str, options: dict[str, Any]) -> None:
    """Each direction's mean is over rows that have a positive; here images 6 and 7 and text 9 have none."""
    n, m = (8, 10) if options else (8, 8)
    if options:
        options = options | {
            "image_ids": torch.cat([IDS["image_ids"], torch.tensor([100, 101])]),
            "text_ids": torch.cat([IDS["text_ids"], torch.tensor([200])]),
        }
    inputs = {name: x.to(dtype_of("info_nce", backend)) for name, x in features(n, m).items()}
    images, texts = info_nce(**inputs, **options, reduction="none", backend=backend)
    assert images.shape == (n,) and texts.shape == (m,)
    without = (slice(6, None), slice(9, None)) if options else (slice(8, None), slice(8, None))
    assert bool((images[without[0]] == 0).all()) and bool((texts[without[1]] == 0).all())
    rows = (6, 9) if options else (8, 8)
    for weight in (0.0, 0.25, 0.5, 1.0):
        total, mean = (
            info_nce(**inputs, **options, image_weight=weight, reduction=reduction, backend=backend)
            for reduction in ("sum", "mean")
        )
        torch.testing.assert_close(total, weight * images.sum() + (1 - weight) * texts.sum())
        torch.testing.assert_close(mean, weight * images.sum() / rows[0] + (1 - weight) * texts.sum() / rows[1])
