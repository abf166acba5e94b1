"""How contrastive problems are checked whose logits do not fit into memory.

Every gradient depends on every feature, through the sums of the softmax's rows and columns. So all logits are computed
once more, block by block in float32, and summed to the loss and the scalars' gradients. The gradients of a sample of
images and texts are computed in float64, each from its logits with all others and the sums of the other direction. The
sum of all rows' gradients times their features is known too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels.ops.contrastive.formula import best_scores, queries_of, score_gradients
from mmkernels.spec import Expected, Inputs, Parts, Shard

_SAMPLE = 128  # images, texts or queries whose results are compared, the first and the last among them
_SHARPENED = 1024  # rows of the other direction whose sums are computed again in float64
_BLOCK = 1024  # images and texts whose logits are computed at once, within the caches

Gradient = Callable[[str, torch.dtype], Tensor]
"""(argument, dtype) -> the definition's gradient in this dtype: a scalar's, or that of the sample's features, times N
and divided by the scale."""


def elements(inputs: Inputs) -> int:
    """Returns the number of elements of the matrix of logits or scores, those of each of an image's queries."""
    first, second = (inputs[name] for name in (("query", "gallery") if "query" in inputs else ("image", "text")))
    return int(first.shape[:-1].numel()) * len(second)


def sample(count: int, device: torch.device) -> Tensor:
    """Returns some of `count` row numbers, the same each time."""
    inner = torch.randperm(count, generator=torch.Generator().manual_seed(0))[: _SAMPLE - 2]
    return torch.cat([inner, torch.tensor([0, count - 1])]).unique().to(device)


