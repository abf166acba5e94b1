"""Methods of visual-token pruning from papers, each a few lines over the ops.

None has weights or waits for a device. All return the `Selection` of `mmkernels.select_tokens`. `fastv` takes the
hidden states of a language model, `evs` takes tokens and a grid; the others take tokens ``x`` and ``lengths`` as
`select_tokens` does, packed, or batched with one image or more. To change a method, copy its lines.
"""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor

from mmkernels.masks import SpanMask
from mmkernels.ops.attention.attention_received import attention_received
from mmkernels.ops.common.dtypes import wide_dtype
from mmkernels.ops.tokens.frame_difference import frame_difference
from mmkernels.ops.tokens.inputs import (
    Grid,
    Images,
    Lengths,
    check_grid,
    check_lengths,
    check_rows,
    check_sizes,
    lengths_as,
    unpack,
)
from mmkernels.ops.tokens.keep import Keep, check_keep, check_kept, share_of
from mmkernels.ops.tokens.ranking import image_of, on_device, starts_of
from mmkernels.ops.tokens.select_diverse import select_diverse
from mmkernels.ops.tokens.select_tokens import Selection, select_tokens
from mmkernels.ops.tokens.token_similarity import token_similarity
from mmkernels.runtime.arguments import Sizes
from mmkernels.runtime.checks import check_floating, check_tensor

__all__ = ["cdpruner", "dart", "divprune", "evs", "fastv", "visionzip"]


def fastv(
    hidden: Tensor,
    query: Tensor,
    key: Tensor,
    visual: slice,
    keep: int | float,
    mask: SpanMask | Tensor | None = None,
    *,
    scale: float | None = None,
) -> Selection:
    """Keeps, inside a language model, the visual tokens to which the queries of one layer attend most; and all text.

    Call it between two layers: with the hidden states after layer K, and the query and key of that layer's attention.
    The later layers take the tokens that are kept, each with the rotary angles of its place in the prompt,
    ``positions % L``. The guide "Fewer visual tokens" has such a model.

    Args:
        hidden: ``[B, L, C]``, a prompt with its visual tokens at the places `visual`.
        query: ``[B, Hq, Lq, D]``, rotated: the queries whose attention counts, ``query[:, :, -1:]`` for the last token
            alone, as in the paper's code, or all of them.
        key: ``[B, Hkv, L, D]``, rotated.
        visual: ``slice(first, last)``.
        keep: how many visual tokens of each prompt, from 0 on, or a share of them as a float, rounded up.
        mask: which keys these queries see, as in `mmkernels.attention_received`; None: all.
        scale: of the scores; None: ``1 / sqrt(D)``.

    Returns:
        A `Selection` of all text and the visual tokens that are kept: x ``[B, L', C]``, lengths L', and positions
        ``[B, L']``, int64, rows of ``hidden.flatten(0, 1)``. Differentiable with respect to hidden.

    Raises:
        TypeError: visual is not a slice, or a tensor has a wrong dtype. ValueError: a wrong shape, or number to keep.
            Each names the argument, what it must be and what it got.

    Source: Chen et al., "An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration for Large
    Vision-Language Models" (FastV), 2024.

    Example:
        >>> import torch
        >>> from mmkernels import pruning
        >>> hidden, query, key = torch.randn(1, 40, 32), torch.randn(1, 4, 40, 8), torch.randn(1, 2, 40, 8)
        >>> kept = pruning.fastv(hidden, query[:, :, -1:], key, slice(4, 36), 0.25)  # 8 of 32, and 8 of text
        >>> kept.x.shape, kept.lengths
        (torch.Size([1, 16, 32]), 16)
    """
    if not isinstance(visual, slice):
        raise TypeError(f"visual must be a slice, the places of the visual tokens, got {type(visual).__name__}")
    check_floating("hidden", hidden)
    check_tensor("key", key)
    if hidden.dim() != 3:
        raise ValueError(f"hidden must be [B, L, C], got shape {tuple(hidden.shape)}")
    length = hidden.shape[1]
    if visual.step not in (None, 1) or (visual.stop is not None and visual.stop > length):
        raise ValueError(f"visual must be slice(first, last) within hidden's {length} tokens, got {visual}")
    first, last = _place(visual.start, 0, length), _place(visual.stop, length, length)
    tokens = max(0, last - first)
    count = check_keep(keep, (tokens,), least=0)[0]
    if key.dim() != 4 or key.shape[2] != length:
        raise ValueError(f"key must be [B, H, {length}, D] for hidden's tokens, got shape {tuple(key.shape)}")
    scores = attention_received(query, key, mask, scale=scale).mean(1)  # [B, L]
    if scores.shape[0] != hidden.shape[0]:
        raise ValueError(f"query must be of hidden's {hidden.shape[0]} prompts, got shape {tuple(query.shape)}")
    scores[:, :first] = torch.inf
    scores[:, last:] = torch.inf
    return select_tokens(hidden, length, length - tokens + count, scores)


