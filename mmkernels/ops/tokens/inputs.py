"""What the ops on visual tokens take: tokens of many images in one tensor, and sizes that the host knows.

Images are packed, ``x [tokens, C]`` with one (t, h, w) or one length an image; or all of one size,
``x [images, tokens, C]``. An output's shape follows from the sizes alone, so nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import SymInt, Tensor

from mmkernels.runtime.arguments import Sizes
from mmkernels.runtime.checks import check_floating, is_known

__all__ = ["Grid", "Images", "Lengths", "check_grid", "check_integers", "check_lengths", "check_rows", "check_sizes",
           "check_values", "check_window", "grid_as", "grid_sizes", "is_one", "lengths_as", "triples",
           "unpack"]  # fmt: skip

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
    each: int = 0
    """The length of each batched image, which is known of no images too."""


def grid_sizes(grid: Grid) -> Sizes:
    """Returns the flat list of (t, h, w), as many as `grid` has. Raises as `check_grid`."""
    return check_integers("grid", grid, "(t, h, w) for each image", row=3)


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
    return Images(x.flatten(0, 1), sizes, True, x.shape[1]) if x.dim() == 3 else Images(x, sizes, False)


def check_sizes(x: Tensor, lengths: Lengths, name: str = "x", what: str = "lengths") -> Sizes:
    """Returns the length of each image, which may be 0. Raises as `check_grid`.

    Args:
        what: the argument that holds the lengths, for errors.
    """
    check_floating(name, x)
    one = isinstance(lengths, (int, SymInt, np.integer))
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


def is_one(given: Grid) -> bool:
    """Returns whether a grid was given as one (t, h, w), and not as a list of them."""
    if isinstance(given, Tensor):
        return given.dim() == 1 and len(given) > 0
    return len(given) > 0 and not _is_sequence(given[0])


def triples(sizes: Sizes) -> list[tuple[int, ...]]:
    """Returns the (t, h, w) of each image, of a flat list of them."""
    return [tuple(sizes[at : at + 3]) for at in range(0, len(sizes), 3)]


def grid_as(given: Grid, sizes: Sizes, each: bool = False) -> Grid:
    """Returns a flat list of (t, h, w) in the form of a grid that was given: a tensor, tuples, or one tuple.

    Args:
        each: one for each image, also where one was given for all.
    """
    rows, one = triples(sizes), is_one(given) and not each
    if isinstance(given, Tensor):
        grid = torch.tensor(rows, dtype=given.dtype, device=given.device).view(-1, 3)
        return grid[0] if one else grid
    return rows[0] if one else tuple(rows)


def lengths_as(given: Lengths, sizes: Sizes, each: int = 0) -> Lengths:
    """Returns lengths in the form of those that were given: a tensor, a tuple, or one number, `each` of no images."""
    if isinstance(given, Tensor):
        found = sizes if given.dim() else (sizes or (each,))[0]
        return torch.tensor(found, dtype=given.dtype, device=given.device)
    return (sizes or (each,))[0] if isinstance(given, (int, SymInt, np.integer)) else tuple(sizes)


def unpack(y: Tensor, x: Tensor, each: int | None = None) -> Tensor:
    """Returns what belongs to tokens of x's images, ``[tokens', ...]``, in the form in which x was given.

    Args:
        each: the tokens' of an image, where x may have no images; None: as many as x has.
    """
    if x.dim() == 2:
        return y
    rows = y.shape[0] // x.shape[0] if x.shape[0] else x.shape[1] if each is None else each
    return y.view(x.shape[0], rows, *y.shape[1:])


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


def check_integers(name: str, values: object, must: str, least: int = 1, row: int = 0) -> Sizes:
    """Returns integers of at least `least`, of a tensor or a sequence, as a flat tuple.

    Args:
        must: what they must be, for the error.
        row: they are one row of so many integers, or several rows; 0: they are not in rows.
    """
    tensor = type(values) is not tuple and isinstance(values, Tensor)
    flat = _flat_tensor(name, values, must, row) if tensor else _flat(name, values, must, row)
    for at, number in enumerate(flat):
        if type(number) is not int and (isinstance(number, bool) or not isinstance(number, (int, SymInt))):
            if not isinstance(number, np.integer):
                raise TypeError(f"{name} must be integers, {must}, got {type(number).__name__}")
            flat[at] = number = int(number)
        if is_known(number < least):
            raise ValueError(f"{name} must be {least} or more, got {number}")
    return tuple(flat)


def _flat(name: str, values: object, must: str, row: int) -> list[int]:
    """Returns what a sequence holds, or the rows that it holds; raises where rows are of another length than `row`."""
    if type(values) is not tuple and not _is_sequence(values):
        several = "a sequence of integers" if isinstance(values, int) else "integers"
        raise TypeError(f"{name} must be {several}, {must}, got {type(values).__name__}")
    assert isinstance(values, Sequence)
    if not (row and len(values) and _is_sequence(values[0])):
        if row and len(values) not in (0, row):
            raise ValueError(f"{name} must be {must}, got {len(values)} numbers")
        return list(values)
    flat: list[int] = []
    for value in values:
        if not _is_sequence(value) or len(value) != row:
            raise ValueError(f"{name} must be {must}, got {tuple(value) if _is_sequence(value) else value}")
        flat.extend(value)
    return flat


def _flat_tensor(name: str, values: Any, must: str, row: int) -> list[int]:
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise TypeError(f"{name} must be integers, {must}, got {values.dtype}")
    if values.dim() > (2 if row else 1) or (row and values.numel() and values.shape[-1:] != (row,)):
        raise ValueError(f"{name} must be {must}, got shape {tuple(values.shape)}")
    flat: list[int] = values.flatten().tolist()
    return flat


def _is_sequence(values: object) -> bool:
    kind = type(values)  # a look at the type is the cheapest check
    return kind is tuple or kind is list or (isinstance(values, Sequence) and kind is not str)
