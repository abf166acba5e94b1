"""Image files of every mode and format: the same picture, or an error that names the file and the reason."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from mmkernels.models.blocks.images import ImageError, load_image, load_images


def picture(width: int = 70, height: int = 50) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def encoded(form: str) -> bytes:
    buffer = io.BytesIO()
    picture().save(buffer, form)
    return buffer.getvalue()


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_truncated_images(tmp_path: Path, form: str) -> None:
    path = tmp_path / "image"
    content = encoded(form)
    path.write_bytes(content)
    assert load_image(path).size == (70, 50)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ImageError, match="image: must be a whole image, got an error"):
        load_image(path)


@pytest.mark.parametrize("content", [b"", b"no image at all", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"])
def test_files_that_are_not_images(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "image"
    path.write_bytes(content)
    with pytest.raises(ImageError, match="image: must be"):
        load_image(path)


def test_a_path_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    picture().save(tmp_path / "photo.png")
    assert load_image("~/photo.png").size == (70, 50)


def test_missing_images(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"got no such file: .*gone.jpg"):
        load_image(tmp_path / "gone.jpg")
    with pytest.raises(ImageError, match="must be an image, got a folder"):
        load_image(tmp_path)
    (tmp_path / "empty.png").touch()
    with pytest.raises(ImageError, match=r"empty.png: must be an image, got an empty file"):
        load_image(tmp_path / "empty.png")
    with pytest.raises(ValueError, match="paths must name at least one image, got none"):
        load_images([], 32)


def png(size: tuple[int, int], depth: int, colour: int, row: bytes = b"", transparent: bytes | None = None) -> bytes:
    """Returns a PNG file: of one row, or, without a row, a few bytes whose header gives a large size."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 0))
    clear = b"" if transparent is None else chunk(b"tRNS", transparent)
    content = chunk(b"IDAT", zlib.compress(b"\0" + row if row else b""))
    return b"\x89PNG\r\n\x1a\n" + header + clear + content + chunk(b"IEND", b"")


@pytest.mark.parametrize(("width", "height"), [(12_000, 12_000), (100_000, 100_000), (2**31 - 1, 2**31 - 1)])
def test_decompression_bombs(tmp_path: Path, width: int, height: int) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png((width, height), 8, 2))
    with pytest.raises(ImageError, match=r"bomb.png: must have at most 100000000 pixels, got"):
        load_image(path)
    picture().save(path)
    with pytest.raises(ImageError, match="must have at most 3499 pixels, got 70 x 50"):
        load_image(path, max_pixels=3499)
    assert load_image(path, max_pixels=3500).size == (70, 50)


def test_images_are_prepared_as_transformers_does(tmp_path: Path) -> None:
    from transformers import IdeficsImageProcessorPil

    palette, grey, rotated = tmp_path / "p.png", tmp_path / "g.png", tmp_path / "t.jpg"
    picture().convert("P").save(palette)
    picture().convert("L").save(grey)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    picture().save(rotated, exif=exif)
    pixels = load_images([palette, str(grey), rotated], 32)
    assert pixels.shape == (3, 3, 32, 32)
    assert pixels.dtype == torch.float32
    processor = IdeficsImageProcessorPil(image_size=32)
    expected = processor([Image.open(palette).convert("RGB")], return_tensors="pt")
    torch.testing.assert_close(pixels[:1], torch.as_tensor(expected))
    assert load_image(rotated).size == (50, 70)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_become_white_as_in_transformers(tmp_path: Path, mode: str) -> None:
    from transformers import IdeficsImageProcessorPil

    image = picture().convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    path = tmp_path / "transparent.png"
    if mode == "P":
        picture().convert("P").save(path, transparency=picture().convert("P").getpixel((0, 0)))
    else:
        image.convert(mode).save(path)
    processor = IdeficsImageProcessorPil(image_size=32)
    read = Image.open(path)
    on_white = Image.alpha_composite(Image.new("RGBA", read.size, "white"), read.convert("RGBA")).convert("RGB")
    expected = processor([on_white], return_tensors="pt")
    torch.testing.assert_close(load_images([path], 32), torch.as_tensor(expected))
    if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 21):  # it drops the alpha
        expected = processor([read.convert("RGB")], return_tensors="pt")
    torch.testing.assert_close(processor([read], return_tensors="pt"), expected)


