"""The tiles of a DeepSeek-VL2: how an image is cut, and where the tokens of its tiles stand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from mmkernels.models.blocks.images import load_image
from mmkernels.nn.checks import check_positive
from mmkernels.runtime.checks import check_bool

if TYPE_CHECKING:
    from PIL.Image import Image

    from mmkernels.models.deepseek_vl2_config import DeepSeekVL2Config

MOST_CUT = 2
"""Of a prompt with more images none is cut: each is seen as a whole, twice (the paper, section 3.1)."""
_GREY = 127  # of 255: what an image is padded with, 0 after the normalisation

Tiles = tuple[int, int]
"""How many tiles lie side by side in an image, and how many below each other."""


def candidate_resolutions(side: int = 384, most: int = 9) -> tuple[tuple[int, int], ...]:
    """Returns the sizes (width, height), in pixels, that an image may be brought to: all of at most so many tiles.

    Args:
        side: of a tile, in pixels.
        most: the most tiles of an image, without the one that shows it as a whole.

    Source: Wu et al., "DeepSeek-VL2", 2024, section 3.1: ``C_R = {(m 384, n 384) | 1 <= m, n, m n <= 9}``.

    Example:
        >>> candidate_resolutions(most=3)
        ((384, 384), (384, 768), (768, 384), (384, 1152), (1152, 384))
    """
    sizes = [(m, n) for m in range(1, most + 1) for n in range(1, most // m + 1)]
    sizes.sort(key=lambda size: (size[0] * size[1], size))
    return tuple((m * side, n * side) for m, n in sizes)


def best_resolution(size: tuple[int, int], candidates: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Returns which of several sizes shows an image best.

    That is the one at which most of its pixels are kept, when it is scaled to fit in; of several such sizes the one
    that leaves the fewest pixels empty, and of these the first.

    Args:
        size: width and height of the image, in pixels.
        candidates: widths and heights.

    Raises:
        ValueError: there is no candidate, or a size is not positive.

    Source: Wu et al., "DeepSeek-VL2", 2024, section 3.1; Liu et al., "LLaVA-NeXT", 2024, for the rule.

    Example:
        >>> best_resolution((800, 400), [(384, 384), (768, 384), (384, 768)])
        (768, 384)
    """
    if not candidates:
        raise ValueError("candidates must have at least one size, got none")
    for name, side in (("width", size[0]), ("height", size[1])):
        check_positive(name, side)

    def rank(candidate: tuple[int, int]) -> tuple[int, int]:
        scale = min(candidate[0] / size[0], candidate[1] / size[1])
        kept = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
        return kept, kept - candidate[0] * candidate[1]

    return max(candidates, key=rank)


class TiledImages(NamedTuple):
    """Images as `DeepSeekVL2` takes them: ``model(ids, images.pixel_values, tiles=images.tiles)``.

    Attributes:
        pixel_values: float32 ``[T, 3, side, side]``; of each image the whole of it first, then its tiles, row by row.
        tiles: of each image.
    """

    pixel_values: Tensor
    tiles: tuple[Tiles, ...]


