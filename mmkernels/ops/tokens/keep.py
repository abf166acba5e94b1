"""How many tokens of each image are kept, and in how many rounds bipartite matching gets there."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from torch import SymInt, Tensor

from mmkernels.ops.common.dtypes import wide_dtype
from mmkernels.ops.tokens.inputs import Lengths, check_integers
from mmkernels.runtime.arguments import Sizes
from mmkernels.runtime.checks import can_look, check_tensor

__all__ = ["Keep", "Round", "check_keep", "check_protect", "check_token_sizes", "rounds_of", "sides"]

Keep = Lengths | float
"""How many tokens of each image are kept: a number for all images, one for each, or a share of each image's tokens."""


class Round(NamedTuple):
    """One matching of the tokens that are left."""

    lengths: Sizes
    """The tokens of each image before it."""
    merges: Sizes
    """How many of them are merged into others."""


def check_protect(protect: object) -> int:
    """Returns how many tokens at the front of each image take no part."""
    if isinstance(protect, bool) or not isinstance(protect, (int, SymInt)):
        kind = type(protect).__name__
        raise TypeError(f"protect must be an integer, the tokens at the front of each image, got {kind}")
    if protect < 0:
        raise ValueError(f"protect must be 0 or more, got {protect}")
    return protect  # type: ignore[return-value]  # a graph may have a symbol


def check_keep(keep: Keep, lengths: Sizes, protect: int, batched: bool) -> Sizes:
    """Returns how many tokens each image keeps.

    Args:
        lengths: the tokens of each image.
        protect: how many at the front of each take no part.
        batched: the images are of one size, before and after.

    Raises:
        TypeError: keep is neither a number nor integers.
        ValueError: keep is for another number of images, or asks for more tokens than there are, or for fewer than the
            protected ones and one more.
    """
    if isinstance(keep, float):
        if not 0.0 < keep <= 1.0:
            raise ValueError(f"keep must be above 0 and at most 1 as a share of each image's tokens, got {keep}")
        return tuple(max(min(n, protect + 1), math.ceil(keep * n)) for n in lengths)
    one = isinstance(keep, (int, SymInt)) and not isinstance(keep, bool)
    kept = check_integers("keep", (keep,) if one else keep, "the tokens to keep of each image, or a share", 0)
    kept = kept * len(lengths) if one else kept
    if len(kept) != len(lengths):
        raise ValueError(f"keep must be for {len(lengths)} images, got {len(kept)} numbers")
    for image, (n, count) in enumerate(zip(lengths, kept, strict=True)):
        least = min(n, protect + 1)
        if not least <= count <= n:
            raise ValueError(f"keep must be from {least} to {n} for image {image} of {n} tokens, got {count}")
        if batched and count != kept[0]:
            raise ValueError(f"keep must be the same for all images of [images, tokens, C], got {kept[0]} and {count}")
    return kept


def check_token_sizes(sizes: Tensor, x: Tensor, name: str = "x") -> Tensor:
    """Returns the sizes of all tokens, [N].

    Args:
        x: [tokens, C] or [images, tokens, C], for the error called `name`.

    Raises:
        TypeError: sizes is not a tensor in x's wide dtype.
        ValueError: it has another shape or device than x's tokens, or a size is not above 0, where that can be seen.
    """
    check_tensor("sizes", sizes)
    if sizes.dtype != wide_dtype(x):
        raise TypeError(f"sizes must be {wide_dtype(x)} beside {name} in {x.dtype}, got {sizes.dtype}")
    if sizes.shape != x.shape[:-1]:
        raise ValueError(f"sizes must be {list(x.shape[:-1])}, one for each token, got shape {tuple(sizes.shape)}")
    if sizes.device != x.device:
        raise ValueError(f"sizes must be on {name}'s device {x.device}, got {sizes.device}")
    if sizes.is_cpu and can_look(sizes) and sizes.numel() and not float(least := sizes.detach().min()) > 0.0:
        raise ValueError(f"sizes must be above 0, got {float(least)}")
    return sizes.flatten()


def sides(length: int, protect: int) -> tuple[int, int]:
    """Returns how many tokens of an image may merge away, those at even places, and into how many, at odd ones."""
    return (length + 1) // 2 - (protect + 1) // 2, length // 2 - protect // 2


def rounds_of(lengths: Sizes, kept: Sizes, protect: int) -> Iterator[Round]:
    """Each round merges as many tokens as there are too many, at most all that may merge away."""
    while any(n > count for n, count in zip(lengths, kept, strict=True)):
        merges = tuple(
            min(n - count, sides(n, protect)[0]) if n > count else 0 for n, count in zip(lengths, kept, strict=True)
        )
        yield Round(lengths, merges)
        lengths = tuple(n - count for n, count in zip(lengths, merges, strict=True))
