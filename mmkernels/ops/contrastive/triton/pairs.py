"""What the Triton contrastive kernels share: which pairs of a tile are positive, and which are visible.

The constant PAIRS says which pairs are positive:

    "none": no pair (hard texts without ids)
    "diagonal": text j and image j + `Sizes.diagonal`
    "code": a pair with equal `Codes`
    "hidden": as "diagonal", and other pairs with equal codes are hidden
"""

from __future__ import annotations

import triton
import triton.language as tl

_MOST = tl.constexpr(2**31 - 1)


@triton.jit
def load_codes(codes, at, sizes):
    """Returns the codes of a tile's images and texts; past the end codes that equal no other."""
    image = tl.load(codes.image + at.i, mask=at.i < sizes.end_row, other=-1)
    text = tl.load(codes.text + at.j, mask=at.j < sizes.columns, other=-2)
    return image, text


@triton.jit
def on_diagonal(at, sizes):
    """Returns which pairs [rows, columns] belong together by position."""
    return at.i[:, None] == (at.j + sizes.diagonal)[None, :]


@triton.jit
def crosses_diagonal(at, sizes):
    """Returns whether a tile has a pair on the diagonal."""
    first = at.first_column + sizes.diagonal
    return (at.first_row < first + at.j.shape[0]) & (first < at.first_row + at.i.shape[0])


@triton.jit
def codes_overlap(codes, at, sizes):
    """Returns whether a tile may have a pair with equal codes: whether the ranges of its codes overlap."""
    image, text = load_codes(codes, at, sizes)
    low = tl.min(tl.where(image < 0, _MOST, image), 0)
    text_low = tl.min(tl.where(text < 0, _MOST, text), 0)
    return (low <= tl.max(text, 0)) & (text_low <= tl.max(image, 0))


@triton.jit
def may_have_positives(codes, at, sizes, PAIRS: tl.constexpr):
    """Returns whether a tile may have a positive pair."""
    near = at.first_row < 0
    if PAIRS == "code":
        near = codes_overlap(codes, at, sizes)
    elif PAIRS != "none":
        near = crosses_diagonal(at, sizes)
    return near


@triton.jit
def positive_pairs(codes, at, sizes, PAIRS: tl.constexpr):
    """Returns which pairs [rows, columns] are positive."""
    if PAIRS == "code":
        image, text = load_codes(codes, at, sizes)
        positive = image[:, None] == text[None, :]
    else:
        positive = on_diagonal(at, sizes)
    return positive


@triton.jit
def has_hidden_pairs(codes, at, sizes):
    """Returns whether ids hide a pair of a tile."""
    hides = codes_overlap(codes, at, sizes)
    if hides:
        image, text = load_codes(codes, at, sizes)
        hidden = (image[:, None] == text[None, :]) & (at.i[:, None] != (at.j + sizes.diagonal)[None, :])
        hides = tl.max(tl.max(hidden.to(tl.int32), 1), 0) > 0
    return hides


@triton.jit
def is_ragged(at, sizes):
    """Returns whether some rows or columns of a tile lie past the end."""
    return (at.first_row + at.i.shape[0] > sizes.end_row) | (at.first_column + at.j.shape[0] > sizes.columns)


@triton.jit
def visible_pairs(codes, at, sizes, PAIRS: tl.constexpr):
    """Returns which pairs [rows, columns] are neither past the end nor hidden."""
    visible = (at.i < sizes.end_row)[:, None] & (at.j < sizes.columns)[None, :]
    if PAIRS == "hidden":
        image, text = load_codes(codes, at, sizes)
        visible = visible & ((image[:, None] != text[None, :]) | on_diagonal(at, sizes))
    return visible


@triton.jit
def fill_invisible(x, codes, at, sizes, fill: tl.constexpr, PAIRS: tl.constexpr):
    """Returns x [rows, columns] with `fill` in place of the pairs that are not visible."""
    masked = is_ragged(at, sizes)
    if PAIRS == "hidden":
        masked = masked | codes_overlap(codes, at, sizes)
    if masked:
        x = tl.where(visible_pairs(codes, at, sizes, PAIRS), x, fill)
    return x
