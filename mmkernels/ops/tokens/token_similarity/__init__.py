"""How similar each token of an image is to some other tokens: the text, pivots, another frame."""

from __future__ import annotations

from math import prod

from torch import Tensor

from mmkernels.ops.common.dtypes import wide_dtype
from mmkernels.ops.tokens.inputs import Lengths, check_sizes
from mmkernels.ops.tokens.token_similarity import chunked
from mmkernels.ops.tokens.token_similarity.spec import REDUCTIONS, Arguments, Results, reference
from mmkernels.runtime.arguments import Sizes
from mmkernels.runtime.backends import cpu_kernel, triton_kernel
from mmkernels.runtime.checks import without_autocast
from mmkernels.runtime.dispatch import Backend, define, resolve

__all__ = ["token_similarity"]


def token_similarity(
    x: Tensor,
    lengths: Lengths,
    others: Tensor,
    other_lengths: Lengths,
    *,
    reduce: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """Returns the mean, largest or smallest cosine of each token of an image with the image's `others`.

    With the words of a question as `others` it is a token's relevance to the question (CDPruner's quality, before it is
    scaled to 0 to 1), if both are embedded in one space; with pivot tokens, and "max", how much of a token is a
    duplicate, which DART leaves out. Similarities are computed in tiles and dropped: memory is linear. A mean takes one
    product with the mean direction of `others`. The similarities only choose, and have no gradient.

    Args:
        x: ``[tokens, C]``, the images' tokens one after the other, or ``[images, tokens, C]``; float16, bfloat16,
            float32 or float64. A strided view, such as ``x[:, 1:]``, is read in place.
        lengths: the tokens of each image, which may have none: integers ``[images]``, or one number for
            ``[images, tokens, C]``. A tensor on a GPU is read back, which waits: pass a list.
        others: what the tokens are compared with, ``[others, C]`` or ``[images, others, C]``, in x's dtype.
        other_lengths: how many of them belong to each image, as `lengths`: 1 or more where an image has tokens.
        reduce: "mean", "max" or "min".
        backend: None (``use_backend``'s choice, else the first that can), "triton" (GPUs, untested on one), "cpu"
            (float32, bfloat16 and float16), "chunked" (any device, float64 too) or "reference".

    Returns:
        ``[tokens]`` or ``[images, tokens]``, float32 (float64 for a float64 x): from -1 to 1 but for rounding. The
        cosine with a row of zeros is 0. NaN of a token that is not finite, and of all tokens of an image one of whose
        others is not. Products are summed in float32 (float64), whatever the size of the values; but on "triton", for
        "max" and "min", products of two rows must be finite, and not vanish.

    Autocast rounds nothing here: x and others may differ in their dtype under it, and the wider one is taken.

    Raises:
        TypeError: a wrong dtype or type. ValueError: a wrong shape, device, length or reduction. Each names the
            argument, what it must be and what it got.
        BackendError: a forced backend can't run this call.

    Source: the relevance of Zhang et al., "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token
    Pruning in MLLMs" (CDPruner), 2025; the duplication of Wen et al., "Stop Looking for Important Tokens in
    Multimodal Language Models: Duplication Matters More" (DART), 2025.

    Example:
        >>> import torch, mmkernels
        >>> x, words = torch.eye(4), torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
        >>> mmkernels.token_similarity(x, [4], words, [2])
        tensor([0.7500, 0.2500, 0.2500, 0.2500])
        >>> mmkernels.token_similarity(x, [4], words, [2], reduce="max")
        tensor([1.0000, 0.5000, 0.5000, 0.5000])
    """
    x, others = without_autocast(x, others)
    sizes = check_sizes(x, lengths)
    if reduce not in REDUCTIONS:
        raise ValueError(f"reduce must be one of {', '.join(REDUCTIONS)}, got {reduce!r}")
    counts = _check_others(x, sizes, others, other_lengths)
    args = Arguments(x=x.detach(), others=others.detach(), lengths=sizes, other_lengths=counts, reduce=reduce)
    similarity: Tensor = OP(args, resolve(backend))
    return similarity.view(x.shape[:-1])


def _check_others(x: Tensor, sizes: Sizes, others: Tensor, other_lengths: Lengths) -> Sizes:
    """Returns how many of the others belong to each image."""
    counts = check_sizes(others, other_lengths, "others", "other_lengths")
    if others.dtype != x.dtype:
        raise TypeError(f"others must have x's dtype {x.dtype}, got {others.dtype}")
    if others.device != x.device:
        raise ValueError(f"others must be on x's device {x.device}, got {others.device}")
    if x.shape[-1] == 0:
        raise ValueError(f"x must have at least one channel, got shape {tuple(x.shape)}")
    if others.shape[-1] != x.shape[-1]:
        raise ValueError(f"others must have x's {x.shape[-1]} channels, got shape {tuple(others.shape)}")
    if len(counts) != len(sizes):
        raise ValueError(f"other_lengths must be for x's {len(sizes)} images, got {len(counts)}")
    for image, (tokens, count) in enumerate(zip(sizes, counts, strict=True)):
        if count == 0 and tokens > 0:
            raise ValueError(f"other_lengths must be 1 or more for image {image}, which has tokens, got 0")
    return counts


def _fake(args: Arguments) -> Tensor:
    return args.x.new_empty(prod(args.x.shape[:-1]), dtype=wide_dtype(args.x))


OP = define(
    "token_similarity",
    Arguments,
    Results,
    fake=_fake,
    backends=[
        triton_kernel(f"{__name__}.triton", "forward"),
        cpu_kernel("token_similarity_cpu"),
        Backend("chunked", chunked.forward),
        Backend("reference", reference),
    ],
)