RAMP = np.tile(np.linspace(0, 1, 140), (90, 1))
GREY = np.rint(RAMP * 255).astype(np.uint8)


def of_values(dtype: Any, white: float) -> Image.Image:
    return Image.fromarray((np.rint(RAMP * white) if white > 1 else RAMP).astype(dtype))


def in_mode(mode: str) -> Image.Image:
    """The ramp; a palette is one of greys."""
    grey = Image.fromarray(GREY)
    if mode in ("P", "PA"):
        return grey.convert("P").convert(mode)
    return (grey.convert("RGBA") if mode == "RGBa" else grey.convert("RGB")).convert(mode)


WIDE = {
    "16 bits.png": of_values(np.uint16, 65535),
    "16 bits, little-endian.tiff": of_values("<u2", 65535),
    "16 bits, big-endian.tiff": of_values(">u2", 65535),
    "16 bits.pgm": of_values(np.int32, 65535),
    "16 bits in int32.tiff": of_values(np.int32, 65535),
    "8 bits in int32.tiff": of_values(np.int32, 255),
    "16 bits, signed.tiff": of_values(np.int16, 255),
    "float32 to 1.tiff": of_values(np.float32, 1),
    "float32 to 255.tiff": of_values(np.float32, 255),
    "float64 to 1.tiff": of_values(np.float64, 1),
    "float32 to 1.pfm": of_values(np.float32, 1),
}
NARROW = {
    f"{mode}.{ending}": in_mode(mode)
    for ending, modes in {
        "png": ("L", "P", "RGB"),
        "tiff": ("L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "LAB"),
        "jpg": ("L", "RGB", "CMYK", "YCbCr"),
        "bmp": ("L", "P", "RGB"),
        "webp": ("L", "RGB", "HSV"),
        "tga": ("L", "P", "RGB"),
        "gif": ("L", "P"),
    }.items()
    for mode in modes
}


@pytest.mark.parametrize("name", WIDE | NARROW)
def test_every_mode_gives_the_same_picture(tmp_path: Path, name: str) -> None:
    (WIDE | NARROW)[name].save(tmp_path / name, **({"quality": 100} if name.endswith(("jpg", "webp")) else {}))
    loaded = load_image(tmp_path / name)
    assert loaded.mode == "RGB"
    difference = np.abs(np.asarray(loaded) - GREY[..., None].astype(float)).max()
    assert difference <= (1 if name in WIDE else 4), difference  # colour spaces and palettes round


@pytest.mark.parametrize("name", ["RGBA.png", "LA.png", "RGBA.tiff", "LA.tiff", "PA.tiff", "RGBA.webp", "RGBa.webp"])
def test_an_opaque_alpha_changes_nothing(tmp_path: Path, name: str) -> None:
    in_mode(name.partition(".")[0]).save(tmp_path / name, **({"lossless": True} if name.endswith("webp") else {}))
    assert np.abs(np.asarray(load_image(tmp_path / name)) - GREY[..., None].astype(float)).max() <= 1


def test_one_bit(tmp_path: Path) -> None:
    image = Image.fromarray(GREY).convert("1")
    for ending in ("png", "tiff", "bmp", "gif"):
        image.save(tmp_path / f"image.{ending}")
        assert np.array_equal(np.asarray(load_image(tmp_path / f"image.{ending}"))[..., 0], np.asarray(image) * 255)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (RAMP * 300, "floats must be from 0 to 1 or 0 to 255, got values from 0 to 300"),
        (RAMP - 0.5, "got values from -0.5 to 0.5"),
        (np.where(RAMP > 0.5, np.nan, RAMP), "got values from nan to nan"),
        (np.where(RAMP > 0.5, np.inf, RAMP), "got values from 0 to inf"),
        (RAMP * 65536, "32-bit integers must be from 0 to 255 or 0 to 65535, got values from 0 to 65536"),
        (RAMP * 300 - 1, "32-bit integers must be from 0 to 255 or .*, got values from -1 to 299"),
    ],
)
def test_values_on_an_unknown_scale_are_refused(tmp_path: Path, values: np.ndarray, message: str) -> None:
    Image.fromarray(values.astype(np.int32 if "integers" in message else np.float32)).save(tmp_path / "odd.tiff")
    with pytest.raises(ImageError, match=f"odd.tiff: .*{message}"):
        load_image(tmp_path / "odd.tiff")