def visionzip(
    x: Tensor, lengths: Lengths, dominant: Keep, contextual: Keep, scores: Tensor, metric: Tensor | None = None
) -> Selection:
    """Keeps the tokens with the best scores, and of the rest evenly spread ones into which the others are merged.

    Args:
        x: ``[tokens, C]`` or ``[images, tokens, C]``, without class tokens.
        lengths: the tokens of each image.
        dominant: how many to keep of each image by their scores, as `select_tokens` takes `keep`.
        contextual: how many more, each the mean of the tokens most similar to it added to it; a share is of all tokens.
        scores: ``[tokens]`` or ``[images, tokens]``: what the class token gives to each,
            ``attention_received(query[:, :, :1], key)[:, :, 1:].mean(1)`` of an encoder's layer; without a class token
            what all tokens give.
        metric: ``[tokens, D]`` or ``[images, tokens, D]``: what similarities are of, the keys of that layer, averaged
            over heads; None: x itself.

    Returns:
        A `Selection`: of each image first its dominant tokens, in their order, then its contextual ones. Differentiable
        with respect to x.

    Raises:
        TypeError, ValueError: as in `select_tokens`; or there are fewer tokens than `dominant` and `contextual`. Each
            names the argument, what it must be and what it got.

    Source: Yang et al., "VisionZip: Longer is Better but Not Necessary in Vision Language Models", 2024.

    Example:
        >>> import torch
        >>> from mmkernels import pruning
        >>> x, keys, scores = torch.randn(2, 576, 64), torch.randn(2, 576, 16), torch.rand(2, 576)
        >>> pruning.visionzip(x, 576, 54, 10, scores, keys).x.shape
        torch.Size([2, 64, 64])
    """
    images = _check_images(x, lengths, metric)
    best = select_tokens(x, lengths, dominant, scores)
    chosen = best.positions.flatten()
    kept, each = check_kept(dominant, images)
    more, others_each = check_kept(contextual, images, least=0)
    left = tuple(n - count for n, count in zip(images.sizes, kept, strict=True))
    for image, (n, count) in enumerate(zip(left, more, strict=True)):
        if not min(n, 1) <= count <= n:
            raise ValueError(
                f"contextual must be from {min(n, 1)} to {n} for image {image}, of which {n} tokens are left by "
                f"dominant, got {count}"
            )
    # What is left is what has the best of these scores: of equal scores the first tokens are kept.
    others = torch.zeros(len(images.x), device=x.device).index_fill(0, chosen, -1.0)
    keys = images.x if metric is None else check_lengths(metric, lengths).x
    rest = select_tokens(images.x, images.sizes, left, others)
    targets = _evenly(left, more, x.device)
    merged = select_tokens(
        rest.x, left, more, targets, merge_rest="visionzip", metric=keys.index_select(0, rest.positions)
    )
    places = rest.positions.index_select(0, merged.positions)
    tokens = _interleaved(best.x.flatten(0, -2), kept, merged.x, more)
    positions = _interleaved(chosen, kept, places, more)
    total = tuple(map(sum, zip(kept, more, strict=True)))
    each += others_each
    return Selection(unpack(tokens, x, each), lengths_as(lengths, total, each), unpack(positions, x, each))


