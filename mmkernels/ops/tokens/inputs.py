"""What the ops on visual tokens take: tokens of many images in one tensor, and sizes that the host knows.

Images are packed, ``x [tokens, C]`` with one (t, h, w) or one length an image; or all of one size,
``x [images, tokens, C]``. An output's shape follows from the sizes alone, so nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import SymInt, Tensor

from mmkernels.runtime.arguments import Sizes
from mmkernels.runtime.checks import check_floating

__all__ = ["Grid", "Images", "Lengths", "check_grid", "check_integers", "check_lengths", "check_rows", "check_sizes",
           "check_values", "check_window", "grid_as", "grid_sizes", "lengths_as", "unpack"]  # fmt: skip

Grid = Tensor | Sequence[Sequence[int]] | Sequence[int]
"""(t, h, w) of each image: integers ``[images, 3]``, or one (t, h, w) for all images of ``x [images, t*h*w, C]``."""
Lengths = Tensor | Sequence[int] | int
"""The tokens of each image: integers ``[images]``, or one number for all images of ``x [images, tokens, C]``."""


class Images(NamedTuple):
    """Tokens of images, packed."""

    x: Tensor
    """``[tokens, C]``: a view of what was given."""
    sizes: Sizes
    """The length of each image."""
    batched: bool
    """Whether ``x`` was given as ``[images, tokens, C]``, so that results have this form too."""


def grid_sizes(grid: Grid) -> Sizes:
    """Returns the flat list of (t, h, w), as many as `grid` has. Raises as `check_grid`."""
    sizes = check_integers("grid", grid, "(t, h, w) for each image")
    if len(sizes) % 3:
        raise ValueError(f"grid must be (t, h, w) for each image, got {len(sizes)} numbers")
    return sizes


def check_grid(x: Tensor, grid: Grid, name: str = "x", protect: int = 0) -> Sizes:
    """Returns the flat list of (t, h, w) of all images.

    Args:
        protect: tokens at the front of each image that its grid does not count.

    Raises:
        TypeError: x is not a floating tensor, or grid holds no integers.
        ValueError: x has another shape than `Grid` says, or the grid does not match its tokens.
    """
    check_floating(name, x)
    sizes = grid_sizes(grid)
    if x.dim() == 3 and len(sizes) == 3:
        sizes = sizes * x.shape[0]
    if x.dim() == 3 and x.shape[0] == 0:
        raise ValueError(f"{name} must have an image or more as [images, tokens, C], got shape {tuple(x.shape)}")
    what = f"grid with {protect} protected tokens an image" if protect else "grid"
    _check_tokens(name, x, [prod(sizes[at : at + 3]) + protect for at in range(0, len(sizes), 3)], what)
    return sizes


def check_window(window: Sequence[int]) -> Sizes:
    """Returns a window's (t, h, w)."""
    sizes = check_integers("window", window, "(t, h, w)")
    if len(sizes) != 3:
        raise ValueError(f"window must be (t, h, w), got {len(sizes)} numbers")
    return sizes


def check_lengths(x: Tensor, lengths: Lengths, name: str = "x") -> Images:
    """Returns the tokens packed, with the length of each image, which may be 0. Raises as `check_grid`."""
    sizes = check_sizes(x, lengths, name)
    return Images(x.flatten(0, 1), sizes, True) if x.dim() == 3 else Images(x, sizes, False)


def check_sizes(x: Tensor, lengths: Lengths, name: str = "x", what: str = "lengths") -> Sizes:
    """Returns the length of each image, which may be 0. Raises as `check_grid`.

    Args:
        what: the argument that holds the lengths, for errors.
    """
    check_floating(name, x)
    one = isinstance(lengths, (int, SymInt))
    sizes = check_integers(what, (lengths,) if one else lengths, "the tokens of each image", 0)
    if x.dim() == 3 and len(sizes) == 1:
        sizes = sizes * x.shape[0]
    _check_tokens(name, x, list(sizes), what)
    return sizes


def check_values(name: str, values: Tensor, x: Tensor) -> None:
    """Checks floats, one for each token of x, such as scores.

    Raises:
        TypeError: they are not a floating tensor. ValueError: they have another shape or device than x's tokens.
    """
    check_floating(name, values)
    if values.shape != x.shape[:-1]:
        raise ValueError(f"{name} must be {list(x.shape[:-1])}, one for each token, got shape {tuple(values.shape)}")
    _check_device(name, values, x)


