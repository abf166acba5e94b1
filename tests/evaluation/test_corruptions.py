"""Images made worse, boxes that move along, and what that costs in a metric."""

from __future__ import annotations

import io
import math
import sys
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from mmkernels.evaluation import (
    Corruption,
    blur,
    box_iou,
    crop,
    cropped_boxes,
    jpeg,
    measure_robustness,
    standard_corruptions,
)

WAYS = {"blur": (blur, 1.5), "crop": (crop, 0.7), "jpeg": (jpeg, 15)}


def photo(channels: int = 3, height: int = 24, width: int = 32) -> Tensor:
    """Returns smooth uint8 [C, H, W]."""
    coarse = torch.rand(1, channels, 4, 4)
    return (torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")[0] * 255).to(torch.uint8)


def picture(image: Tensor) -> Image.Image:
    array = image.permute(1, 2, 0).squeeze(2).numpy()
    return Image.fromarray(array)


def plain(image: Image.Image) -> Tensor:
    array = torch.from_numpy(np.array(image))
    return array[None] if array.dim() == 2 else array.permute(2, 0, 1)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("way", WAYS)
def test_all_kinds_of_images_get_the_same(way: str, channels: int) -> None:
    change, strength = WAYS[way]
    images = torch.stack([photo(channels), photo(channels)])
    worse = change(images, strength)
    assert worse.shape == images.shape
    assert worse.dtype == torch.uint8
    assert (worse != images).any()
    torch.testing.assert_close(change(images[0], strength), worse[0])
    torch.testing.assert_close(change(images.transpose(2, 3), strength).transpose(2, 3).shape, worse.shape)
    torch.testing.assert_close(change(images / 255, strength), worse / 255)
    halved = change((images / 255).bfloat16(), strength)
    assert halved.dtype == torch.bfloat16
    one, several = change(picture(images[0]), strength), change([picture(x) for x in images], strength)
    assert isinstance(one, Image.Image)
    assert isinstance(several, list)
    for image, expected in ((one, worse[0]), (several[1], worse[1])):
        torch.testing.assert_close(plain(image), expected)


def test_against_pillow_itself() -> None:
    image = photo()
    torch.testing.assert_close(blur(image, 2), plain(picture(image).filter(ImageFilter.GaussianBlur(2))))
    file = io.BytesIO()
    picture(image).save(file, "JPEG", quality=10)
    torch.testing.assert_close(jpeg(image, 10), plain(Image.open(file)))
    middle = picture(image).resize((32, 24), Image.Resampling.BILINEAR, box=(8, 6, 24, 18))
    torch.testing.assert_close(crop(image, 0.5), plain(middle))


def test_the_least_strength_leaves_images_as_they_are() -> None:
    image = photo()
    torch.testing.assert_close(blur(image, 0), image)
    torch.testing.assert_close(crop(image, 1), image)
    grey = torch.tensor([0.0, 0.4981, 0.5019, 0.9985]).expand(1, 4, 4)  # the nearest of 255 steps
    torch.testing.assert_close(blur(grey, 0)[0, 0], torch.tensor([0.0, 127, 128, 255]) / 255)
    assert (jpeg(image, 95).float() - image.float()).abs().mean() < 3


@pytest.mark.parametrize("name", WAYS)
def test_each_severity_is_worse_than_the_one_before(name: str) -> None:
    image = torch.randint(256, (3, 64, 64), dtype=torch.uint8)
    image[:, 16:48, 16:48] = photo(3, 32, 32)
    levels = standard_corruptions([name])
    assert [level.severity for level in levels] == [1, 2, 3, 4, 5]
    distance = [(level(image).float() - image.float()).square().mean().item() for level in levels]
    if name == "crop":  # what is enlarged is no more alike or unlike: the part that stays says it
        distance = [1 - level.strength for level in levels]
    assert distance == sorted(distance)
    assert distance[0] > 0


def test_a_small_image_is_blurred_in_proportion() -> None:
    worst = standard_corruptions(["blur"], [5])[0]
    image = photo(3, 112, 150)
    torch.testing.assert_close(worst(image), blur(image, 3))
    large, small = worst([picture(photo(1, 224, 224)), picture(image)])  # each by its own size
    assert large.size == (224, 224)
    torch.testing.assert_close(plain(small), blur(image, 3))


def test_boxes_move_with_what_they_hold() -> None:
    image = torch.zeros(1, 40, 60, dtype=torch.uint8)
    image[:, 10:20, 20:50] = 255
    box = torch.tensor([20, 10, 50, 20])
    for part in (1.0, 0.8, 0.5):
        lit = crop(image, part)[0] > 127
        rows, columns = lit.any(1).nonzero(), lit.any(0).nonzero()
        seen = torch.stack([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], 1)[0]
        assert box_iou(seen, cropped_boxes(box, (40, 60), part)).item() > 0.9
    assert cropped_boxes(torch.tensor([[0.0, 0, 5, 5]]), (40, 60), 0.5).tolist() == [[0, 0, 0, 0]]
    assert cropped_boxes(torch.tensor([55, 35, 60, 40]), (40, 60), 0.5).tolist() == [60, 40, 60, 40]
    crops, blurs = standard_corruptions(["crop"], [5])[0], standard_corruptions(["blur"], [5])[0]
    torch.testing.assert_close(crops.boxes(box, (40, 60)), cropped_boxes(box, (40, 60), 0.7))
    torch.testing.assert_close(blurs.boxes(box, (40, 60)), box)


@pytest.mark.parametrize(
    ("images", "error", "match"),
    [
        (torch.zeros(2, 4, 4, 4), ValueError, r"images must be .* with 1 or 3 channels .* \(2, 4, 4, 4\)"),
        (torch.zeros(4, 4), ValueError, r"images must be \[C, H, W\] or .* got shape \(4, 4\)"),
        (torch.zeros(0, 3, 4, 4), ValueError, "images must be .* at least one pixel, got shape"),
        (torch.zeros(3, 4, 4).int(), TypeError, "images must be uint8 or floats, got torch.int32"),
        (torch.full((3, 4, 4), 1.5), ValueError, "images must be from 0 to 1 as floats, got 1.5 to 1.5"),
        (torch.full((3, 4, 4), math.nan), ValueError, "images must be from 0 to 1 as floats, got nan to nan"),
        (np.zeros((3, 4, 4)), TypeError, "images must be a tensor, a Pillow image or several, got ndarray"),
        ("photo.png", TypeError, "images must be a tensor, a Pillow image or several, got str"),
        ([torch.zeros(3, 4, 4)], TypeError, "images must be Pillow images, got Tensor at 0"),
        ([], ValueError, "images must be at least one, got none"),
        (Image.new("RGBA", (4, 4)), ValueError, "images must be of mode L or RGB, got RGBA"),
        ([Image.new("L", (4, 4)), Image.new("P", (4, 4))], ValueError, r"images\[1\] must be of mode L or RGB, got P"),
    ],
)  # fmt: skip
def test_bad_images(images: Any, error: type[Exception], match: str) -> None:
    for change in [
        lambda x: jpeg(x, 50),
        lambda x: blur(x, 1),
        lambda x: crop(x, 0.5),
        *standard_corruptions(None, [1]),
    ]:
        with pytest.raises(error, match=match):
            change(images)


def test_bad_strengths() -> None:
    image = photo()
    with pytest.raises(ValueError, match="radius must be at least 0, got -1"):
        blur(image, -1)
    with pytest.raises(ValueError, match="radius must be at least 0, got nan"):
        blur(image, math.nan)
    with pytest.raises(ValueError, match="part must be above 0 and at most 1, got 0"):
        crop(image, 0)
    with pytest.raises(ValueError, match="quality must be from 1 to 95, got 100"):
        jpeg(image, 100)
    with pytest.raises(TypeError, match="quality must be an integer, got float"):
        jpeg(image, 10.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"boxes must be \[..., 4\], got shape \(3,\)"):
        cropped_boxes(torch.zeros(3), (4, 4), 0.5)
    with pytest.raises(ValueError, match=r"size must be \(height, width\), got 4"):
        cropped_boxes(torch.zeros(4), 4, 0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="names must be one of blur, crop, jpeg, got 'fog'"):
        standard_corruptions(["fog"])
    with pytest.raises(ValueError, match="severities must be from 1 to 5, got 6"):
        standard_corruptions(severities=[6])


def test_without_pillow_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL.ImageFilter", None)
    with pytest.raises(ImportError, match=r'blur needs Pillow: pip install "mmkernels\[evaluation\]"'):
        blur(photo(), 1)


def dimmed(name: str, severity: int, by: float) -> Corruption:
    return Corruption(name, severity, by, lambda images, by: images * by)


def test_the_mean_relative_drop() -> None:
    seen: list[Corruption | None] = []

    def evaluate(images: Tensor, corruption: Corruption | None) -> dict[str, float]:
        seen.append(corruption)
        return {"light": images.mean(), "error": 1 - images.mean().item() / 4, "nothing": 0}  # type: ignore[dict-item]

    of = [dimmed("dusk", 1, 0.75), dimmed("night", 1, 0.25), dimmed("dusk", 3, 0.25)]
    found = measure_robustness(evaluate, torch.full((1, 2, 2), 2.0), iter(of))
    assert seen == [None, *of]
    assert found.clean == {"light": 2, "error": 0.5, "nothing": 0}
    assert found.corrupted["dusk"] == {
        1: {"light": 1.5, "error": 0.625, "nothing": 0}, 3: {"light": 0.5, "error": 0.875, "nothing": 0},
    }  # fmt: skip
    assert found.drop["dusk"]["light"] == pytest.approx(0.5)  # of 0.25 and 0.75
    assert found.drop["dusk"]["error"] == pytest.approx(-0.5)
    assert found.mean_drop["light"] == pytest.approx((0.5 + 0.75) / 2)
    assert math.isnan(found.mean_drop["nothing"])
    assert all(type(x) is float for x in found.clean.values())


def test_all_standard_corruptions_are_measured() -> None:
    images = torch.stack([photo(1), photo(1)])
    found = measure_robustness(lambda images, _: {"std": images.float().std().item()}, images)
    assert [(name, list(levels)) for name, levels in found.corrupted.items()] == [
        (name, [1, 2, 3, 4, 5]) for name in WAYS
    ]
    assert set(found.mean_drop) == {"std"}


def test_bad_measurements() -> None:
    image = torch.ones(1, 2, 2)
    constant = lambda images, corruption: {"a": 1.0}
    with pytest.raises(ValueError, match="of must be at least one of Corruptions, got none"):
        measure_robustness(constant, image, [])
    with pytest.raises(TypeError, match="of must be Corruptions, got str at 0"):
        measure_robustness(constant, image, ["blur"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="of must differ in name or severity, got dusk 1 twice"):
        measure_robustness(constant, image, [dimmed("dusk", 1, 1), dimmed("dusk", 1, 2)])
    with pytest.raises(TypeError, match="evaluate must return a mapping of metrics, got float"):
        measure_robustness(lambda images, _: 1.0, image)  # type: ignore[arg-type, return-value]
    with pytest.raises(TypeError, match=r"evaluate must return numbers, got .*'b'"):
        measure_robustness(lambda images, _: {"a": "b"}, image)  # type: ignore[dict-item]
    with pytest.raises(ValueError, match=r"evaluate must return the metrics \['a'\] each time, got \['b'\]"):
        measure_robustness(lambda images, c: {"b" if c else "a": 1.0}, image)