def _blocks(image: Tensor, text: Tensor, scale: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yields the rows of some images and of some texts, and their logits in float32."""
    image, text = image.float(), text.float()
    for first in range(0, len(image), _BLOCK):
        rows = slice(first, first + _BLOCK)
        for start in range(0, len(text), _BLOCK):
            columns = slice(start, start + _BLOCK)
            yield rows, columns, best_scores(image[rows], text[columns]).mul_(scale)


def _of_pairs(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """[N], each image's logit with its text, in float64."""
    dots = (queries_of(image.double()) * text.double()[:, None]).sum(-1)  # [N, Q]
    return scale.double() * dots.amax(1)


# The softmax loss.


class Softmax:
    """One direction: of each row the log-sum-exp of its logits, and their mean by the softmax."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self._base = torch.full((rows,), -torch.inf, device=device)
        self._sum, self._sum_of_logits = torch.zeros(2, rows, dtype=torch.float64, device=device)

    def add(self, at: slice, logits: Tensor) -> None:
        """Some columns [rows, columns] of the rows `at`."""
        base = torch.maximum(self._base[at], logits.amax(1))
        weights = (logits - base[:, None]).exp_()
        kept = (self._base[at] - base).double().exp()
        self._sum[at] = self._sum[at] * kept + weights.sum(1)
        self._sum_of_logits[at] = self._sum_of_logits[at] * kept + weights.mul_(logits).sum(1)
        self._base[at] = base

    @property
    def lse(self) -> Tensor:
        return self._base + self._sum.log()

    @property
    def mean(self) -> Tensor:
        return self._sum_of_logits / self._sum


def softmaxes(image: Tensor, text: Tensor, scale: Tensor) -> tuple[Softmax, Softmax]:
    """Of images and of texts, from one pass over the logits."""
    images, texts = (Softmax(len(x), x.device) for x in (image, text))
    for rows, columns, logits in _blocks(image, text, scale):
        images.add(rows, logits)
        texts.add(columns, logits.T)
    return images, texts


def info_nce_expected(inputs: Inputs, grads: Sequence[str], cotangents: Sequence[Tensor]) -> list[Expected]:
    """Returns what is right for a call with features alone and reduction="mean"."""
    image, text, scale = _plain(inputs, queries=True)
    both, pairs = softmaxes(image, text, scale), _of_pairs(image, text, scale)
    loss = torch.stack([(direction.lse - pairs).mean() for direction in both]).mean()
    of_scale = torch.stack([(direction.mean - pairs).mean() for direction in both]).mean() / scale.double()
    rows = sample(len(image), image.device)

    def gradient(name: str, dtype: torch.dtype) -> Tensor:
        if name == "logit_scale":
            return _scalar(of_scale, scale, image, dtype)
        of_image = name == "image"
        some = (image[rows], text) if of_image else (image, text[rows])
        images, texts = (x.to(dtype) for x in some)
        best, winner = (queries_of(images) @ texts.T).max(1)  # of images and texts
        logits = scale.to(dtype) * (best if of_image else best.T)  # [sample, N]
        lse = both[1 if of_image else 0].lse
        if dtype == torch.float64:
            lse = _sharpened(lse, logits, image, text, scale, of_image=of_image)
        wide = logits.to(_wider(dtype))
        weights = wide.softmax(1) + (wide - lse.to(wide.dtype)).exp()
        weights[torch.arange(len(rows), device=rows.device), rows] -= 2
        weights = (weights / 2).to(dtype)
        return score_gradients(weights if of_image else weights.T, winner, images, texts)[0 if of_image else 1]

    return _compared(rows, loss, of_scale, inputs, grads, gradient, cotangents)


def _sharpened(lse: Tensor, logits: Tensor, image: Tensor, text: Tensor, scale: Tensor, *, of_image: bool) -> Tensor:
    """Returns `lse` [M], computed again in float64 where it matters most to the sample's logits [rows, M].

    Args:
        of_image: the sample is of images, and `lse` of texts; else the other way round.
    """
    heaviest = (logits - lse).amax(0).topk(min(_SHARPENED, len(lse))).indices
    lse = lse.clone()
    for some in heaviest.split(128):
        images, texts = (image, text[some]) if of_image else (image[some], text)
        lse[some] = (scale.double() * best_scores(images.double(), texts.double())).logsumexp(0 if of_image else 1)
    return lse


# The sigmoid loss.


def sigmoid_expected(inputs: Inputs, grads: Sequence[str], cotangents: Sequence[Tensor]) -> list[Expected]:
    """Returns what is right for a call without ids. Pairs depend on each other only through the sums."""
    image, text, scale = _plain(inputs)
    bias, n = inputs["logit_bias"].detach(), len(image)
    positives = _of_pairs(image, text, scale) + bias
    # All pairs are summed as negatives. A positive with the logit x differs from a negative by
    # log(1 + exp(-x)) - log(1 + exp(x)) = -x in the loss, and by sigmoid(x) - 1 - sigmoid(x) = -1 in its derivative.
    loss, of_bias = -positives.sum(), torch.full_like(positives[0], -n)
    of_dots = -(positives - bias).sum()
    for _, _, logits in _blocks(image, text, scale):
        shifted = logits + bias
        loss += F.softplus(shifted).sum()
        slope = shifted.sigmoid_()
        of_bias += slope.sum()
        of_dots += slope.mul_(logits).sum()
    of_scale = of_dots / n / scale.double()
    rows = sample(n, image.device)

    def gradient(name: str, dtype: torch.dtype) -> Tensor:
        if name == "logit_bias":
            return _scalar(of_bias / n, bias, image, dtype)
        if name == "logit_scale":
            return _scalar(of_scale, scale, image, dtype)
        x, other = (image, text) if name == "image" else (text, image)
        logits = scale.to(dtype) * (x[rows].to(dtype) @ other.T.to(dtype)) + bias.to(dtype)
        slope = logits.sigmoid()
        slope[torch.arange(len(rows), device=rows.device), rows] -= 1
        return slope @ other.to(dtype)

    return _compared(rows, loss / n, of_scale, inputs, grads, gradient, cotangents)


# Both.


def _plain(inputs: Inputs, *, queries: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    several = inputs["image"].dim() == 3 and not queries
    if inputs.keys() - {"image", "text", "logit_scale", "logit_bias"} or several:
        raise NotImplementedError(f"only plain features are checked in parts, got {', '.join(inputs)}")
    image, text, scale = (inputs[name].detach() for name in ("image", "text", "logit_scale"))
    return image, text, scale


def _wider(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _scalar(x: Tensor, like: Tensor, image: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns a sum over all pairs in the wide dtype. The naive formula's is at best rounded to the features' dtype."""
    if dtype != torch.float64:
        x = x * (1 + torch.finfo(image.dtype).eps / 2)
    return x.to(_wider(dtype)).reshape(like.shape)


def _compared(
    rows: Tensor,
    loss: Tensor,
    of_scale: Tensor,
    inputs: Inputs,
    grads: Sequence[str],
    gradient: Gradient,
    cotangents: Sequence[Tensor],
) -> list[Expected]:
    """Returns what is right for a sample of rows, and for a sum over all rows.

    The sample's gradients are compared as mixtures of features, so that neither the mean nor the scale makes them small
    or large. Logits are the scale times products, so features times their gradients add up to the scale times its
    gradient.
    """
    features = {1 + place: inputs[name].detach() for place, name in enumerate(grads) if inputs[name].dim() >= 2}
    image, scale = inputs["image"].detach(), float(inputs["logit_scale"].detach())

    def of_sample(place: int, x: Tensor) -> Tensor:
        return x[rows] * (len(x) / scale) if place in features else x

    def of_all(place: int, x: Tensor) -> Tensor:
        return (x.double() * features[place].double()).sum() / scale if place in features else x

    def right(dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
        """Returns the results by the sample and by all rows."""
        sampled = [_scalar(loss, loss, image, dtype)]
        for name in grads:
            x = gradient(name, dtype)
            sampled.append(x * cotangents[0].to(x))
        if not grads:
            return sampled, sampled
        total = _scalar(of_scale * cotangents[0].double(), loss, image, dtype)
        return sampled, [total if place in features else x for place, x in enumerate(sampled)]

    naive, true = right(image.dtype), right(torch.float64)
    return [
        Expected(share, *both) for share, both in zip((of_sample, of_all), zip(naive, true, strict=True), strict=True)
    ]


# Ranks.


def rank_shards(inputs: Inputs) -> list[Shard]:
    """Returns one shard: some queries with the whole gallery."""
    gallery, rows = inputs["gallery"], sample(len(inputs["query"]), inputs["query"].device)
    return [lambda x: x if x is gallery else x[rows]]


INFO_NCE = Parts(elements, expected=info_nce_expected)
SIGMOID = Parts(elements, expected=sigmoid_expected)
RANKS = Parts(elements, shards=rank_shards)
