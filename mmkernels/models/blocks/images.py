"""From image files to pixel values."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 100_000_000
"""Larger images are refused before they are decoded: above any photograph, below what fills memory (300 MB as RGB)."""


class ImageError(ValueError):
    """A file is no image that can be read; the message names it and says why."""


def load_image(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> Image:
    """Decode an image file to RGB, turned as its EXIF orientation says; what is transparent becomes white.

    Raises:
        FileNotFoundError: no such file.
        ImageError: the file is no image, is truncated or corrupt, or has more than `max_pixels` (a decompression bomb:
            checked in its header, before anything is decoded).
    """
    try:
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ImportError as error:
        raise ImportError("reading images needs Pillow: pip install mmkernels[models]") from error
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"image must be a file, got no such file: {path}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # max_pixels decides
            file = Image.open(path)
        if file.width * file.height > max_pixels:
            raise ImageError(f"{path}: must have at most {max_pixels} pixels, got {file.width} x {file.height}")
        image = ImageOps.exif_transpose(file)
        if image.has_transparency_data:  # on white, as transformers does it
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
        if image.mode.startswith("I;16"):  # Pillow would clip, not scale
            image = image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
        return image.convert("RGB")
    except UnidentifiedImageError as error:
        raise ImageError(f"{path}: must be an image, got a file that is none that Pillow knows") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"{path}: must have at most {max_pixels} pixels, got more: {error}") from error
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # on broken files Pillow's decoders raise almost anything
        raise ImageError(f"{path}: must be a whole image, got an error: {error}") from error


def load_images(paths: Sequence[str | Path], image_size: int, *, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Pixel values, float32 ``[N, 3, image_size, image_size]``: resized and normalised as transformers does.

    Args:
        paths: image files.
        image_size: pixels a side that the model takes.
        max_pixels: as in `load_image`.

    Raises:
        As `load_image`; ValueError: no path.
    """
    if not paths:
        raise ValueError("paths must name at least one image, got none")
    return to_pixels([load_image(path, max_pixels=max_pixels) for path in paths], image_size)


def to_pixels(images: Sequence[Image], image_size: int) -> Tensor:
    """Pixel values, float32 ``[N, 3, image_size, image_size]``, of RGB images: as transformers prepares them."""
    try:
        from transformers import IdeficsImageProcessorPil
    except ImportError as error:
        raise ImportError("preparing images needs transformers: pip install mmkernels[models]") from error
    # Pillow's resampling, not torchvision's, so that the same file gives the same pixels on every machine.
    pixels: Any = IdeficsImageProcessorPil(image_size=image_size)(list(images), return_tensors="pt")
    return torch.as_tensor(pixels, dtype=torch.float32)