def dart(x: Tensor, lengths: Lengths, keep: Keep, pivots: int = 8, *, metric: Tensor | None = None) -> Selection:
    """Keeps pivots, the tokens of the largest norm, and the tokens that duplicate a pivot least.

    A token is kept if its smallest cosine similarity to a pivot is below a threshold, the same for all pivots, which is
    where `keep` tokens remain. (The paper's code takes the same number of tokens for each pivot in turn.)

    Args:
        x: ``[tokens, C]`` or ``[images, tokens, C]``.
        lengths: the tokens of each image.
        keep: how many of each image, pivots included, as `select_tokens` takes it.
        pivots: how many of each image, at most `keep`.
        metric: ``[tokens, D]`` or ``[images, tokens, D]``: whose norms (the sums of magnitudes) choose pivots, such as
            the keys of a layer; None: x itself.

    Returns:
        A `Selection`. Differentiable with respect to x.

    Raises:
        TypeError, ValueError: as in `select_tokens`; or pivots are not from 1 to each image's `keep`. Each names the
            argument, what it must be and what it got.

    Source: Wen et al., "Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters More",
    2025.

    Example:
        >>> import torch
        >>> from mmkernels import pruning
        >>> pruning.dart(torch.randn(576, 64), [576], 64).lengths
        (64,)
    """
    images = _check_images(x, lengths, metric)
    kept, _ = check_kept(keep, images)
    if isinstance(pivots, bool) or not isinstance(pivots, int):
        raise TypeError(f"pivots must be an integer, got {type(pivots).__name__}")
    fewest = min([count for count in kept if count] or [pivots])  # of images that have tokens
    if not 1 <= pivots <= fewest:
        raise ValueError(f"pivots must be from 1 to keep = {fewest}, got {pivots}")
    counts = tuple(min(n, pivots) for n in images.sizes)
    rows = images.x if metric is None else check_lengths(metric, lengths).x
    norms = rows.norm(p=1, dim=1, dtype=wide_dtype(rows))  # float16 has no number for the norm of a large token
    chosen = select_tokens(images.x, images.sizes, counts, norms)
    scores = -token_similarity(images.x, images.sizes, chosen.x, counts, reduce="min")
    scores = scores.index_fill(0, chosen.positions, torch.inf)
    return select_tokens(x, lengths, keep, unpack(scores, x))


def cdpruner(
    x: Tensor,
    lengths: Lengths,
    keep: Keep,
    image_embeds: Tensor,
    text_embeds: Tensor,
    text_lengths: Lengths,
    *,
    metric: Tensor | None = None,
) -> Selection:
    """Keeps tokens that differ from each other, the more so the more relevant they are to the text.

    Args:
        x: ``[tokens, C]`` or ``[images, tokens, C]``: what is kept.
        lengths: the tokens of each image.
        keep: how many of each image, as `select_diverse` takes it.
        image_embeds: ``[tokens, D]`` or ``[images, tokens, D]``: the tokens in the space that they share with text.
        text_embeds: ``[texts, D]`` or ``[images, texts, D]``: the texts of each image.
        text_lengths: how many texts each image has, one or more.
        metric: ``[tokens, E]`` or ``[images, tokens, E]``: what tokens are compared by, such as the encoder's features;
            None: x.

    Returns:
        A `Selection`. The relevance of a token is its mean cosine similarity to its texts, scaled in each image to 0
        for the least relevant token and 1 for the most. A token whose relevance is NaN comes after all others.
        Differentiable with respect to x.

    Raises:
        TypeError, ValueError: as in `select_diverse` and `token_similarity`. Each names the argument, what it must be
            and what it got.

    Source: Zhang et al., "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs",
    2025.

    Example:
        >>> import torch
        >>> from mmkernels import pruning
        >>> x, words = torch.randn(576, 64), torch.randn(7, 64)
        >>> pruning.cdpruner(x, [576], 64, x, words, [7]).lengths
        (64,)
    """
    images = _check_images(x, lengths, metric)
    check_rows("image_embeds", image_embeds, x)
    counts = check_sizes(text_embeds, text_lengths, "text_embeds", "text_lengths")
    if len(counts) != len(images.sizes) or any(n and not count for n, count in zip(images.sizes, counts, strict=True)):
        raise ValueError(f"text_lengths must be 1 or more for each of {len(images.sizes)} images, got {counts}")
    metric = x if metric is None else metric
    relevance = token_similarity(image_embeds, lengths, text_embeds, text_lengths, reduce="mean")
    quality = unpack(_from_0_to_1(relevance.flatten(), images), x)
    chosen = select_diverse(metric, lengths, keep, quality=quality)
    return _in_order(x, lengths, images, keep, chosen)


def divprune(x: Tensor, lengths: Lengths, keep: Keep, *, metric: Tensor | None = None) -> Selection:
    """Keeps tokens that are far from each other: one by one the token that is farthest from the nearest kept one.

    Args:
        x: ``[tokens, C]`` or ``[images, tokens, C]``: what is kept.
        lengths: the tokens of each image.
        keep: how many of each image, as `select_diverse` takes it.
        metric: ``[tokens, D]`` or ``[images, tokens, D]``: what distances, 1 - cos, are of; None: x.

    Returns:
        A `Selection`. Differentiable with respect to x.

    Raises:
        TypeError, ValueError: as in `select_diverse`. Each names the argument, what it must be and what it got.

    Source: Alvar et al., "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models", 2025,
    algorithm 1.

    Example:
        >>> import torch
        >>> from mmkernels import pruning
        >>> pruning.divprune(torch.randn(2, 576, 64), 576, 0.1).x.shape
        torch.Size([2, 58, 64])
    """
    images = _check_images(x, lengths, metric)
    metric = x if metric is None else metric
    chosen = select_diverse(metric, lengths, keep, method="distance")
    return _in_order(x, lengths, images, keep, chosen)


