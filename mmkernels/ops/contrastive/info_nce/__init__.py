"""The symmetric contrastive loss of images and texts (CLIP), without the logits' matrix."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from mmkernels.ops.common.dtypes import wide_dtype
from mmkernels.ops.contrastive.info_nce import chunked, ring
from mmkernels.ops.contrastive.info_nce.reduction import (
    POSITIVES,
    Arguments,
    Results,
    reduced,
    with_reduction,
    with_upstream,
)
from mmkernels.ops.contrastive.info_nce.spec import reference, reference_backward
from mmkernels.ops.contrastive.inputs import (
    check_features,
    check_hard_ids,
    check_ids,
    check_more_features,
    check_scalar,
)
from mmkernels.runtime.backends import cpu_kernel, triton_kernel
from mmkernels.runtime.checks import autocast, check_number, in_graph
from mmkernels.runtime.dispatch import Backend, define, resolve
from mmkernels.runtime.gradient import Gradient

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["ContrastiveStats", "info_nce"]


class ContrastiveStats(NamedTuple):
    """What `info_nce` counts on the way, as tensors without a dim, on the features' device and without a gradient.

    A rank is how many negatives score above the row's best positive; of equal scores the lower index comes first, and a
    NaN score comes last. Means are over the rows that have a positive, NaN where there is none.

    Args:
        image_accuracy: float, the share of images whose best positive scores above all negatives (rank 0).
        text_accuracy: float, of texts.
        image_mean_rank: float, 0 is best; `hard_texts` count.
        text_mean_rank: float.
        images_without_positive: int64, how many contribute nothing to the loss. A positive may be a hard text.
        texts_without_positive: int64.

    Example:
        >>> import torch, mmkernels
        >>> features = torch.nn.functional.normalize(torch.randn(8, 64), dim=1)
        >>> _, stats = mmkernels.info_nce(features, features, 100.0, return_stats=True)
        >>> float(stats.image_accuracy), float(stats.text_mean_rank)
        (1.0, 0.0)
    """

    image_accuracy: Tensor
    text_accuracy: Tensor
    image_mean_rank: Tensor
    text_mean_rank: Tensor
    images_without_positive: Tensor
    texts_without_positive: Tensor


def info_nce(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    *,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    same_id: str = "positive",
    hard_texts: Tensor | None = None,
    hard_text_ids: Tensor | None = None,
    label_smoothing: float = 0.0,
    image_weight: float = 0.5,
    group: ProcessGroup | None = None,
    reduction: str = "mean",
    return_stats: bool = False,
    backend: str | None = None,
) -> Any:
    """CLIP's loss: cross-entropy of ``logit_scale * image text'`` over its rows and over its columns.

    The logits are never stored: memory is linear in the features, so the largest batch is the one whose features fit.
    Forward computes each logit once for both directions, backward once more and from it every gradient: four matrix
    products a training step.

    Args:
        image: features ``[N, d]``, float16, bfloat16, float32 or float64, normalised or not; or ``[N, Q, d]``: the
            score of a pair is the largest of its image's Q queries (BLIP-2).
        text: ``[M, d]``, image's dtype and device.
        logit_scale: the multiplier itself (1 / temperature, already exponentiated): a number, or a tensor of one
            element in any real dtype. It is used in image's dtype or float32 if it has one of these, else in float32
            (float64 beside float64 features), and never widens the features.
        image_ids, text_ids: integers ``[N]`` and ``[M]``: what each row is about. One alone serves for both sides.
            Without ids N = M, and text i is image i's only positive.
        same_id: what pairs of one id are. "positive": positives, as many as there are; a row's target is uniform over
            its own (several captions an image, several images a caption). "ignore": text i stays image i's only
            positive (N = M), and the other pairs of the id, false negatives, are left out of both softmaxes.
        hard_texts: ``[K, d]``: more negatives for images, which take no part in the texts' direction: hard captions
            (NegCLIP), or a queue of features (MoCo, ALBEF, BLIP). Differentiated only if it requires a gradient.
        hard_text_ids: integers ``[K]``: what each hard text is about, to be given with `image_ids` or `text_ids`. A
            hard text with an image's id is no negative of that image: by `same_id` it is one more of its positives, or
            left out of its softmax. Without them all hard texts are negatives.
        label_smoothing: 0 to 1, the share of each row's target that is uniform over everything that its softmax
            compares, as in ``F.cross_entropy``.
        image_weight: 0 to 1, the share of the image-to-text direction; the rest is that of text-to-image.
        group: ranks that compute the loss together (``torch.distributed.group.WORLD``, or ``mesh.get_group()``), or
            None: this process alone; see below.
        reduction: "mean": each direction's mean over its rows that have a positive (0 where none has), weighed by
            `image_weight`; "sum": the same of sums; "none": the two directions' rows as they are.
        return_stats: also return `ContrastiveStats`, counted on the way. The positives' scores must be known before
            negatives are counted, so they are computed first: a small share of a product, or up to one more where a
            large share of all pairs are positives.
        backend: None (``use_backend``'s choice, else the first that can), "triton" (GPUs), "cpu" (float32, bfloat16 and
            float16), "chunked" (any device, float64 too; with `return_stats` it computes the logits twice) or
            "reference", the naive formula, differentiated by PyTorch's own autograd outside ``torch.compile``.

    Returns:
        a float32 tensor without a dim (float64 for float64 features); with reduction="none" the pair of ``[N]`` and
        ``[M]``; with `return_stats` the pair of that and the statistics. A row without a positive gives 0 and no
        gradient. Differentiable by image, text, logit_scale and hard_texts; second derivatives, and those in forward
        mode, are computed by the reference formula, at its memory cost. NaN among the features
        makes the loss NaN; so does inf, unless all that it gives are logits of -inf: nothing of what is compared.

    Under autocast image, text and hard_texts are cast to the autocast dtype.

    **Over a group** each rank passes its own images and texts, as many as it has, none too, and every image is compared
    to the texts of all ranks. Ids are compared over all ranks; without them N = M on each rank. Hard texts stay local:
    only this rank's images see them. Every rank returns the loss, and the statistics, of all ranks together
    (reduction="none": of its own rows). Texts travel round the ring of ranks in pieces, in their own dtype, while what
    has come is computed with; no rank ever holds the features of all, and each sends about ``2 N W d`` numbers of the
    features' dtype and ``N W d`` of float32 a step for its N texts and W ranks (``3 N W d`` of the former with
    `return_stats`, which needs one backend on all ranks). All ranks must call forward, and then backward, in the same
    order. The sizes that they tell each other make a GPU's call wait for the device.

    Gradients are those of the sum over ranks of what they return, W times the loss: a rank's features, and what it
    computed them from, get W times the loss's gradient, so that the mean over ranks is right; logit_scale gets the
    loss's own gradient on each rank, whose mean is that gradient again. So under DDP and FSDP2, which average gradients
    over ranks, all are exactly those of one process with the whole batch. Where nothing averages them, divide the
    parameters' gradients by W and sum them over ranks; logit_scale's is right as it is. (For unequal upstream gradients
    read their sum over ranks for W, and their mean for 1.) Over a group there are no second derivatives and none in
    forward mode.

    Raises:
        TypeError: a wrong dtype or type. ValueError: a wrong shape, device, range or choice. Each names the argument,
            what it must be and what it got. Over a group every rank raises ValueError where one rank's arguments are
            bad, or ranks differ in what must be the same: channels, dtype, options, logit_scale, ids given or not.
        BackendError: a forced backend can't run this call.
        GroupError: (a RuntimeError) a rank has died, is late, or called something else; after the group's timeout at
            the latest with gloo. NCCL's watchdog does its own.

    Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (CLIP), 2021, figure
    3; several positives as in Khosla et al., "Supervised Contrastive Learning", 2020, eq. 2; queries as in Li et al.,
    "BLIP-2", 2023, section 3.2; hard texts as in Yuksekgonul et al., "When and why vision-language models behave like
    bags-of-words" (NegCLIP), 2023.

    Example:
        >>> import torch, mmkernels
        >>> image, text = (torch.nn.functional.normalize(torch.randn(n, 64), dim=1) for n in (4, 6))
        >>> image_ids, text_ids = torch.arange(4), torch.tensor([0, 0, 1, 2, 2, 3])  # two captions of images 0 and 2
        >>> loss, stats = mmkernels.info_nce(
        ...     image, text, 100.0, image_ids=image_ids, text_ids=text_ids, return_stats=True
        ... )
        >>> loss.shape, int(stats.images_without_positive)
        (torch.Size([]), 0)
    """
    checked = partial(
        _checked, image, text, logit_scale, image_ids, text_ids, same_id, hard_texts, hard_text_ids, label_smoothing,
        image_weight, reduction, return_stats,
    )  # fmt: skip
    if group is not None:
        return _over_ranks(checked, group, backend, image)
    args = checked()
    backend = resolve(backend)
    if backend == "reference" and not in_graph():
        naive = with_reduction(partial(reference, need_states=return_stats or image_ids is not None))
        with torch._C._DisableAutocast():  # the features have been cast
            results = Results._make(naive(args))
    else:
        results = Results._make(OP(args, backend))
    loss = (results.image_loss, results.text_loss) if reduction == "none" else results.loss
    if not return_stats:
        return loss
    of_images = _Statistics.of(results.image_state, results.image_rank)
    of_texts = _Statistics.of(results.text_state, results.text_rank)
    return loss, ContrastiveStats(
        image_accuracy=of_images.accuracy,
        text_accuracy=of_texts.accuracy,
        image_mean_rank=of_images.mean_rank,
        text_mean_rank=of_texts.mean_rank,
        images_without_positive=of_images.without_positive,
        texts_without_positive=of_texts.without_positive,
    )


def _checked(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    same_id: str,
    hard_texts: Tensor | None,
    hard_text_ids: Tensor | None,
    label_smoothing: float,
    image_weight: float,
    reduction: str,
    return_stats: bool,
    least: int = 1,
) -> Arguments:
    """Returns the record of a call; `least`: the images and texts that there must be."""
    image, text = autocast(image, text)
    check_features(image, text, least=least)
    if same_id not in ("positive", "ignore"):
        raise ValueError(f'same_id must be "positive" or "ignore", got {same_id!r}')
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction must be "mean", "sum" or "none", got {reduction!r}')
    ignore = same_id == "ignore"
    image_ids, text_ids = check_ids(image_ids, text_ids, image, text, paired=ignore)
    logit_scale = check_scalar("logit_scale", logit_scale, image)
    if hard_texts is not None:
        (hard_texts,) = autocast(hard_texts)
        check_more_features("hard_texts", hard_texts, image, least=0)
    if hard_text_ids is not None:
        hard_text_ids = check_hard_ids(hard_text_ids, hard_texts, image_ids, image)
    return Arguments(
        image=image,
        text=text,
        logit_scale=logit_scale,
        image_ids=image_ids,
        text_ids=text_ids,
        hard_texts=hard_texts,
        hard_text_ids=hard_text_ids,
        ignore=ignore,
        label_smoothing=check_number("label_smoothing", label_smoothing, "a number from 0 to 1", 0.0, 1.0),
        image_weight=check_number("image_weight", image_weight, "a number from 0 to 1", 0.0, 1.0),
        reduction=reduction,
        stats=bool(return_stats),
    )


def _over_ranks(checked: Any, group: ProcessGroup, backend: str | None, image: object) -> Any:
    """Returns what `info_nce` returns, over a group."""
    args, results = ring.results(partial(checked, least=0), group, backend, image)
    loss = (results.image_loss, results.text_loss) if args.reduction == "none" else results.loss
    if not args.stats:
        return loss
    images, texts = ring.totals_of(results.totals.to(results.loss.dtype))
    return loss, ContrastiveStats(
        image_accuracy=images.accurate / images.with_positive,
        text_accuracy=texts.accurate / texts.with_positive,
        image_mean_rank=images.ranks / images.with_positive,
        text_mean_rank=texts.ranks / texts.with_positive,
        images_without_positive=(images.rows - images.with_positive).to(torch.int64),
        texts_without_positive=(texts.rows - texts.with_positive).to(torch.int64),
    )


class _Statistics(NamedTuple):
    """Of the rows of one direction."""

    accuracy: Tensor
    mean_rank: Tensor
    without_positive: Tensor

    @classmethod
    def of(cls, state: Tensor, rank: Tensor) -> _Statistics:
        has_positive = state[POSITIVES] > 0
        count = has_positive.sum()
        # Of two integers the quotient would have PyTorch's default dtype.
        accuracy = ((rank == 0) & has_positive).sum().to(state.dtype) / count
        mean_rank = torch.where(has_positive, rank, 0).sum().to(state.dtype) / count
        return cls(accuracy, mean_rank, has_positive.numel() - count)


def _fake(args: Arguments) -> tuple[Tensor, ...]:
    image, wide = args.image, wide_dtype(args.image)
    sizes = (image.shape[0], args.text.shape[0])
    losses = [image.new_empty(n, dtype=wide) for n in sizes]
    states = [image.new_empty(4, n, dtype=wide) for n in sizes]
    ranks = [image.new_empty(n if args.stats else 0, dtype=torch.int64) for n in sizes]
    return (image.new_empty((), dtype=wide), *losses, *states, *ranks)


def _formula(args: Any) -> tuple[Tensor, ...]:
    """The losses of a backward record. Of its states only counts of positives matter, which depend on no feature."""
    image_loss, text_loss, *_ = reference(args._replace(stats=False), need_states=False)
    loss = reduced(args, image_loss, text_loss, args.image_state, args.text_state)
    return loss, image_loss, text_loss


OP = define(
    "info_nce",
    Arguments,
    Results,
    fake=_fake,
    backends=[
        triton_kernel(f"{__name__}.triton.forward", "forward", with_reduction),
        cpu_kernel("info_nce_cpu"),
        Backend("chunked", with_reduction(chunked.forward)),
        Backend("reference", with_reduction(reference)),
    ],
    gradient=Gradient(
        saves=("image_state", "text_state"),
        formula=_formula,
        backends=[
            triton_kernel(f"{__name__}.triton.backward", "backward", with_upstream),
            cpu_kernel("info_nce_backward_cpu"),
            Backend("chunked", with_upstream(chunked.backward)),
            Backend("reference", with_upstream(reference_backward)),
        ],
        contiguous=True,
    ),
)
