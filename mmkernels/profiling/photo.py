"""The photograph of a profile: crops of it that serve as several images, and what a reducer leaves of one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

_PATCH = 24  # pixels in a picture
_GREY, _CONTRAST = 215, 0.12  # of dropped patches: a light grey, through which the photograph just shows


def default_photo() -> Path:
    """Returns the path of a photograph that matplotlib ships."""
    import matplotlib

    return Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"


def crops(photo: Image.Image, count: int) -> list[Image.Image]:
    """Returns `count` different square parts: the middle, then overlapping squares on a grid, row by row."""
    width, height = photo.size
    side = min(width, height)
    boxes = [((width - side) // 2, (height - side) // 2, side)]
    across = max(2, math.ceil(math.sqrt(count - 1)))  # squares in each direction, overlapping
    part = max(1, round(side * 2 / (across + 1)))
    for i in range(count - 1):
        row, column = divmod(i, across)
        boxes.append(((width - part) * column // (across - 1), (height - part) * row // (across - 1), part))
    return [photo.crop((left, top, left + size, top + size)) for left, top, size in boxes]


def paint(image: Image.Image, about: Mapping[str, Any]) -> np.ndarray:
    """Returns what a reducer leaves of a square image, uint8 ``[height, width, 3]``.

    A patch with a token of its own is as it was, patches in one token are in their mean colour, with lines between
    tokens, and those that were dropped are grey.
    """
    rows, columns = about["rows"], about["columns"]
    pixels = np.asarray(image.convert("RGB").resize((columns * _PATCH, rows * _PATCH)), dtype=np.float64)
    if about["token_of"] is None:
        return pixels.astype(np.uint8)
    token_of = np.asarray(about["token_of"]).reshape(rows, columns)
    patches = pixels.reshape(rows, _PATCH, columns, _PATCH, 3).swapaxes(1, 2)  # [rows, columns, cell, cell, 3]
    painted = patches.copy()
    for token in np.unique(token_of):
        of_token = token_of == token
        if token < 0:
            painted[of_token] = _GREY + _CONTRAST * (patches[of_token].mean(-1, keepdims=True) - 128)
        elif of_token.sum() > 1:
            painted[of_token] = patches[of_token].mean((0, 1, 2))
    picture = painted.swapaxes(1, 2).reshape(pixels.shape)
    _draw_lines(picture, token_of)
    return picture.clip(0, 255).astype(np.uint8)


def _draw_lines(picture: np.ndarray, token_of: np.ndarray) -> None:
    """Draws a white line between neighbours in different tokens, where one of them has several patches."""
    tokens, counts = np.unique(token_of, return_counts=True)
    shared = np.isin(token_of, tokens[(counts > 1) & (tokens >= 0)])
    for axis in (0, 1):
        first, second = (np.delete(token_of, at, axis) for at in (-1, 0))
        line = (first != second) & (np.delete(shared, -1, axis) | np.delete(shared, 0, axis))
        for row, column in np.argwhere(line):
            y, x = row * _PATCH, column * _PATCH
            if axis == 0:
                picture[y + _PATCH - 1 : y + _PATCH + 1, x : x + _PATCH] = 255
            else:
                picture[y : y + _PATCH, x + _PATCH - 1 : x + _PATCH + 1] = 255