@pytest.mark.parametrize("transparent", [0, 65535])
def test_sixteen_bits_with_a_transparent_grey(tmp_path: Path, transparent: int) -> None:
    WIDE["16 bits.png"].save(tmp_path / "image.png", transparency=transparent)
    loaded = np.asarray(load_image(tmp_path / "image.png"))[..., 0]
    assert np.abs(loaded[:, 1:] - GREY[:, 1:].astype(float)).max() <= 1
    assert loaded[0, 0] == (255 if transparent == 0 else 0)


@pytest.mark.parametrize(
    ("depth", "colour", "row", "greys"),
    [
        (1, 0, bytes([0b01010000]), [0, 255, 0, 255]),
        (2, 0, bytes([0b00011011]), [0, 85, 170, 255]),
        (4, 0, bytes([0x01, 0x5F]), [0, 17, 85, 255]),
        (8, 0, bytes([0, 1, 85, 255]), [0, 1, 85, 255]),
        (16, 0, struct.pack(">4H", 0, 1, 21845, 65535), [0, 0, 85, 255]),
        (8, 2, bytes([0, 0, 0, 1, 1, 1, 85, 85, 85, 255, 255, 255]), [0, 1, 85, 255]),
    ],
)
def test_a_transparent_value_of_any_depth(
    tmp_path: Path, depth: int, colour: int, row: bytes, greys: list[int]
) -> None:
    """The second of four pixels has it."""
    path, clear = tmp_path / "image.png", struct.pack(">H", 1) * (3 if colour == 2 else 1)
    for transparent, second in ((None, greys[1]), (clear, 255)):
        path.write_bytes(png((4, 1), depth, colour, row, transparent))
        assert np.asarray(load_image(path))[0, :, 0].tolist() == [greys[0], second, *greys[2:]]


def test_a_transparent_colour_of_16_bits_is_refused(tmp_path: Path) -> None:
    (tmp_path / "image.png").write_bytes(png((1, 1), 16, 2, bytes(6), bytes(6)))
    with pytest.raises(ImageError, match=r"image.png: a PNG of 16-bit colours must have no transparent colour, got"):
        load_image(tmp_path / "image.png")


def patched(path: Path, tag: int, old: int, new: int) -> None:
    """Changes a tag of a little-endian TIFF."""
    content = path.read_bytes()
    entry = struct.pack("<HHII", tag, 3, 1, old)
    assert content.count(entry) == 1
    path.write_bytes(content.replace(entry, struct.pack("<HHII", tag, 3, 1, new)))


@pytest.mark.parametrize(("dtype", "white"), [(np.uint8, 255), (np.uint16, 65535), (np.float32, 1)])
def test_a_tiff_whose_white_is_0(tmp_path: Path, dtype: Any, white: float) -> None:
    of_values(dtype, white).save(tmp_path / "image.tiff")
    patched(tmp_path / "image.tiff", 262, 1, 0)
    assert np.abs(np.asarray(load_image(tmp_path / "image.tiff"))[..., 0] + GREY.astype(float) - 255).max() <= 1


