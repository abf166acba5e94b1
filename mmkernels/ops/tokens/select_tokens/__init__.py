"""The visual tokens with the best scores, and the rest merged into them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mmkernels.ops.common.dtypes import wide_dtype
from mmkernels.ops.tokens.inputs import Lengths, check_lengths, check_rows, check_values, lengths_as, unpack
from mmkernels.ops.tokens.keep import Keep, check_keep, check_kept
from mmkernels.ops.tokens.select_tokens import chunked
from mmkernels.ops.tokens.select_tokens.spec import Arguments, Results, formula, reference, reference_backward
from mmkernels.runtime.backends import cpu_kernel, triton_kernel
from mmkernels.runtime.dispatch import Backend, define, resolve
from mmkernels.runtime.gradient import Gradient

__all__ = ["Selection", "select_tokens"]

_OVER = ("image", "batch")
_MERGES = ("mean", "visionzip", "prumerge")


class Selection(NamedTuple):
    """What `select_tokens` returns.

    Example:
        >>> import torch, mmkernels
        >>> x, lengths, positions = mmkernels.select_tokens(torch.randn(8, 4), [5, 3], (2, 1), torch.arange(8.0))
        >>> lengths, positions
        ((2, 1), tensor([3, 4, 7]))
    """

    x: Tensor
    """The tokens that were kept, in the order in which they were: ``[kept, C]`` or ``[images, keep, C]``."""
    lengths: Lengths
    """How many there are of each image: in the form of the lengths that were given; with a budget for the batch int64
    ``[images]`` on x's device."""
    positions: Tensor
    """Which tokens they were: int64 ``[kept]`` or ``[images, keep]``, rows of x (of ``x.flatten(0, 1)``)."""


def select_tokens(
    x: Tensor,
    lengths: Lengths,
    keep: Keep,
    scores: Tensor,
    *,
    over: str = "image",
    merge_rest: bool | str = False,
    metric: Tensor | None = None,
    backend: str | None = None,
) -> Selection:
    """Keeps the visual tokens with the best scores, in their order.

    How many are kept is known without looking at the scores, so nothing waits for a device. Of equal scores the first
    token is kept; NaN is the worst score, after -inf.

    Args:
        x: ``[tokens, C]``, the images' tokens one after the other, or ``[images, tokens, C]``; float16, bfloat16,
            float32 or float64.
        lengths: the tokens of each image, which may have none: integers ``[images]``, or one number for
            ``[images, tokens, C]``. A tensor on a GPU is read back, which waits: pass a list.
        keep: how many tokens of each image: one number for all, or one for each image, from 1 on (0 of an image without
            tokens); or a share of each image's tokens, a float above 0 and at most 1, rounded up. One number or a share
            for ``[images, tokens, C]``.
        scores: ``[tokens]`` or ``[images, tokens]`` of any of these dtypes, on x's device: such as what
            `attention_received` returns, summed over heads.
        over: "image"; or "batch": `keep` is one number, or a share, of the tokens of all images together, and the best
            of all are kept. An image may then keep none.
        merge_rest: False: the other tokens are left out. Else each is merged into that kept token of its image with
            which it has the largest cosine similarity, of equal ones the first; a similarity of NaN is the least. A
            kept token ``x_i`` and the tokens ``x_j`` that are merged into it make, with "mean" (or True), the mean of
            all of them; with "visionzip" ``x_i`` plus the mean of all ``x_j``, as VisionZip makes contextual tokens;
            with "prumerge" ``x_i + sum_j scores_j x_j``, as PruMerge supplements the tokens that it keeps (there
            ``x_j`` are the 32 most similar tokens of each ``x_i``; scores, finite, are the attention of the class
            token). Tokens of an image that keeps none are left out.
        metric: ``[tokens, D]`` or ``[images, tokens, D]`` of any of these dtypes, on x's device: what similarities are
            of, such as the keys of an attention layer; None: x itself.
        backend: None (``use_backend``'s choice, else the first that can), "triton" (GPUs, untested on one), "cpu"
            (float32, bfloat16 and float16), "chunked" (any device, float64 too) or "reference". Similarities are
            summed in float32 (float64 for a float64 x), in tiles: only "reference" stores them; on "triton" products of
            two rows must be finite.

    Returns:
        A `Selection`: x, lengths and positions. With ``over="batch"`` x and positions are packed; their total is known,
        and lengths is a tensor, of which attention over packed tokens takes ``lengths.cumsum(0)``.

    Differentiable with respect to x: to a token flows what flows to the one that it is part of, times its weight there.
    Scores and metric have no gradient: they only choose, and in "prumerge" scores are taken as constants. x is not kept
    for the backward pass. Autocast rounds nothing here.

    Raises:
        TypeError: a wrong dtype or type. ValueError: a wrong shape, device, choice, or number to keep. Each names the
            argument, what it must be and what it got.
        BackendError: a forced backend can't run this call.

    Source: Yang et al., "VisionZip", 2024; Shang et al., "LLaVA-PruMerge", 2024.

    Example:
        >>> import torch, mmkernels
        >>> x, scores = torch.randn(900, 64), torch.rand(900)  # two images
        >>> kept = mmkernels.select_tokens(x, (600, 300), 0.25, scores)
        >>> kept.x.shape, kept.lengths
        (torch.Size([225, 64]), (150, 75))
        >>> torch.equal(kept.x, x[kept.positions])
        True
    """
    images = check_lengths(x, lengths)
    if over not in _OVER:
        raise ValueError(f"over must be one of {', '.join(_OVER)}, got {over!r}")
    merge = _check_merge(merge_rest)
    if merge and metric is None and x.shape[-1] == 0:
        raise ValueError(f"x must have at least one channel with merge_rest, got shape {tuple(x.shape)}")
    per_image = over == "image"
    if per_image:
        kept, each = check_kept(keep, images)
    else:
        kept, each = check_keep(keep, (sum(images.sizes),), together=True), 0
    args = Arguments(
        x=images.x,
        scores=_check_scores(scores, x).detach(),
        metric=None if metric is None else _check_metric(metric, x, merge).detach(),
        lengths=images.sizes,
        keep=kept,
        over=over,
        merge=merge,
    )
    y, index, counts, _, _ = OP(args, resolve(backend))
    if not per_image:
        return Selection(y, counts, index)
    if images.batched:
        y, index = unpack(y, x, each), unpack(index, x, each)
    return Selection(y, lengths_as(lengths, kept, each), index)


