"""Recall of retrieval between images and texts, with several texts an image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mmkernels.evaluation.checks import listed, whole
from mmkernels.ops.contrastive.retrieval_ranks import retrieval_ranks
from mmkernels.runtime.checks import check_floating, check_range, check_tensor

_ROWS = 4096
"""Pairs whose scores are computed at once, in float64."""
_STRIP_BYTES = 8 * 2**20
"""Of the scores of several queries that are held at once."""


class RetrievalRecall(NamedTuple):
    """Recall in both directions.

    Attributes:
        image_to_text: k -> the share of images with one of their texts among the first k.
        text_to_image: k -> the share of texts with their image among the first k.
        image_ranks: int64, how many texts stand before the first of an image's own; of images that have a text.
        text_ranks: int64 ``[M]``, how many images stand before a text's own.
    """

    image_to_text: dict[int, float]
    text_to_image: dict[int, float]
    image_ranks: Tensor
    text_ranks: Tensor


def retrieval_recall(
    image: Tensor,
    text: Tensor,
    text_image: Tensor | None = None,
    *,
    ks: Sequence[int] = (1, 5, 10),
    backend: str | None = None,
) -> RetrievalRecall:
    """Returns the recall of images by texts and of texts by images, in memory linear in the features.

    Args:
        image: ``[N, d]``, float16, bfloat16, float32 or float64; normalised, if cosine similarity is meant. Or
            ``[N, Q, d]``: the score of a pair is the largest of its image's Q queries, as in BLIP-2. These scores are
            computed by PyTorch, twice, in strips of images of at most 8 MiB (one image's where that is more).
        text: ``[M, d]``, image's dtype and device.
        text_image: int64 ``[M]``, the row of the image that each text describes; an image may have any number of texts.
            None: row by row, N = M. An image without a text is searched through, but asks nothing.
        ks: the ranks at which recall is taken; from the size of the gallery on it is 1, where scores are numbers.
        backend: of `mmkernels.retrieval_ranks`, which is called for features ``[N, d]``.

    Where the score of the right answer is NaN it is never found: its rank is the size of the gallery.

    Raises:
        TypeError: a wrong dtype or type. ValueError: a wrong shape, no features, a row that does not exist (where that
            can be seen without waiting for a device), a bad k, or a backend for several queries.

    Source: recall at k as in Karpathy & Fei-Fei, "Deep Visual-Semantic Alignments for Generating Image Descriptions",
    2015, section 4.2: of several right answers the first counts.

    Example:
        >>> import torch
        >>> from mmkernels.evaluation import retrieval_recall
        >>> image = torch.eye(3)
        >>> text = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0.1, 0.9, 0], [0, 0.5, 0.4]])
        >>> found = retrieval_recall(image, text, torch.tensor([0, 0, 1, 2]), ks=(1, 2))
        >>> found.image_to_text, found.text_to_image
        ({1: 0.6666666666666666, 2: 1.0}, {1: 0.5, 2: 1.0})
    """
    _check_features(image, text)
    wanted = [whole("ks", k, 1) for k in listed("ks", ks, "integers")]
    owner = _owners(image, text, text_image)
    several = image.dim() == 3
    if several and backend is not None:
        raise ValueError(f"backend must be None for several queries an image, got {backend!r}")
    with torch.no_grad():
        scores = (_own_scores_of_queries if several else _own_scores)(image, text, owner)
        missing = scores.isnan()
        best, asks = _best_texts(scores.nan_to_num(nan=-torch.inf), owner, image.shape[0])
        if several:
            image_ranks, text_ranks = _ranks_of_queries(image, text, owner, best, scores)
        else:
            text_ranks = retrieval_ranks(text, image, owner, backend=backend)
            image_ranks = retrieval_ranks(image, text, best, backend=backend)
        text_ranks = text_ranks.masked_fill(missing, image.shape[0])
        image_ranks = image_ranks.masked_fill(missing[best], text.shape[0])[asks]
    image_to_text, text_to_image = (
        _recall(image_ranks, wanted, text.shape[0]),
        _recall(text_ranks, wanted, image.shape[0]),
    )
    return RetrievalRecall(image_to_text, text_to_image, image_ranks, text_ranks)


def _check_features(image: Tensor, text: Tensor) -> None:
    for name, x, dims, shape in (("image", image, (2, 3), "[N, d] or [N, Q, d]"), ("text", text, (2,), "[M, d]")):
        check_floating(name, x)
        if x.dim() not in dims or 0 in x.shape:
            raise ValueError(f"{name} must be {shape} with at least one row and channel, got shape {tuple(x.shape)}")
    if text.shape[1] != image.shape[-1] or text.dtype != image.dtype or text.device != image.device:
        must, got = (f"[M, {x.shape[-1]}] {x.dtype} on {x.device}" for x in (image, text))
        raise ValueError(f"text must be as image {must}, got {got}")


def _owners(image: Tensor, text: Tensor, text_image: Tensor | None) -> Tensor:
    """Returns the row of each text's image, int64 [M], on the device of the features."""
    if text_image is None:
        if text.shape[0] != image.shape[0]:
            raise ValueError(f"text must be {image.shape[0]} rows as image without text_image, got {text.shape[0]}")
        return torch.arange(text.shape[0], device=image.device)
    check_tensor("text_image", text_image)
    if text_image.dtype != torch.int64:
        raise TypeError(f"text_image must be int64, got {text_image.dtype}")
    if tuple(text_image.shape) != (text.shape[0],):
        raise ValueError(f"text_image must be [{text.shape[0]}] as text, got shape {tuple(text_image.shape)}")
    check_range("text_image", text_image, 0, image.shape[0] - 1)
    return text_image.to(image.device)