def cut_images(
    images: Sequence[Image | str | Path], config: DeepSeekVL2Config, *, cut: bool | None = None
) -> TiledImages:
    """Returns images as a `DeepSeekVL2` sees them: as a whole, and cut into tiles.

    An image is scaled to fit into the best of the configuration's sizes, and into one tile as a whole; what it does not
    cover is grey. Values are from -1 to 1.

    Args:
        images: RGB images, or paths of files.
        config: of the model.
        cut: whether images are cut; if not, each has one tile beside the one of the whole. None: up to two images are.

    Raises:
        TypeError: `images` is not a list, or what it holds is no image. ValueError: there is no image, or one is not
            RGB. FileNotFoundError, ImageError: as `load_image`.

    Source: Wu et al., "DeepSeek-VL2", 2024, section 3.1, figure 3.

    Example:
        >>> from PIL import Image
        >>> from mmkernels.models import DeepSeekVL2
        >>> config = DeepSeekVL2.sizes["deepseek_vl2_small"]
        >>> found = cut_images([Image.new("RGB", (760, 380))], config)
        >>> found.tiles, tuple(found.pixel_values.shape)
        (((2, 1),), (3, 3, 384, 384))
    """
    if not isinstance(images, list | tuple):
        raise TypeError(f"images must be a list of images or paths, got {type(images).__name__}")
    if cut is not None:
        check_bool("cut", cut)
    if not images:
        raise ValueError("images must have at least one image, got none")
    from PIL import Image as pictures

    side = config.image_size
    if config.channels != 3:
        raise ValueError(f"config must be of a model of RGB images, got {config.channels} channels")
    sizes = config.candidate_resolutions if (len(images) <= MOST_CUT if cut is None else cut) else ((side, side),)
    found, tiles = [], []
    for number, given in enumerate(images):
        image = load_image(given) if isinstance(given, str | Path) else given
        if not isinstance(image, pictures.Image):
            raise TypeError(f"images must be images or paths, got {type(image).__name__} for image {number}")
        if image.mode != "RGB":
            raise ValueError(f"images must be RGB, got mode {image.mode} for image {number}")
        width, height = best_resolution(image.size, sizes)
        tiles.append((width // side, height // side))
        found.append(_pixels(image, side, side)[None])
        rows = _pixels(image, width, height).unflatten(2, (-1, side)).unflatten(1, (-1, side))
        found.append(rows.permute(1, 3, 0, 2, 4).flatten(0, 1))  # [rows * columns, 3, side, side]
    return TiledImages(torch.cat(found), tuple(tiles))


def _pixels(image: Image, width: int, height: int) -> Tensor:
    """Returns an image of this size, with grey around it, float32 ``[3, height, width]``."""
    import numpy as np
    from PIL import Image as images
    from PIL import ImageOps

    padded = ImageOps.pad(image, (width, height), method=images.Resampling.BICUBIC, color=(_GREY,) * 3)
    values = torch.from_numpy(np.array(padded)).permute(2, 0, 1)
    return (values.float() / 255 - 0.5) / 0.5


class Layout(NamedTuple):
    """Where the tokens of images stand among all of their tokens, which are newlines elsewhere.

    Attributes:
        places: of each token of the tiles, tile after tile, and behind these of each image's separator.
        lengths: how many tokens each image has.
    """

    places: tuple[int, ...]
    lengths: tuple[int, ...]


def is_tiles(pair: object) -> bool:
    """Whether this is a pair (columns, rows) of positive integers."""
    return isinstance(pair, list | tuple) and len(pair) == 2 and all(type(n) is int and n > 0 for n in pair)


def num_tokens(tiles: Tiles, side: int) -> int:
    """Returns how many tokens an image has, those that end its rows and its view as a whole included.

    Args:
        tiles: of the image.
        side: of a tile, in tokens.

    Example:
        >>> num_tokens((1, 1), 14), num_tokens((3, 3), 14)
        (421, 2017)
    """
    if not is_tiles(tiles):
        raise ValueError(f"tiles must be a pair (columns, rows) of positive integers, got {tiles!r}")
    columns, rows = tiles
    return side * (side + 1) + 1 + rows * side * (columns * side + 1)


def layout(tiles: tuple[Tiles, ...], side: int, whole_first: bool = True) -> Layout:
    """Returns where the tokens of images stand, computed on the host.

    An image's tokens are the rows of the view as a whole, a separator, and the rows of all tiles together, each across
    all tiles that lie side by side. A newline ends each row.

    Args:
        tiles: of each image.
        side: of a tile, in tokens.
        whole_first: False: the rows of the tiles come first, then the separator.

    Source: Wu et al., "DeepSeek-VL2", 2024, section 3.2.

    Example:
        >>> layout(((2, 1),), side=1)  # the whole, newline, separator, a tile, another, newline
        Layout(places=(0, 3, 4, 2), lengths=(6,))
    """
    places: list[int] = []
    separators, lengths, start = [], [], 0
    for columns, rows in tiles:
        length, whole = num_tokens((columns, rows), side), side * (side + 1)
        of_tiles = length - 1 - whole
        places += _places(1, 1, side, start if whole_first else start + of_tiles + 1)
        places += _places(columns, rows, side, start + whole + 1 if whole_first else start)
        separators.append(start + (whole if whole_first else of_tiles))
        lengths.append(length)
        start += length
    return Layout((*places, *separators), tuple(lengths))


def _places(columns: int, rows: int, side: int, start: int) -> list[int]:
    """Returns the places of tiles' tokens, tile after tile, in rows of all columns that a newline ends."""
    width = columns * side + 1
    corners = [start + row * side * width + column * side for row in range(rows) for column in range(columns)]
    return [corner + row * width + column for corner in corners for row in range(side) for column in range(side)]
