"""Image files, sampling, rotary embeddings and caches."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmkernels.models.blocks.images import ImageError, load_image, load_images
from mmkernels.models.blocks.kv_cache import KVCache
from mmkernels.models.blocks.sampling import sample
from mmkernels.models.blocks.text import SwiGLU, rotary_angles, rotate


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


def test_missing_images(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"got no such file: .*gone.jpg"):
        load_image(tmp_path / "gone.jpg")
    with pytest.raises(ImageError, match="must be a whole image"):
        load_image(tmp_path)
    with pytest.raises(ValueError, match="paths must name at least one image, got none"):
        load_images([], 32)


def bomb(width: int, height: int) -> bytes:
    """Returns a PNG of a few bytes whose header gives a large size."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("width", "height"), [(12_000, 12_000), (100_000, 100_000), (2**31 - 1, 2**31 - 1)])
def test_decompression_bombs(tmp_path: Path, width: int, height: int) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(bomb(width, height))
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
    expected = IdeficsImageProcessorPil(image_size=32)([Image.open(path)], return_tensors="pt")
    torch.testing.assert_close(load_images([path], 32), torch.as_tensor(expected))


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path: Path) -> None:
    grey = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(grey).save(tmp_path / "g.png")
    loaded = np.asarray(load_image(tmp_path / "g.png"))[..., 0]
    assert np.abs(loaded - grey / 257.0).max() <= 1


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


def test_sampling() -> None:
    logits = torch.tensor([[0.0, 3.0, 2.0, -1.0]]).expand(20_000, -1)
    generator = torch.Generator().manual_seed(0)
    assert sample(logits[:2]).tolist() == [1, 1]

    def shares(temperature: float, top_p: float) -> torch.Tensor:
        return torch.bincount(sample(logits, temperature, top_p, generator), minlength=4) / len(logits)

    torch.testing.assert_close(shares(1.0, 1.0), logits[0].softmax(0), atol=0.015, rtol=0)
    torch.testing.assert_close(shares(2.0, 1.0), (logits[0] / 2).softmax(0), atol=0.015, rtol=0)
    # The probabilities are 0.697, 0.256, 0.035 and 0.013: two of them reach 0.9, one reaches 0.69, three reach 0.98.
    kept = logits[0].softmax(0)
    for top_p, tokens in ((0.9, [1, 2]), (0.69, [1]), (0.98, [0, 1, 2]), (1e-9, [1])):
        expected = torch.zeros(4)
        expected[tokens] = kept[tokens] / kept[tokens].sum()
        torch.testing.assert_close(shares(1.0, top_p), expected, atol=0.015, rtol=0)
    for cold in (1e-3, 1e-40, 5e-324):
        assert sample(logits[:9], cold).tolist() == [1] * 9
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="temperature must be >= 0 and finite"):
            sample(logits, bad)
    for bad in (0.0, 1.1, float("nan")):
        with pytest.raises(ValueError, match="top_p must be above 0 and at most 1"):
            sample(logits, 1.0, bad)


def test_rotary_is_a_rotation_by_relative_position() -> None:
    q, k = torch.randn(1, 1, 1, 8, dtype=torch.float64), torch.randn(1, 1, 1, 8, dtype=torch.float64)

    def score(i: int, j: int) -> torch.Tensor:
        rotated = [rotate(x, rotary_angles(torch.tensor([[at]]), 8, 100.0, x.dtype)) for x, at in ((q, i), (k, j))]
        return (rotated[0] * rotated[1]).sum()

    torch.testing.assert_close(score(7, 3), score(104, 100), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(score(0, 0), (q * k).sum())
    assert abs(float(score(7, 3) - score(7, 4))) > 1e-3
    # The channels (i, i + 4) are rotated by position / 100^(i/4): by hand, for i = 1.
    rotated = rotate(q, rotary_angles(torch.tensor([[2]]), 8, 100.0, q.dtype))[0, 0, 0]
    angle = torch.tensor(2 / 100**0.25, dtype=torch.float64)
    torch.testing.assert_close(
        rotated[1], q[0, 0, 0, 1] * angle.cos() - q[0, 0, 0, 5] * angle.sin(), rtol=1e-5, atol=1e-6
    )


def test_kv_cache_positions_and_masks() -> None:
    cache = KVCache(num_layers=1)
    positions, mask = cache.extend(torch.tensor([[False, True, True], [True, True, False]]))
    assert positions.tolist() == [[0, 0, 1], [0, 1, 1]]
    assert mask.to_dense(3)[:, 0].int().tolist() == [
        [[0, 0, 0], [0, 1, 0], [0, 1, 1]],
        [[1, 0, 0], [1, 1, 0], [1, 1, 0]],
    ]
    positions, mask = cache.extend(torch.ones(2, 2, dtype=torch.bool), padded=False)
    assert positions.tolist() == [[2, 3], [2, 3]]
    assert mask.to_dense(5)[:, 0].int().tolist() == [
        [[0, 1, 1, 1, 0], [0, 1, 1, 1, 1]],
        [[1, 1, 0, 1, 0], [1, 1, 0, 1, 1]],
    ]
    assert (len(cache), cache.batch_size) == (5, 2)


def test_swiglu() -> None:
    layer, x = SwiGLU(4, 6), torch.randn(2, 4)
    gate = x @ layer.gate_proj.weight.T
    expected = (gate * torch.sigmoid(gate) * (x @ layer.up_proj.weight.T)) @ layer.down_proj.weight.T
    torch.testing.assert_close(layer(x), expected)
