"""Reads image files and prepares pixel values."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmkernels.transformers_version import import_transformers

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 100_000_000
"""Larger images are refused before they are decoded. No photograph is so large; as RGB it would take 300 MB."""


class ImageError(ValueError):
    """A file cannot be read as an image; the message names the file and the reason."""


def load_image(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> Image:
    """Decodes an image file to RGB, rotated by its EXIF orientation, on a white background where it is transparent.

    Of an animation or a file of several pages, this is the first picture. Grey values of more than 8 bits are scaled to
    8: 0 becomes black, and white is

    - of 16-bit integers, 65,535 (of 12-bit TIFFs 4,095), whatever values the picture has;
    - of 32-bit integers, 255 if no value is above it, else 65,535;
    - of floats, 1 if no value is above it, else 255.

    A picture with values outside of these ranges, with NaN, or of signed integers of 8 or 16 bits, is refused: its
    scale is not known.

    Raises:
        FileNotFoundError: there is no such file.
        ImageError: the file is not an image, is truncated or corrupt, has values on an unknown scale, or has more than
            `max_pixels`. The number of pixels is read from the header, before anything is decoded.
    """
    try:
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ImportError as error:
        raise ImportError('reading images needs Pillow: pip install "mmkernels[models]"') from error
    path = Path(path).expanduser()
    if path.is_dir():
        raise ImageError(f"{path}: must be an image, got a folder")
    if not path.exists():
        raise FileNotFoundError(f"image must be a file, got no such file: {path}")
    try:
        # From a stream: Pillow 13 maps an uncompressed TIFF that it has the name of by the size after its rotation.
        with path.open("rb") as stream, warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # max_pixels is checked below
            file = Image.open(stream)
            if file.width * file.height > max_pixels:
                raise ImageError(f"{path}: must have at most {max_pixels} pixels, got {file.width} x {file.height}")
            _refuse_signed(file, path)
            _correct_transparency(file, path)
            image = ImageOps.exif_transpose(file)
            if image.mode == "F" or image.mode.startswith("I"):  # Pillow would clip the values instead of scaling them
                return _scaled(image, file, path).convert("RGB")
            if image.has_transparency_data:  # on white, as transformers does from 5.21 on; before, it drops the alpha
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
            return image.convert("RGB")
    except UnidentifiedImageError as error:
        got = "a format that Pillow does not know" if path.stat().st_size else "an empty file"
        raise ImageError(f"{path}: must be an image, got {got}") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"{path}: must have at most {max_pixels} pixels, got more: {error}") from error
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # on damaged files the decoders of Pillow raise almost any error
        raise ImageError(f"{path}: must be a whole image, got an error: {error}") from error


def _refuse_signed(file: Any, path: Path) -> None:
    """Refuses a TIFF of signed integers of 8 or 16 bits: Pillow takes the former for unsigned ones."""
    tags = getattr(file, "tag_v2", {})
    if tags.get(_SAMPLE_FORMAT, (1,))[0] == 2 and tags.get(_BITS, (1,))[0] <= 16:
        raise ImageError(f"{path}: integers must be unsigned or of 32 bits, got signed ones of {tags[_BITS][0]} bits")


_FACTORS = {"L;2": 85, "L;4": 17}  # Pillow's raw modes of grey PNGs -> what it multiplies their values by


def _correct_transparency(file: Any, path: Path) -> None:
    """Gives a PNG's transparent colour the scale of its pixels: Pillow scales the pixels alone."""
    clear = file.info.get("transparency")
    if file.format != "PNG" or clear is None or not file.tile:
        return
    raw = file.tile[0][3]
    if raw in _FACTORS:
        file.info["transparency"] = clear * _FACTORS[raw]
    elif raw == "RGB;16B":
        raise ImageError(f"{path}: a PNG of 16-bit colours must have no transparent colour, got {clear}")


_WHITES = {"I": (255, 65535), "F": (1, 255)}
"""Which values of 32 bits may be white."""
_SIXTEEN_BITS = ("PNG", "PPM")  # formats whose integers of more than 8 bits have 16, also where Pillow says 32
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # tags of TIFF


def _scaled(image: Image, file: Any, path: Path) -> Image:
    """Returns a grey image of wider values in 8 bits, by the rules of `load_image`.

    Args:
        image: the decoded image, in mode "F", "I" or "I;16*".
        file: the image as opened, which knows the format and its tags.
        path: for errors.
    """
    import numpy as np
    from PIL import Image

    tags = getattr(file, "tag_v2", {})
    values = np.asarray(image)
    if image.mode.startswith("I;16") or (image.mode == "I" and file.format in _SIXTEEN_BITS):
        white = 2 ** tags.get(_BITS, (16,))[0] - 1
    else:
        low, high = values.min(), values.max()
        fitting = [white for white in _WHITES[image.mode] if low >= 0 and high <= white]  # NaN fits nowhere
        if not fitting:
            must = " or ".join(f"0 to {white}" for white in _WHITES[image.mode])
            kind = "floats" if image.mode == "F" else "32-bit integers"
            raise ImageError(f"{path}: {kind} must be from {must}, got values from {low:g} to {high:g}")
        white = fitting[0]
    shares = values.astype(np.float32) / np.float32(white)
    if tags.get(_PHOTOMETRIC) == 0:  # white is 0; Pillow inverts only values of at most 8 bits
        shares = 1 - shares
    if (clear := file.info.get("transparency")) is not None:
        shares[values == clear] = 1
    return Image.fromarray(np.rint(shares * 255).astype(np.uint8))


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
    processor_class = import_transformers("preparing images").IdeficsImageProcessorPil
    # With Pillow, not torchvision, the same file gives the same pixels on every machine.
    pixels: Any = processor_class(image_size=image_size)(list(images), return_tensors="pt")
    return torch.as_tensor(pixels, dtype=torch.float32)
