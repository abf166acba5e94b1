"""DeepSeek-VL2's tiles: sizes and orders worked by hand, from images to the tokens of a prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor

from mmkernels.models import DeepSeekVL2, cut_images
from mmkernels.models.deepseek_vl2_tiles import best_resolution, candidate_resolutions, layout, num_tokens

SMALL = DeepSeekVL2.sizes["deepseek_vl2_small"]
TINY = DeepSeekVL2.sizes["tiny"]  # tiles of 28 pixels, 2 x 2 tokens; up to 4 of them

# Sizes.

RELEASED = [  # tiles side by side and below each other, in the configurations of the released models
    (1, 1), (1, 2), (2, 1), (1, 3), (3, 1), (1, 4), (4, 1), (2, 2), (1, 5), (5, 1), (1, 6), (6, 1), (2, 3), (3, 2),
    (1, 7), (7, 1), (1, 8), (8, 1), (2, 4), (4, 2), (1, 9), (9, 1), (3, 3),
]  # fmt: skip


def test_candidates_are_those_of_the_released_models() -> None:
    assert sorted(candidate_resolutions()) == sorted((m * 384, n * 384) for m, n in RELEASED)
    assert len(candidate_resolutions()) == len(RELEASED) == 23


@pytest.mark.parametrize(
    ("size", "tiles"),
    [
        ((384, 384), (1, 1)),  # fits as it is
        ((200, 100), (1, 1)),  # all sizes keep all pixels; the smallest leaves the fewest empty
        ((768, 384), (2, 1)),
        ((385, 384), (2, 1)),  # one pixel too wide for a tile: 147,456 would be kept there, all 147,840 here
        ((1152, 1152), (3, 3)),
        ((4000, 4000), (3, 3)),  # larger than all
        ((10_000, 1000), (9, 1)),  # 10 to 1: 3456 x 345 of 9 x 1, 3072 x 307 of 8 x 1
        ((1000, 10_000), (1, 9)),
        ((1, 5000), (1, 1)),  # scaled to 1 x 3456 it would have no whole pixel of width
        # 3 x 2 shows 1024 x 768, 4 x 2 the same and leaves more empty; 3 x 3 shows 1152 x 864.
        ((4000, 3000), (3, 3)),
        ((2000, 1000), (4, 2)),  # 1536 x 768
    ],
)
def test_the_best_size(size: tuple[int, int], tiles: tuple[int, int]) -> None:
    assert best_resolution(size, candidate_resolutions()) == (tiles[0] * 384, tiles[1] * 384)


def test_every_size_against_the_definition() -> None:
    """The most pixels kept, then the fewest empty; of equal ones the first."""
    generator = torch.Generator().manual_seed(0)
    candidates = candidate_resolutions()
    for width, height in torch.randint(1, 6000, (500, 2), generator=generator).tolist():
        best, most, least = None, -1, 0
        for w, h in candidates:
            scale = min(w / width, h / height)
            kept = min(int(width * scale) * int(height * scale), width * height)
            empty = w * h - kept
            if kept > most or (kept == most and empty < least):
                best, most, least = (w, h), kept, empty
        assert best_resolution((width, height), candidates) == best


@pytest.mark.parametrize(
    ("size", "candidates", "match"),
    [
        ((1, 1), [], "candidates must have at least one size, got none"),
        ((0, 4), [(4, 4)], "width must be .*got 0"),
        ((4, -1), [(4, 4)], "height must be .*got -1"),
    ],
)
def test_sizes_with_errors(size: tuple[int, int], candidates: list[tuple[int, int]], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        best_resolution(size, candidates)


# Pixels.


def test_tiles_of_an_image_row_by_row() -> None:
    """An image of four colours, at the size of its tiles: each tile has one of them."""
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]
    image = Image.new("RGB", (56, 56))
    for number, colour in enumerate(colours):
        image.paste(colour, (28 * (number % 2), 28 * (number // 2), 28 * (number % 2) + 28, 28 * (number // 2) + 28))
    found = cut_images([image], TINY)
    assert found.tiles == ((2, 2),) and found.pixel_values.dtype == torch.float32
    for tile, colour in zip(found.pixel_values[1:], colours, strict=True):
        assert torch.equal(tile, (torch.tensor(colour).float() / 127.5 - 1)[:, None, None].expand(3, 28, 28))
    corners = found.pixel_values[0][:, [0, 0, -1, -1], [0, -1, 0, -1]]  # all of it, made smaller
    assert torch.equal(corners.T, torch.tensor(colours).float() / 127.5 - 1)


def test_what_an_image_does_not_cover_is_grey() -> None:
    found = cut_images([Image.new("RGB", (56, 10), (255, 255, 255))], TINY)
    assert found.tiles == ((2, 1),)
    grey = 127 / 127.5 - 1
    for view, rows in zip(found.pixel_values, (5, 10, 10), strict=True):
        white = (28 - rows) // 2
        assert torch.allclose(view[:, :white], torch.tensor(grey)) and torch.equal(view[0, 13], torch.ones(28))
        assert int((view[0, :, 0] > 0.9).sum()) == rows


@pytest.mark.parametrize("size", [(801, 399), (37, 500), (1, 3000), (385, 1)])
def test_pixels_as_the_paper_has_them(size: tuple[int, int]) -> None:
    """Pillow pads the whole image, then each tile is cut out of it."""
    width, height = size
    values = torch.randint(256, (height, width, 3), generator=torch.Generator().manual_seed(width), dtype=torch.uint8)
    image = Image.fromarray(values.numpy())
    found = cut_images([image], SMALL)
    ((columns, rows),) = found.tiles

    def pixels(view: Image.Image) -> Tensor:
        data = torch.frombuffer(bytearray(view.tobytes()), dtype=torch.uint8).view(384, 384, 3)
        return (data.permute(2, 0, 1) / 255 - 0.5) / 0.5

    padded = ImageOps.pad(image, (384 * columns, 384 * rows), color=(127, 127, 127))
    boxes = [(384 * x, 384 * y, 384 * x + 384, 384 * y + 384) for y in range(rows) for x in range(columns)]
    views = [ImageOps.pad(image, (384, 384), color=(127, 127, 127)), *(padded.crop(box) for box in boxes)]
    torch.testing.assert_close(found.pixel_values, torch.stack(list(map(pixels, views))))


def test_of_more_than_two_images_none_is_cut() -> None:
    photo = Image.new("RGB", (56, 28))
    assert cut_images([photo] * 2, TINY).tiles == ((2, 1),) * 2
    assert cut_images([photo] * 3, TINY).tiles == ((1, 1),) * 3
    assert cut_images([photo] * 3, TINY, cut=True).tiles == ((2, 1),) * 3
    assert cut_images([photo], TINY, cut=False).tiles == ((1, 1),)


def test_files_and_errors(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    Image.new("RGB", (56, 28), (9, 9, 9)).save(path)
    for given in (path, str(path)):
        assert torch.equal(cut_images([given], TINY).pixel_values, cut_images([Image.open(path)], TINY).pixel_values)
    with pytest.raises(ValueError, match="images must have at least one image, got none"):
        cut_images([], TINY)
    with pytest.raises(ValueError, match="images must be RGB, got mode L for image 1"):
        cut_images([Image.new("RGB", (5, 5)), Image.new("L", (5, 5))], TINY)
    with pytest.raises(FileNotFoundError, match="no such file"):
        cut_images([tmp_path / "other.png"], TINY)


# The tokens of a prompt.


def test_what_is_no_image() -> None:
    image = Image.new("RGB", (8, 8))
    with pytest.raises(TypeError, match="images must be a list of images or paths, got Image"):
        cut_images(image, TINY)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="images must be a list of images or paths, got str"):
        cut_images("x.png", TINY)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="images must be images or paths, got NoneType for image 1"):
        cut_images([image, None], TINY)  # type: ignore[list-item]
    with pytest.raises(TypeError, match="cut must be"):
        cut_images([image], TINY, cut="no")  # type: ignore[arg-type]


def test_numbers_of_tokens() -> None:
    """14 x 14 tokens a tile: 210 of the whole, one, and the rows of the tiles with a newline each."""
    assert num_tokens((1, 1), 14) == 14 * 15 + 1 + 14 * 15 == 421
    assert num_tokens((3, 3), 14) == 14 * 15 + 1 + 42 * 43 == 2017
    assert num_tokens((9, 1), 14) == 14 * 15 + 1 + 14 * 127 == 1989
    assert num_tokens((1, 9), 14) == 14 * 15 + 1 + 126 * 15 == 2101  # the most
    assert SMALL.tile_side == 14 and TINY.tile_side == 2  # 27 x 27 and 3 x 3 patches
    for wrong in ((0, -1), (1.5, 1), (True, True), (1,), 3):
        with pytest.raises(ValueError, match=r"tiles must be a pair \(columns, rows\) of positive integers, got"):
            num_tokens(wrong, 14)  # type: ignore[arg-type]


# Tiles of 2 x 2 tokens: a1 to d1 are those of the first one, a0 to d0 of the whole; | a newline, : the separator.
WHOLE = "a0 b0 | c0 d0 |"
HAND = {
    (1, 1): (WHOLE, "a1 b1 | c1 d1 |"),
    (2, 1): (WHOLE, "a1 b1 a2 b2 | c1 d1 c2 d2 |"),
    (1, 2): (WHOLE, "a1 b1 | c1 d1 | a2 b2 | c2 d2 |"),
    (2, 2): (WHOLE, "a1 b1 a2 b2 | c1 d1 c2 d2 | a3 b3 a4 b4 | c3 d3 c4 d4 |"),
}


def written(tiles: tuple[tuple[int, int], ...], whole_first: bool) -> list[str]:
    """Returns what `layout` says, as in `HAND`."""
    found = layout(tiles, 2, whole_first)
    tokens = ["|"] * sum(found.lengths)
    names = [f"{letter}{tile}" for columns, rows in tiles for tile in range(1 + columns * rows) for letter in "abcd"]
    for place, name in zip(found.places, [*names, *":" * len(tiles)], strict=True):
        assert tokens[place] == "|"
        tokens[place] = name
    return tokens


@pytest.mark.parametrize("whole_first", [True, False])
@pytest.mark.parametrize("tiles", HAND)
def test_the_order_of_tokens(tiles: tuple[int, int], whole_first: bool) -> None:
    views = HAND[tiles] if whole_first else HAND[tiles][::-1]
    one = f"{views[0]} : {views[1]}".split()
    assert written((tiles,), whole_first) == one
    first = (f"{WHOLE} : a1 b1 |c1 d1 |" if whole_first else f"a1 b1 | c1 d1 | : {WHOLE}").replace("|c1", "| c1")
    assert written(((1, 1), tiles), whole_first) == first.split() + one


def test_patches_become_tokens_channel_by_channel() -> None:
    """Of 3 x 3 patches with two channels; a row and a column of zeros follow."""
    model = DeepSeekVL2.from_size("tiny", vision_width=2, vision_heads=1, text_width=8, text_heads=4, text_kv_heads=4)
    with torch.no_grad():
        first = model.projector.mlp[0]
        first.weight.copy_(torch.eye(8))
        first.bias.zero_()
        model.projector.mlp[1] = torch.nn.Identity()
        model.projector.mlp[2] = torch.nn.Identity()
        patches = torch.tensor([[1.0, -1], [2, -2], [3, -3], [4, -4], [5, -5], [6, -6], [7, -7], [8, -8], [9, -9]])
        merged, grid = model.projector(patches[None], (1, 3, 3))
    assert grid == (1, 2, 2)
    assert merged[0].tolist() == [
        [1, 2, 4, 5, -1, -2, -4, -5],
        [3, 0, 6, 0, -3, 0, -6, 0],
        [7, 8, 0, 0, -7, -8, 0, 0],
        [9, 0, 0, 0, -9, 0, 0, 0],
    ]


def test_one_image_becomes_tokens_by_hand() -> None:
    """The newline and the separator are put in, and each gets the gradient of all its places."""
    model = DeepSeekVL2.from_size("tiny").eval()
    tokens = torch.randn(3 * 4, 64, requires_grad=True)  # the whole and two tiles
    found = layout(((2, 1),), 2)
    out = model._assembled(tokens, found)
    n, s = model.newline, model.separator
    t = tokens.view(3, 2, 2, 64)
    rows = [t[0, 0, 0], t[0, 0, 1], n, t[0, 1, 0], t[0, 1, 1], n, s]
    rows += [t[1, 0, 0], t[1, 0, 1], t[2, 0, 0], t[2, 0, 1], n, t[1, 1, 0], t[1, 1, 1], t[2, 1, 0], t[2, 1, 1], n]
    assert torch.equal(out, torch.stack(rows))
    weights = torch.randn_like(out)
    (out * weights).sum().backward()
    torch.testing.assert_close(n.grad, weights[[2, 5, 11, 16]].sum(0))
    torch.testing.assert_close(s.grad, weights[6])


@pytest.mark.parametrize("tiles", [(1, 1), (9, 1), (1, 9), (3, 3)])
def test_one_tile_and_the_most(tiles: tuple[int, int]) -> None:
    model = DeepSeekVL2.from_size("tiny", vision_layers=1, text_layers=2).eval()
    count = model.num_image_tokens(tiles)
    ids = torch.tensor([[5, *[127] * count, 7]])
    pixels = torch.randn(1 + tiles[0] * tiles[1], 3, 28, 28, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert model.encode(pixels, [tiles]).lengths == (count,)
        whole = model(ids, pixels, tiles=[tiles]).logits[0, -1]
        other = pixels.clone()
        other[-1] = other[-1].flip(1, 2)
        assert not torch.allclose(model(ids, other, tiles=[tiles]).logits[0, -1], whole)
        turned = model(ids, pixels, tiles=[tiles[::-1]]) if tiles == (3, 3) else None
    assert turned is None or torch.equal(turned.logits[0, -1], whole)


def test_no_tiles_are_one_of_each(recwarn: Any) -> None:
    model, pixels = DeepSeekVL2.from_size("tiny").eval(), torch.rand(4, 3, 28, 28)
    with torch.no_grad():
        one, other = model.encode(pixels), model.encode(pixels, [(1, 1), [1, 1]])
    assert one.lengths == other.lengths == (13, 13) and torch.equal(one.tokens, other.tokens)