def evs(x: Tensor, grid: Grid, keep: float) -> Selection:
    """Keeps the tokens of videos that differ most from the token at the same place in the frame before.

    Args:
        x: ``[tokens, C]``, videos one after the other; or ``[videos, tokens, C]``, all of one size.
        grid: (t, h, w) of each video, as `merge_patches` takes it.
        keep: a share of each video's tokens, a float above 0 and at most 1, rounded up. The first frame is always kept
            whole, also where it has more tokens than that.

    Returns:
        A `Selection`. Differentiable with respect to x.

    Raises:
        TypeError, ValueError: as in `frame_difference`; or keep is not a share. Each names the argument, what it must
            be and what it got.

    Source: Bagrov et al., "Efficient Video Sampling: Pruning Temporally Redundant Tokens for Faster VLM Inference",
    2025.

    Example:
        >>> import torch
        >>> from mmkernels import pruning
        >>> pruning.evs(torch.randn(8 * 4 * 4, 32), [(8, 4, 4)], 0.25).lengths  # 8 frames of 16 tokens
        (32,)
    """
    sizes = check_grid(x, grid)
    if not isinstance(keep, float) or not 0.0 < keep <= 1.0:
        raise ValueError(f"keep must be a share of the tokens, a float above 0 and at most 1, got {keep!r}")
    videos = list(zip(sizes[0::3], sizes[1::3], sizes[2::3], strict=True))
    lengths = tuple(t * h * w for t, h, w in videos)
    counts = tuple(max(h * w, n) for (_, h, w), n in zip(videos, share_of(keep, lengths), strict=True))
    scores = frame_difference(x, grid)
    if x.dim() == 3:
        return select_tokens(x, lengths[0], counts[0], scores)
    return select_tokens(x, lengths, counts, scores)


def _check_images(x: Tensor, lengths: Lengths, metric: Tensor | None) -> Images:
    """Returns the tokens packed; checks a metric too."""
    images = check_lengths(x, lengths)
    if metric is not None:
        check_rows("metric", metric, x)
    return images


def _place(bound: int | None, default: int, length: int) -> int:
    """Returns where a bound of a slice lies. ``slice.indices`` would make a constant of a graph's symbolic length."""
    if bound is None:
        return default
    return min(bound, length) if bound >= 0 else max(0, bound + length)


def _evenly(left: Sizes, more: Sizes, device: torch.device) -> Tensor:
    """Returns scores by which evenly spread tokens are the best: every (n // count)-th of n tokens."""
    steps = tuple(n // max(1, count) for n, count in zip(left, more, strict=True))
    owner = image_of(more, device)
    number = torch.arange(sum(more), device=device) - on_device(starts_of(more), device)[owner]
    places = on_device(starts_of(left), device)[owner] + number * on_device(steps, device)[owner]
    return torch.zeros(sum(left), device=device).index_fill(0, places, 1.0)


def _interleaved(first: Tensor, counts: Sizes, second: Tensor, others: Sizes) -> Tensor:
    """Returns of each image the rows of `first`, then those of `second`."""
    pairs = zip(first.split(list(counts)), second.split(list(others)), strict=True)
    return torch.cat([first[:0], *chain.from_iterable(pairs)])  # of no images too


def _from_0_to_1(scores: Tensor, images: Images) -> Tensor:
    """Returns scores, moved and scaled in each image so that the least is 0 and the largest 1; all 1 where equal.

    NaN stays NaN, and counts neither as the least nor as the largest.
    """
    owner = image_of(images.sizes, scores.device)
    least, most = (
        scores.new_full((len(images.sizes),), none).scatter_reduce(0, owner, scores.nan_to_num(none), name)[owner]
        for name, none in (("amin", torch.inf), ("amax", -torch.inf))
    )
    scaled = torch.where(most > least, (scores - least) / (most - least), 1.0)
    return scaled.masked_fill(scores.isnan(), torch.nan)


def _in_order(x: Tensor, lengths: Lengths, images: Images, keep: Keep, chosen: Tensor) -> Selection:
    """Returns the tokens that `select_diverse` chose, in the order in which they were."""
    kept, each = check_kept(keep, images, least=0)
    if images.batched:
        chosen = chosen.sort(1).values + torch.arange(x.shape[0], device=x.device)[:, None] * x.shape[1]
        tokens = images.x.index_select(0, chosen.flatten()).unflatten(0, (x.shape[0], each))
        return Selection(tokens, lengths_as(lengths, kept, each), chosen)
    chosen = chosen.sort().values
    return Selection(x.index_select(0, chosen), lengths_as(lengths, kept), chosen)
