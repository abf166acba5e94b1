"""The photograph of a profile: crops of it that serve as several images, and what a reducer leaves of one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

_PATCH, _LARGE = (
    24,
    480,
)  # pixels in a picture: of a patch at least, of the longer side, unless the photograph is smaller
_GREY, _CONTRAST = 215, 0.12  # of dropped patches: a light grey, through which the photograph just shows


def default_photo() -> Path:
    """Returns the path of a photograph that matplotlib ships."""
    import matplotlib

    return Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"


def crops(photo: Image.Image, count: int, *, square: bool = True) -> list[Image.Image]:
    """Returns `count` different parts: the middle, then overlapping smaller ones on a grid, row by row.

    Args:
        photo: the photograph.
        count: of parts.
        square: whether they are squares; else they have the photograph's shape, and the first is all of it.
    """
    width, height = photo.size
    across_part, down_part = (min(width, height),) * 2 if square else (width, height)
    boxes = [((width - across_part) // 2, (height - down_part) // 2, across_part, down_part)]
    across = max(2, math.ceil(math.sqrt(count - 1)))  # parts in each direction, overlapping
    across_part, down_part = (max(1, round(side * 2 / (across + 1))) for side in (across_part, down_part))
    for i in range(count - 1):
        row, column = divmod(i, across)
        left, top = (width - across_part) * column // (across - 1), (height - down_part) * row // (across - 1)
        boxes.append((left, top, across_part, down_part))
    return [photo.crop((left, top, left + right, top + down)) for left, top, right, down in boxes]


def paint(image: Image.Image, about: Mapping[str, Any]) -> np.ndarray:
    """Returns what a reducer leaves of an image, uint8 ``[height, width, 3]``.

    A patch with a token of its own is as it was, patches in one token are in their mean colour, with lines between
    tokens, and those that were dropped are grey.
    """
    rows, columns = about["rows"], about["columns"]
    side = max(_PATCH, min(_LARGE, max(image.size)) // max(rows, columns))
    pixels = np.asarray(image.convert("RGB").resize((columns * side, rows * side)), dtype=np.float64)
    if about["token_of"] is None:
        return pixels.astype(np.uint8)
    token_of = np.asarray(about["token_of"]).reshape(rows, columns)
    patches = pixels.reshape(rows, side, columns, side, 3).swapaxes(1, 2)  # [rows, columns, cell, cell, 3]
    painted = patches.copy()
    for token in np.unique(token_of):
        of_token = token_of == token
        if token < 0:
            painted[of_token] = _GREY + _CONTRAST * (patches[of_token].mean(-1, keepdims=True) - 128)
        elif of_token.sum() > 1:
            painted[of_token] = patches[of_token].mean((0, 1, 2))
    picture = painted.swapaxes(1, 2).reshape(pixels.shape)
    _draw_lines(picture, token_of, side)
    return picture.clip(0, 255).astype(np.uint8)


def _draw_lines(picture: np.ndarray, token_of: np.ndarray, side: int) -> None:
    """Draws a white line between neighbours in different tokens, where one of them has several patches.

    Args:
        picture: is drawn into.
        token_of: ``[rows, columns]``.
        side: of a patch in the picture, in pixels.
    """
    tokens, counts = np.unique(token_of, return_counts=True)
    shared = np.isin(token_of, tokens[(counts > 1) & (tokens >= 0)])
    for axis in (0, 1):
        first, second = (np.delete(token_of, at, axis) for at in (-1, 0))
        line = (first != second) & (np.delete(shared, -1, axis) | np.delete(shared, 0, axis))
        for row, column in np.argwhere(line):
            y, x = row * side, column * side
            if axis == 0:
                picture[y + side - 1 : y + side + 1, x : x + side] = 255
            else:
                picture[y : y + side, x + side - 1 : x + side + 1] = 255