def _check_merge(merge_rest: object) -> str:
    if merge_rest is False:
        return ""
    if merge_rest is True:
        return "mean"
    if not isinstance(merge_rest, str):
        raise TypeError(f"merge_rest must be a bool or one of {', '.join(_MERGES)}, got {type(merge_rest).__name__}")
    if merge_rest not in _MERGES:
        raise ValueError(f"merge_rest must be a bool or one of {', '.join(_MERGES)}, got {merge_rest!r}")
    return merge_rest


def _check_scores(scores: Tensor, x: Tensor) -> Tensor:
    check_values("scores", scores, x)
    return scores.flatten() if scores.dim() == 2 else scores


def _check_metric(metric: Tensor, x: Tensor, merge: str) -> Tensor:
    if not merge:
        raise ValueError("metric must be None without merge_rest, got a tensor")
    check_rows("metric", metric, x)
    if metric.shape[-1] == 0:
        raise ValueError(f"metric must have at least one channel, got shape {tuple(metric.shape)}")
    if metric.dtype == torch.float64:
        metric = metric.to(wide_dtype(x))
    return metric.flatten(0, 1) if metric.dim() == 3 else metric


def _fake(args: Arguments) -> tuple[Tensor, ...]:
    x, kept = args.x, sum(args.keep)
    tokens = x.shape[0] if args.merge else 0
    return (
        x.new_empty(kept, x.shape[1]),
        x.new_empty(kept, dtype=torch.int64),
        x.new_empty(len(args.lengths) if args.over == "batch" else 0, dtype=torch.int64),
        x.new_empty(tokens, dtype=torch.int32),
        x.new_empty(tokens, dtype=wide_dtype(x)),
    )


OP = define(
    "select_tokens",
    Arguments,
    Results,
    fake=_fake,
    backends=[
        triton_kernel(f"{__name__}.triton", "forward"),
        cpu_kernel("select_tokens_cpu"),
        Backend("chunked", chunked.forward),
        Backend("reference", reference),
    ],
    gradient=Gradient(
        saves=("positions", "place", "weight"),
        formula=lambda args: (formula(args),),
        backends=[
            triton_kernel(f"{__name__}.triton", "backward"),
            cpu_kernel("select_tokens_backward_cpu"),
            Backend("reference", reference_backward),
        ],
        contiguous=True,
        linear=("x", "scores", "metric"),
    ),
)
