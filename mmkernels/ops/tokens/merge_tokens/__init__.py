"""Similar tokens of an image merged into one: size-weighted means, with the matrix of similarities never stored."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.ops.common.dtypes import wide_dtype
from mmkernels.ops.tokens.inputs import Lengths, check_lengths, check_rows, lengths_as, unpack
from mmkernels.ops.tokens.keep import Keep, check_kept, check_protect, check_token_sizes
from mmkernels.ops.tokens.match_tokens import OP as MATCH
from mmkernels.ops.tokens.match_tokens.spec import Arguments as MatchArguments
from mmkernels.ops.tokens.merge_tokens import chunked
from mmkernels.ops.tokens.merge_tokens.spec import Arguments, Results, formula, reference, reference_backward
from mmkernels.ops.tokens.ranking import image_of
from mmkernels.runtime.arguments import Sizes
from mmkernels.runtime.backends import cpu_kernel, triton_kernel
from mmkernels.runtime.checks import can_look, check_range, check_tensor, without_autocast
from mmkernels.runtime.dispatch import Backend, define, resolve
from mmkernels.runtime.gradient import Gradient

__all__ = ["merge_tokens"]


def merge_tokens(
    x: Tensor,
    lengths: Lengths,
    keep: Keep,
    *,
    metric: Tensor | None = None,
    sizes: Tensor | None = None,
    protect: int = 0,
    assignment: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Lengths, Tensor, Tensor]:
    """Token Merging (ToMe): merge the most similar tokens of each image until `keep` are left.

    `match_tokens` says which tokens form a group; a group becomes the mean of its tokens, weighted by their sizes. x is
    read once and x' written once, however many rounds the matching takes: the mean of means weighted by size is the
    mean of all.

    Attention over merged tokens counts each as often as its size says (the paper's proportional attention) with the
    bias ``log(sizes')``: ``cross_attention(q, k', v', bias=sizes'.log()[:, None, None, :])``.

    Args:
        x: ``[tokens, C]``, the images' tokens one after the other, or ``[images, tokens, C]``. float16, bfloat16,
            float32 or float64.
        lengths, keep, protect: as in `match_tokens`.
        metric: ``[tokens, D]`` or ``[images, tokens, D]``, any of these dtypes, on x's device: what tokens are compared
            by, such as an attention layer's keys, averaged over the heads; None: x itself.
        sizes: ``[tokens]`` or ``[images, tokens]``, float32 (float64 beside a float64 x), above 0: how many patches
            each token stands for, as an earlier call returned them; None: 1 each.
        assignment: int64, what `match_tokens` or an earlier call returned for tokens of these lengths and this `keep`,
            so that other tensors are merged the same way; metric and protect are then not used. Values are checked on a
            CPU; on a GPU, where that would wait for the device, they must be right.
        backend: None (``use_backend``'s choice, else the first that can), "triton" (GPUs, untested on one), "cpu"
            (float32, bfloat16 and float16), "chunked" (any device, float64 too) or "reference".

    Returns:
        x': ``[tokens', C]`` or ``[images, tokens', C]`` in x's dtype. Tokens that are left keep their order; a group
        stands at the place of its token at an odd place, into which the others merged. A token that is alone in its
        group is returned as it is.

        lengths': in the form of `lengths`.

        sizes': ``[tokens']`` or ``[images, tokens']``, in the dtype of sizes.

        assignment: int64 ``[tokens]`` or ``[images, tokens]``, each token's row in x' (in ``x'.flatten(0, 1)`` where
        that is batched). `unmerge_tokens` takes it.

    Gradients of x and sizes are those of the means: the assignment is a constant. Which tokens match is not
    differentiable; NaN, ties and tokens of zeros are as `match_tokens` says. Second derivatives go through the naive
    formula. Autocast rounds nothing here.

    Raises:
        TypeError: a wrong dtype or type. ValueError: a wrong shape, device, or number of tokens. Each names the
            argument, what it must be and what it got.
        BackendError: a forced backend can't run this call.

    Source: Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023, section 3.

    Example:
        >>> import torch, mmkernels
        >>> x = torch.tensor([[1.0, 0.0], [0.8, 0.0], [0.0, 1.0], [0.0, -1.0]])
        >>> merged, lengths, sizes, assignment = mmkernels.merge_tokens(x, [4], 3)
        >>> merged, lengths
        (tensor([[ 0.9000,  0.0000],
                [ 0.0000,  1.0000],
                [ 0.0000, -1.0000]]), (3,))
        >>> sizes, assignment
        (tensor([2., 1., 1.]), tensor([0, 0, 1, 2]))
    """
    (x,) = without_autocast(x)
    images = check_lengths(x, lengths)
    protect = check_protect(protect)
    kept, each = check_kept(keep, images, least=protect + 1)
    flat_sizes = None if sizes is None else check_token_sizes(sizes, x)
    backend = resolve(backend)
    if backend and can_look(x):  # so that the error of a backend that can't run speaks of this op
        OP.choose(backend, Arguments(x=images.x, sizes=flat_sizes, assignment=images.x, kept=kept))
    if assignment is None:
        rows = images.x if metric is None else _check_metric(metric, x)
        weights = None if flat_sizes is None else flat_sizes.detach().to(wide_dtype(rows))
        group: Tensor = MATCH(MatchArguments(rows.detach(), weights, images.sizes, kept, protect), backend)
    else:
        group = _check_assignment(assignment, x, images.sizes, kept)
    merged, merged_sizes = OP(Arguments(x=images.x, sizes=flat_sizes, assignment=group, kept=kept), backend)
    return (
        unpack(merged, x, each),
        lengths_as(lengths, kept, each),
        unpack(merged_sizes, x, each),
        group.view(x.shape[:-1]) if assignment is None else assignment,
    )


def _check_metric(metric: Tensor, x: Tensor) -> Tensor:
    """Returns the metric of all tokens, [N, D]."""
    (metric,) = without_autocast(metric)
    check_rows("metric", metric, x)
    return metric.flatten(0, 1) if metric.dim() == 3 else metric


def _check_assignment(assignment: Tensor, x: Tensor, lengths: Sizes, kept: Sizes) -> Tensor:
    """Returns the assignment of all tokens, [N], to groups of their own image, of which none is empty."""
    count = sum(kept)
    check_tensor("assignment", assignment)
    if assignment.dtype != torch.int64:
        raise TypeError(f"assignment must be int64, got {assignment.dtype}")
    if assignment.shape != x.shape[:-1]:
        raise ValueError(f"assignment must be {list(x.shape[:-1])}, got shape {tuple(assignment.shape)}")
    if assignment.device != x.device:
        raise ValueError(f"assignment must be on x's device {x.device}, got {assignment.device}")
    group = assignment.flatten()
    check_range("assignment", group, 0, count - 1)
    if group.is_cpu and can_look(group) and count:
        empty = (group.bincount(minlength=count) == 0).nonzero()
        if len(empty):
            raise ValueError(f"assignment must have a token for each of {count} rows, got none for {int(empty[0])}")
    if group.is_cpu and can_look(group) and len(lengths) > 1:
        image = image_of(lengths, group.device)
        astray = (image_of(kept, group.device)[group] != image).nonzero()
        if len(astray):
            token = int(astray[0])
            raise ValueError(
                f"assignment must give each token a row of its image, got row {int(group[token])} for token {token} of "
                f"image {int(image[token])}"
            )
    return group


def _fake(args: Arguments) -> tuple[Tensor, Tensor]:
    x, count = args.x, sum(args.kept)
    return x.new_empty(count, x.shape[1]), x.new_empty(count, dtype=wide_dtype(x))


OP = define(
    "merge_tokens",
    Arguments,
    Results,
    fake=_fake,
    backends=[
        triton_kernel(f"{__name__}.triton", "forward"),
        cpu_kernel("merge_tokens_cpu"),
        Backend("chunked", chunked.forward),
        Backend("reference", reference),
    ],
    gradient=Gradient(
        saves=("merged_sizes",),
        formula=formula,
        backends=[
            triton_kernel(f"{__name__}.triton", "backward"),
            cpu_kernel("merge_tokens_backward_cpu"),
            Backend("reference", reference_backward),
        ],
        contiguous=True,
        linear=lambda args: ("x",) if args.sizes is None else (),
    ),
)