def _own_scores(image: Tensor, text: Tensor, owner: Tensor) -> Tensor:
    """Returns the score of each text and its image, float64 [M]."""
    parts = [
        torch.linalg.vecdot(image[rows].double(), own.double())
        for rows, own in zip(owner.split(_ROWS), text.split(_ROWS))
    ]
    return torch.cat(parts)


def _strips(image: Tensor, text: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields the numbers of some images ``[n, 1]``, and the scores ``[n, M]`` of their best queries."""
    wide = torch.promote_types(image.dtype, torch.float32)
    text = text.to(wide).T
    rows = max(1, _STRIP_BYTES // (wide.itemsize * image.shape[1] * text.shape[1]))
    numbers = torch.arange(image.shape[0], device=image.device)[:, None]
    for some, number in zip(image.split(rows), numbers.split(rows), strict=True):
        yield number, (some.to(wide) @ text).amax(1)


def _own_scores_of_queries(image: Tensor, text: Tensor, owner: Tensor) -> Tensor:
    """Returns the score of each text and its image, [M]: the same numbers as in `_ranks_of_queries`."""
    found = torch.full(owner.shape, torch.nan, dtype=torch.promote_types(image.dtype, torch.float32)).to(image.device)
    for number, scores in _strips(image, text):
        row = owner - number[0]
        own = scores.gather(0, row.clamp(0, scores.shape[0] - 1)[None])[0]
        found = torch.where((row >= 0) & (row < scores.shape[0]), own, found)
    return found


def _ranks_of_queries(image: Tensor, text: Tensor, owner: Tensor, best: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the ranks of each image's text `best` [N] and of each text's image, of equal scores in their order."""
    of_texts, of_images = torch.zeros_like(owner), []
    places = torch.arange(text.shape[0], device=text.device)
    for number, scores in _strips(image, text):
        of_texts += ((scores > own) | ((scores == own) & (number < owner))).sum(0)
        chosen = best[number]  # [n, 1]
        threshold = own[chosen]
        of_images.append(((scores > threshold) | ((scores == threshold) & (places < chosen))).sum(1))
    return torch.cat(of_images), of_texts


def _best_texts(scores: Tensor, owner: Tensor, images: int) -> tuple[Tensor, Tensor]:
    """Returns of each image its text of the highest score, the first of equal ones, and whether it has one: [N] each.

    No other text of the image stands before it, so its rank is the rank of the first right answer.
    """
    texts = scores.shape[0]
    highest = scores.new_full((images,), -torch.inf).scatter_reduce(0, owner, scores, "amax")
    place = torch.arange(texts, device=scores.device)
    place = torch.where(scores == highest[owner], place, texts)
    first = owner.new_full((images,), texts).scatter_reduce(0, owner, place, "amin")
    return first.clamp(max=texts - 1), first < texts


def _recall(ranks: Tensor, ks: list[int], gallery: int) -> dict[int, float]:
    found = torch.stack([(ranks < min(k, gallery)).double().mean() for k in ks])
    return dict(zip(ks, found.tolist()))
