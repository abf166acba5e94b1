"""The photograph of a profile, and crops of it that serve as several images."""

from __future__ import annotations

import math
from pathlib import Path

from PIL import Image


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