def check_rows(name: str, rows: Tensor, x: Tensor) -> None:
    """Checks rows of any width, one for each token of x, such as a metric. Raises as `check_values`."""
    check_floating(name, rows)
    if rows.dim() != x.dim() or rows.shape[:-1] != x.shape[:-1]:
        must = ", ".join(map(str, (*x.shape[:-1], "D")))
        raise ValueError(f"{name} must be [{must}], a row for each token, got shape {tuple(rows.shape)}")
    _check_device(name, rows, x)


def _check_device(name: str, y: Tensor, x: Tensor) -> None:
    if not (y.is_cpu and x.is_cpu) and y.device != x.device:  # `is_cpu` is the quicker question
        raise ValueError(f"{name} must be on x's device {x.device}, got {y.device}")


def grid_as(given: Grid, sizes: Sizes) -> Grid:
    """Returns a flat list of (t, h, w) in the form of a grid that was given: a tensor, tuples, or one tuple."""
    rows = [tuple(sizes[at : at + 3]) for at in range(0, len(sizes), 3)]
    if isinstance(given, Tensor):
        return torch.tensor(rows if given.dim() == 2 else rows[0], dtype=given.dtype, device=given.device)
    return tuple(rows) if len(given) == 0 or isinstance(given[0], Sequence) else rows[0]


def lengths_as(given: Lengths, sizes: Sizes) -> Lengths:
    """Returns lengths in the form of those that were given: a tensor, a tuple, or one number."""
    if isinstance(given, Tensor):
        return torch.tensor(sizes if given.dim() else sizes[0], dtype=given.dtype, device=given.device)
    return sizes[0] if isinstance(given, (int, SymInt)) else tuple(sizes)


def unpack(y: Tensor, x: Tensor) -> Tensor:
    """Returns what belongs to tokens of x's images, ``[tokens', ...]``, in the form in which x was given."""
    return y.view(x.shape[0], y.shape[0] // max(1, x.shape[0]), *y.shape[1:]) if x.dim() == 3 else y


def _check_tokens(name: str, x: Tensor, tokens: list[int], what: str) -> None:
    if x.dim() == 3:
        for image, count in enumerate(tokens):
            if count != x.shape[1]:
                raise ValueError(f"{what} must match {name}'s {x.shape[1]} tokens an image, got {count} in {image}")
        if len(tokens) != x.shape[0]:
            raise ValueError(f"{what} must be for {name}'s {x.shape[0]} images, got {len(tokens)}")
    elif x.dim() != 2:
        raise ValueError(f"{name} must be [tokens, C] or [images, tokens, C], got shape {tuple(x.shape)}")
    elif sum(tokens) != x.shape[0]:
        raise ValueError(f"{what} must match {name}'s {x.shape[0]} tokens, got {sum(tokens)} in {len(tokens)} images")


def check_integers(name: str, values: object, must: str, least: int = 1) -> Sizes:
    """Returns integers of at least `least`, of a tensor or a sequence, as a flat tuple.

    Args:
        must: what they must be, for the error.
    """
    if type(values) is not tuple and isinstance(values, Tensor):
        if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
            raise TypeError(f"{name} must be integers, {must}, got {values.dtype}")
        if values.dim() > 2:
            raise ValueError(f"{name} must be {must}, got shape {tuple(values.shape)}")
        values = values.flatten().tolist()
    if type(values) is not tuple and (not isinstance(values, Sequence) or isinstance(values, str)):
        raise TypeError(f"{name} must be integers, {must}, got {type(values).__name__}")
    flat: list[int] = []
    for value in values:
        if type(value) is int:
            flat.append(value)
        elif isinstance(value, Sequence) and not isinstance(value, str):
            if name in ("grid", "size") and len(value) != 3:
                raise ValueError(f"{name} must be {must}, got {tuple(value)}")
            flat.extend(value)
        else:
            flat.append(value)
    for number in flat:
        if type(number) is not int and (isinstance(number, bool) or not isinstance(number, (int, SymInt))):
            raise TypeError(f"{name} must be integers, {must}, got {type(number).__name__}")
        if number < least:
            raise ValueError(f"{name} must be {least} or more, got {number}")
    return tuple(flat)