def test_a_tiff_of_12_bits(tmp_path: Path) -> None:
    values = np.rint(RAMP * 4095).astype(np.uint16)
    pairs = values.reshape(90, 70, 2)
    packed = np.stack([pairs[..., 0] >> 4, (pairs[..., 0] & 15) << 4 | pairs[..., 1] >> 8, pairs[..., 1] & 255], -1)
    Image.fromarray(values).save(path := tmp_path / "image.tiff")
    content = path.read_bytes()
    at = content.index(values.astype("<u2").tobytes())
    path.write_bytes(content[:at] + packed.astype(np.uint8).tobytes() + content[at + packed.size :])
    patched(path, 258, 16, 12)
    assert np.abs(np.asarray(load_image(path))[..., 0] - GREY.astype(float)).max() <= 1


@pytest.mark.parametrize(
    ("form", "mode"),
    [
        ("PNG", "RGB"),
        ("JPEG", "RGB"),
        ("WEBP", "RGB"),
        *(("TIFF", x) for x in ("RGB", "L", "P", "I;16", "RGBA", "CMYK")),
    ],
)
def test_every_orientation(tmp_path: Path, form: str, mode: str) -> None:
    """A dark corner, which is at the top left where the camera is upright."""
    upright = Image.new("L", (64, 48), 255)
    upright.paste(0, (0, 0, 16, 16))
    flips = Image.Transpose
    turned = {
        1: (), 2: (flips.FLIP_LEFT_RIGHT,), 3: (flips.ROTATE_180,), 4: (flips.FLIP_TOP_BOTTOM,), 5: (flips.TRANSPOSE,),
        6: (flips.ROTATE_90,), 7: (flips.TRANSVERSE,), 8: (flips.ROTATE_270,),
    }  # fmt: skip
    for orientation, moves in turned.items():
        image, exif = upright, Image.Exif()
        for move in moves:
            image = image.transpose(move)
        exif[0x0112] = orientation
        if mode == "I;16":
            image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
        else:
            image = image.convert("RGB").convert(mode)
        image.save(tmp_path / "image", form, exif=exif)
        loaded = load_image(tmp_path / "image")
        assert loaded.size == upright.size, orientation
        assert np.abs(np.asarray(loaded)[..., 0] - np.asarray(upright).astype(float)).max() < 60, orientation


@pytest.mark.parametrize("bits", [8, 16])
def test_signed_integers_are_refused(tmp_path: Path, bits: int) -> None:
    values = (RAMP * 127).astype(f"u{bits // 8}")
    Image.fromarray(values).save(path := tmp_path / "image.tiff", tiffinfo={339: 2})
    with pytest.raises(ImageError, match=f"integers must be unsigned or of 32 bits, got signed ones of {bits} bits"):
        load_image(path)


def test_the_first_picture_of_several(tmp_path: Path) -> None:
    pages = [Image.new("L", (20, 20), value) for value in (40, 80, 120)]
    for ending in ("gif", "tiff", "webp", "png"):
        pages[0].save(tmp_path / f"image.{ending}", save_all=True, append_images=pages[1:])
        assert np.abs(np.asarray(load_image(tmp_path / f"image.{ending}")).astype(int) - 40).max() <= 2


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("form", ["DDS", "PPM", "SGI", "BMP", "GIF", "TIFF", "WEBP", "ICO", "TGA"])
def test_damaged_bytes_raise_no_other_error(tmp_path: Path, form: str) -> None:
    buffer = io.BytesIO()
    picture().save(buffer, format=form)
    draw = np.random.default_rng(0)
    messages: list[str] = []
    for _ in range(40):
        damaged = bytearray(buffer.getvalue())
        for at in draw.integers(0, min(200, len(damaged)), 6):
            damaged[at] = draw.integers(256)
        path = tmp_path / "damaged"
        path.write_bytes(damaged[: draw.integers(1, len(damaged) + 1)])
        try:
            load_image(path)
        except ImageError as error:
            messages.append(str(error))
    assert messages
    assert all(str(tmp_path) in message for message in messages)
