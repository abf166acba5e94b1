"""Image-text matching: does a text belong to an image? Negatives are those that the contrastive scores find hard."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from mmkernels.objectives.checks import check_generator, check_integers
from mmkernels.ops.common.dtypes import wide_dtype
from mmkernels.ops.contrastive.inputs import check_features, check_scalar
from mmkernels.ops.linear.inputs import Names, checked_head
from mmkernels.runtime.checks import check_floating, check_range

_STRIP_BYTES = 8 * 2**20
"""Of the scores that are held at once, in `matching_pairs`."""


class MatchingPairs(NamedTuple):
    """What `matching_pairs` returns: pairs ``[3 N]`` of an image and a text.

    The N pairs of the batch come first, then each image with a text that does not belong to it, then each text with
    an image that does not belong to it.

    Attributes:
        images, texts: int64, rows of the batch.
        labels: int64, 1: they belong together; 0: they don't; -100: there was no negative, the loss ignores the pair.
    """

    images: Tensor
    texts: Tensor
    labels: Tensor


@torch.no_grad()
def matching_pairs(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    *,
    ids: Tensor | None = None,
    generator: Generator | None = None,
) -> MatchingPairs:
    """Draws a hard negative text for each image, and a hard negative image for each text, from contrastive scores.

    Image i gets text j with probability ``softmax_j(logit_scale * image_i . text_j)`` over the texts that do not belong
    to it: not its own, and none of the same id. Texts get images alike. The more alike a wrong pair, the likelier it
    is.

    Probabilities are never computed: the largest of ``score + Gumbel noise`` is such a draw. One product of the
    features serves both directions; it is made in strips of images, so that at most 8 MiB of float32 scores and as much
    noise exist at once (those of one image where that is more), never ``[N, N]`` of a large batch.

    Args:
        image: contrastive features ``[N, d]``; or ``[N, Q, d]``: the score of a pair is the largest of its image's Q
            queries (BLIP-2), as in `mmkernels.info_nce`.
        text: ``[N, d]``, image's dtype; text i belongs to image i.
        logit_scale: the multiplier itself, already exponentiated: a number or a tensor of one element.
        ids: integers ``[N]``: what each pair is about. Pairs of one id are no negatives of each other (several captions
            of one image).
        generator: on the CPU or on the features' device; None: PyTorch's global generator of that device.

    Returns:
        `MatchingPairs`, with no gradient. A row without a negative (N = 1, or all pairs have its id), or with no score
        above -inf, gets label -100, beside an index that may be used. A pair whose score is NaN is never drawn.

    Raises:
        TypeError, ValueError: as `mmkernels.info_nce`; N differs, or `ids` are not integers ``[N]``.

    Source: Li et al., "Align before Fuse" (ALBEF), 2021, section 3.2; so in BLIP (2022) and, with queries, in BLIP-2
    (2023), section 3.2. ALBEF adds 1e-4 to each probability, which is left out here.

    Example:
        >>> import torch
        >>> from mmkernels.objectives import matching_pairs
        >>> image, text = (torch.nn.functional.normalize(torch.randn(4, 64), dim=1) for _ in range(2))
        >>> pairs = matching_pairs(image, text, 14.3, generator=torch.Generator().manual_seed(0))
        >>> pairs.labels
        tensor([1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0])
        >>> bool((pairs.images == pairs.texts)[4:].any())
        False
    """
    check_features(image, text)
    check_generator(generator)
    count = image.shape[0]
    if text.shape[0] != count:
        must = "image must be [N, d] or [N, Q, d] and text [N, d]"
        raise ValueError(f"{must}, got shapes {tuple(image.shape)} and {tuple(text.shape)}")
    if ids is not None:
        check_integers("ids", ids)
        if tuple(ids.shape) != (count,):
            raise ValueError(f"ids must be [{count}], one for each pair, got shape {tuple(ids.shape)}")
    scale = check_scalar("logit_scale", logit_scale, image)
    own = torch.arange(count, device=image.device)
    texts, images = _draw(image, text, scale, own if ids is None else ids, generator)
    of_images, of_texts = (torch.where(drawn < 0, -100, 0) for drawn in (texts, images))
    return MatchingPairs(
        torch.cat([own, own, images.clamp(0)]),
        torch.cat([own, texts.clamp(0), own]),
        torch.cat([torch.ones_like(own), of_images, of_texts]),
    )


def _draw(
    image: Tensor, text: Tensor, logit_scale: Tensor, ids: Tensor, generator: Generator | None
) -> tuple[Tensor, Tensor]:
    """Returns the text that each image gets, and the image that each text gets, int64 ``[N]``; -1: none."""
    count, queries = image.shape[0], image[0].numel() // image.shape[-1]
    rows = max(1, _STRIP_BYTES // (4 * count * queries))
    texts = []
    best = torch.full((count,), -torch.inf, dtype=torch.promote_types(image.dtype, torch.float32), device=image.device)
    images = torch.full((count,), -1, device=image.device)
    for first in range(0, count, rows):
        scores = image[first : first + rows] @ text.T  # [rows, N] or [rows, Q, N]
        scores = (scores if scores.dim() == 2 else scores.amax(1)).to(best.dtype) * logit_scale.to(best.dtype)
        hidden = (ids[first : first + rows, None] == ids) | scores.isnan()
        scores.masked_fill_(hidden, -torch.inf)
        top, index = _gumbel(scores, generator).add_(scores).max(1)
        texts.append(torch.where(top > -torch.inf, index, -1))
        top, index = _gumbel(scores, generator).add_(scores).max(0)
        images = torch.where(top > best, index + first, images)
        best = torch.maximum(best, top)
    return torch.cat(texts), images


def _gumbel(like: Tensor, generator: Generator | None) -> Tensor:
    device = like.device if generator is None else generator.device
    noise = torch.empty(like.shape, dtype=like.dtype, device=device).exponential_(generator=generator)
    # A float32 draw is exactly 0 once in 2^24 times, and would win against any score.
    return noise.clamp_(min=2.0**-25).log_().neg_().to(like.device)


def image_text_matching_loss(hidden: Tensor, weight: Tensor, labels: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """Two-class cross-entropy of "belongs together" for the pairs of `matching_pairs`.

    ``loss = -1/P sum log softmax(hidden weight' + bias)[label]`` over the P pairs that have a label.

    Args:
        hidden: ``[P, d]`` of the encoder that sees image and text of a pair, float16, bfloat16, float32 or float64.
        weight: of the head ``[2, d]``, hidden's dtype; row 1 is "belongs together".
        labels: int64 ``[P]``: 1, 0, or -100: ignored.
        bias: of the head ``[2]``, hidden's dtype or float32, or None.

    Returns:
        a float32 scalar (float64 for float64 inputs); NaN if all pairs are ignored, as in ``F.cross_entropy``.
        Differentiable by hidden, weight and bias. The logits, ``[P, 2]``, are built.

    Raises:
        TypeError: a wrong dtype. ValueError: a wrong shape or label.

    Source: Li et al., "Align before Fuse" (ALBEF), 2021, equation 4.

    Example:
        >>> import torch
        >>> from mmkernels.objectives import image_text_matching_loss, matching_pairs
        >>> image, text = torch.randn(4, 64), torch.randn(4, 64)
        >>> pairs = matching_pairs(image, text, 1.0)
        >>> hidden = image[pairs.images] * text[pairs.texts]  # where a model has its multimodal encoder
        >>> image_text_matching_loss(hidden, torch.randn(2, 64), pairs.labels).shape
        torch.Size([])
    """
    check_floating("hidden", hidden)
    check_floating("weight", weight)
    check_integers("labels", labels)
    check_range("labels", labels.masked_fill(labels == -100, 0), 0, 1, note=" (or -100, ignored)")
    if hidden.dim() != 2:
        raise ValueError(f"hidden must be [P, d], got shape {tuple(hidden.shape)}")
    if tuple(weight.shape) != (2, hidden.shape[1]):
        raise ValueError(f"weight must be [2, {hidden.shape[1]}], got shape {tuple(weight.shape)}")
    if tuple(labels.shape) != (hidden.shape[0],):
        raise ValueError(f"labels must be [{hidden.shape[0]}], got shape {tuple(labels.shape)}")
    head = checked_head(hidden, weight, bias, Names())
    logits = F.linear(head.hidden, head.weight).to(wide_dtype(head.hidden))
    return F.cross_entropy(logits if head.bias is None else logits + head.bias, labels.long())
