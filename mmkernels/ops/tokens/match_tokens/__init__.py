"""Which tokens of an image are alike enough to be one: bipartite soft matching, without the matrix of similarities."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.ops.tokens.inputs import Lengths, check_lengths, lengths_as
from mmkernels.ops.tokens.keep import Keep, check_kept, check_protect, check_token_sizes
from mmkernels.ops.tokens.match_tokens import chunked
from mmkernels.ops.tokens.match_tokens.spec import Arguments, Results, reference
from mmkernels.runtime.backends import cpu_kernel, triton_kernel
from mmkernels.runtime.checks import without_autocast
from mmkernels.runtime.dispatch import Backend, define, resolve

__all__ = ["match_tokens"]


def match_tokens(
    metric: Tensor,
    lengths: Lengths,
    keep: Keep,
    *,
    sizes: Tensor | None = None,
    protect: int = 0,
    backend: str | None = None,
) -> tuple[Tensor, Lengths]:
    """Match similar tokens of each image, so that `keep` groups are left: the first half of `merge_tokens`.

    A round of matching splits an image's tokens into those at even places (set A) and at odd places (set B). Each token
    of A finds the one of B with the largest cosine similarity, and the most similar tokens of A join theirs. Half of
    the tokens go in a round at most; if more are to go there are further rounds, each over the means of the groups so
    far, and each but the last with all of A. Similarities are computed in tiles, and of each token the best is kept.

    Args:
        metric: ``[tokens, D]``, the images' tokens one after the other, or ``[images, tokens, D]``: what tokens are
            compared by, for the keys of an attention layer their mean over the heads. float16, bfloat16, float32 or
            float64.
        lengths: the tokens of each image: integers ``[images]`` (a sequence, or a tensor, whose values are read), or
            one number for ``metric [images, tokens, D]``.
        keep: how many tokens are left of each image: a number, one for each image, or a share above 0 and at most 1 as
            a float (of each image's tokens, rounded up). At least ``protect + 1`` where an image has more.
        sizes: ``[tokens]`` or ``[images, tokens]``, float32 (float64 beside a float64 metric), above 0: how many
            patches each token stands for already, the weights of the means; None: 1 each.
        protect: so many tokens at the front of each image, such as a class token and registers, take no part. They
            count as places.
        backend: None (``use_backend``'s choice, else the first that can), "triton" (GPUs, untested on one), "cpu"
            (float32, bfloat16 and float16), "chunked" (any device, float64 too) or "reference".

    Returns:
        The assignment, int64 of metric's shape without D: for each token the row of its group among all tokens that are
        left, counted through all images; and the new lengths, in the form of `lengths`. Tokens that are left keep their
        order; a group stands at the place of its token of B.

        Of equally similar tokens of B the first is taken, of equally similar tokens of A the first ones merge; equal up
        to rounding, other backends may decide otherwise. A token of zeros has the similarity 0 to all. A token with NaN
        or inf is the least similar to all: nothing joins it, and it merges after all others, into the first of B (if
        all tokens of B are such, all merge into the first). Cosines are summed in float32 (float64 for float64
        metrics). No gradient.

    Autocast rounds nothing here.

    Raises:
        TypeError: a wrong dtype or type. ValueError: a wrong shape, device, or number of tokens. Each names the
            argument, what it must be and what it got.
        BackendError: a forced backend can't run this call.

    Source: Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023, section 3, "Bipartite Soft Matching".

    Example:
        >>> import torch, mmkernels
        >>> metric = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.0, -1.0]])
        >>> assignment, lengths = mmkernels.match_tokens(metric, [4], 3)
        >>> assignment, lengths
        (tensor([0, 0, 1, 2]), (3,))
    """
    (metric,) = without_autocast(metric)
    images = check_lengths(metric, lengths, "metric")
    protect = check_protect(protect)
    kept, each = check_kept(keep, images, least=protect + 1)
    args = Arguments(
        metric=images.x.detach(),
        sizes=None if sizes is None else check_token_sizes(sizes, metric, "metric").detach(),
        lengths=images.sizes,
        kept=kept,
        protect=protect,
    )
    assignment: Tensor = OP(args, resolve(backend))
    return assignment.view(metric.shape[:-1]), lengths_as(lengths, kept, each)


def _fake(args: Arguments) -> Tensor:
    return args.metric.new_empty(args.metric.shape[0], dtype=torch.int64)


OP = define(
    "match_tokens",
    Arguments,
    Results,
    fake=_fake,
    backends=[
        triton_kernel(f"{__name__}.triton", "forward"),
        cpu_kernel("match_tokens_cpu"),
        Backend("chunked", chunked.forward),
        Backend("reference", reference),
    ],
)
