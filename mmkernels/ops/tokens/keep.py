"""How many tokens of each image are kept, and in how many rounds bipartite matching gets there."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from torch import SymFloat, SymInt, Tensor

from mmkernels.ops.common.dtypes import wide_dtype
from mmkernels.ops.tokens.inputs import Images, Lengths, check_integers
from mmkernels.runtime.arguments import Sizes
from mmkernels.runtime.checks import as_float, can_look, check_tensor, is_traced

__all__ = [
    "Keep",
    "Round",
    "check_keep",
    "check_kept",
    "check_protect",
    "check_token_sizes",
    "rounds_of",
    "share_of",
    "sides",
]

_ROUNDING = 1e-9
"""So that 0.1 of 30 tokens are 3, although the float 0.1 is a little more than a tenth."""
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


def check_keep(keep: object, lengths: Sizes, *, least: int = 1, batched: bool = False, together: bool = False) -> Sizes:
    """Returns how many tokens each image keeps.

    Args:
        lengths: the tokens of each image; of all images together, with `together`.
        least: how many an image keeps at least, if it has so many.
        batched: the images are of one size, before and after.

    Raises:
        TypeError: keep is neither a number nor integers.
        ValueError: keep is for another number of images, or a number that these images can't keep.
    """
    traced = isinstance(keep, Tensor) and keep.dim() == 0 and is_traced()
    if traced or isinstance(keep, (float, SymFloat, np.floating)):
        share = as_float("keep", keep, "a share of the tokens")
        if not 0.0 < share <= 1.0:
            raise ValueError(f"keep must be above 0 and at most 1 as a share of the tokens, got {keep}")
        return share_of(share, lengths, least)
    must = "a number of tokens, or a share" if together else "a number of tokens, one for each image, or a share"
    if isinstance(keep, bool) or (together and not isinstance(keep, (int, SymInt, np.integer))):
        raise TypeError(f"keep must be {must}, got {type(keep).__name__}")
    one = isinstance(keep, (int, SymInt, np.integer))
    kept = check_integers("keep", (keep,) if one else keep, must, 0)
    if not one and len(kept) != len(lengths):
        raise ValueError(f"keep must be for {len(lengths)} images, got {len(kept)} numbers")
    kept = kept * len(lengths) if one else kept
    for image, (count, n) in enumerate(zip(kept, lengths, strict=True)):
        if not min(n, least) <= count <= n:
            of = f"{n} tokens" if together else f"image {image} of {n} tokens"
            raise ValueError(f"keep must be from {min(n, least)} to {n} for {of}, got {count}")
        if batched and count != kept[0]:
            raise ValueError(f"keep must be the same for all images of [images, tokens, C], got {kept[0]} and {count}")
    return kept


def check_kept(keep: object, images: Images, *, least: int = 1) -> tuple[Sizes, int]:
    """Returns how many tokens each image keeps, and how many each one does if they are batched, of no images too.

    Raises as `check_keep`.
    """
    sizes = images.sizes if images.sizes or not images.batched else (images.each,)
    kept = check_keep(keep, sizes, least=least, batched=images.batched)
    return kept[: len(images.sizes)], kept[0] if images.batched else 0


def share_of(share: float, lengths: Sizes, least: int = 1) -> Sizes:
    """Returns a share of each length, rounded up: at least `least`, or all if there are fewer."""
    return tuple(max(min(n, least), math.ceil(n * share - _ROUNDING)) for n in lengths)


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
