"""Tokens that differ from each other: one by one, the token that adds most to those that are chosen."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.ops.common.dtypes import wide_dtype
from mmkernels.ops.tokens.inputs import Lengths, check_lengths, check_values, unpack
from mmkernels.ops.tokens.keep import Keep, check_kept
from mmkernels.ops.tokens.select_diverse import chunked
from mmkernels.ops.tokens.select_diverse.spec import Arguments, Results, check_method, reference
from mmkernels.runtime.backends import cpu_kernel, triton_kernel
from mmkernels.runtime.dispatch import Backend, define, resolve

__all__ = ["select_diverse"]


def select_diverse(
    x: Tensor,
    lengths: Lengths,
    keep: Keep,
    *,
    method: str = "determinant",
    quality: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Returns, for each image, `keep` tokens that differ from each other, one after the other as they are chosen.

    ``method="determinant"`` chooses the token whose part outside of the span of those chosen is longest, times its
    quality: so the determinant of the chosen tokens' similarities ``quality_i cos(x_i, x_j) quality_j`` grows most
    (CDPruner; its quality is the relevance to the question). ``method="distance"`` chooses the token that is farthest,
    by 1 - cos, from the nearest chosen one, and first the one that is farthest from its nearest neighbour (DivPrune).
    Similarities are computed and dropped: memory is linear, ``[tokens]`` and ``[keep, C]``. No gradient.

    Args:
        x: tokens of images, packed, ``[tokens, C]``, or ``[images, tokens, C]``; float16, bfloat16, float32, float64.
        lengths: the tokens of each image, integers ``[images]``, or one number for ``[images, tokens, C]``. A tensor
            on a GPU is read back, which waits.
        keep: how many to keep of each image, from 0 to its tokens: one number for all, one for each, or a share of each
            image's tokens, a float above 0 and at most 1, rounded up.
        method: "determinant" or "distance".
        quality: how much each token counts, floats of x's shape without C; for "determinant". None: 1 each.
        backend: None (``use_backend``'s choice, else the first that can), "triton" (GPUs, untested on one), "cpu"
            (float32, bfloat16 and float16), "chunked" (any device, float64 too) or "reference".

    Returns:
        Places in the packed tokens, int64 ``[sum of keep]``, image after image; ``[images, keep]``, places within the
        image, for ``[images, tokens, C]``. Sorted, they keep the tokens' order. What a token adds counts as 0 below
        1e-5 of its squared length or of the distance; of equal ones the lower place comes first. A token that is not
        finite, or whose quality is not, comes after all others.

    Raises:
        TypeError: a wrong dtype or type. ValueError: a wrong shape, device, method, or number to keep. Each names the
            argument, what it must be and what it got.
        BackendError: a forced backend can't run this call.

    Source: Zhang et al., "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs"
    (CDPruner), 2025, with the greedy algorithm of Chen et al., "Fast Greedy MAP Inference for Determinantal Point
    Process", 2018, algorithm 1; Alvar et al., "DivPrune", 2025, algorithm 1.

    Example:
        >>> import torch, mmkernels
        >>> x = torch.eye(4)[[0, 0, 0, 1, 2, 1]]  # tokens of three kinds
        >>> mmkernels.select_diverse(x, [6], 3)
        tensor([0, 3, 4])
    """
    given = check_lengths(x, lengths)
    kept, each = check_kept(keep, given, least=0)
    check_method(method)
    if given.x.shape[1] == 0:
        raise ValueError(f"x must have channels, got shape {tuple(x.shape)}")
    if quality is not None:
        quality = _check_quality(quality, x, method).detach().to(wide_dtype(x)).flatten()
    args = Arguments(x=given.x.detach(), quality=quality, lengths=given.sizes, keep=kept, method=method)
    index: Tensor = OP(args, resolve(backend))
    if not given.batched:
        return index
    # The remainder is in the image also of the zeros that `stub_ops` gives, with which callers index.
    return unpack(index, x, each) % x.shape[1]


def _check_quality(quality: Tensor, x: Tensor, method: str) -> Tensor:
    if method != "determinant":
        raise ValueError(f"quality must be None for method {method}, which does not use it")
    check_values("quality", quality, x)
    return quality


def _fake(args: Arguments) -> Tensor:
    return args.x.new_empty(sum(args.keep), dtype=torch.int64)


OP = define(
    "select_diverse",
    Arguments,
    Results,
    fake=_fake,
    backends=[
        triton_kernel(f"{__name__}.triton", "forward"),
        cpu_kernel("select_diverse_cpu"),
        Backend("chunked", chunked.forward),
        Backend("reference", reference),
    ],
)
