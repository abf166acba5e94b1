"""Reads image files and prepares pixel values."""

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
"""Larger images are refused before they are decoded. No photograph is so large; as RGB it would take 300 MB."""


class ImageError(ValueError):
    """A file cannot be read as an image; the message names the file and the reason."""


def load_image(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> Image:
    """Decodes an image file to RGB, rotated by its EXIF orientation, on a white background where it is transparent.

    Raises:
        FileNotFoundError: there is no such file.
        ImageError: the file is not an image, is truncated or corrupt, or has more than `max_pixels`. The number of
            pixels is read from the header, before anything is decoded.
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
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # max_pixels is checked below
            file = Image.open(path)
        if file.width * file.height > max_pixels:
            raise ImageError(f"{path}: must have at most {max_pixels} pixels, got {file.width} x {file.height}")
        image = ImageOps.exif_transpose(file)
        if image.has_transparency_data:  # on white, as in transformers
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
        if image.mode.startswith("I;16"):  # Pillow would clip the values instead of scaling them
            image = image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
        return image.convert("RGB")
    except UnidentifiedImageError as error:
        raise ImageError(f"{path}: must be an image, got a format that Pillow does not know") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"{path}: must have at most {max_pixels} pixels, got more: {error}") from error
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # on damaged files the decoders of Pillow raise almost any error
        raise ImageError(f"{path}: must be a whole image, got an error: {error}") from error


def load_images(paths: Sequence[str | Path], image_size: int, *, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Returns pixel values, float32 ``[N, 3, image_size, image_size]``, resized and normalised as in transformers.

    Args:
        paths: image files.
        image_size: the side of the model's images, in pixels.
        max_pixels: as in `load_image`.

    Raises:
        FileNotFoundError, ImageError: as `load_image`.
        ValueError: there is no path.
    """
    if not paths:
        raise ValueError("paths must name at least one image, got none")
    return to_pixels([load_image(path, max_pixels=max_pixels) for path in paths], image_size)


def to_pixels(images: Sequence[Image], image_size: int) -> Tensor:
    """Returns pixel values of RGB images, float32 ``[N, 3, image_size, image_size]``, prepared as in transformers."""
    try:
        from transformers import IdeficsImageProcessorPil
    except ImportError as error:
        raise ImportError("preparing images needs transformers: pip install mmkernels[models]") from error
    # With Pillow, not torchvision, the same file gives the same pixels on every machine.
    pixels: Any = IdeficsImageProcessorPil(image_size=image_size)(list(images), return_tensors="pt")
    return torch.as_tensor(pixels, dtype=torch.float32)
