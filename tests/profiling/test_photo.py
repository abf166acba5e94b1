"""The photograph and its crops."""

import numpy as np
import pytest
from PIL import Image

from mmkernels.profiling.photo import crops, default_photo


@pytest.mark.parametrize("count", [1, 2, 5, 10, 17])
@pytest.mark.parametrize("size", [(60, 90), (90, 60), (50, 50)])
def test_crops_are_squares_inside_the_photo_and_differ(count: int, size: tuple[int, int]) -> None:
    photo = Image.fromarray(np.random.default_rng(0).integers(1, 255, (size[1], size[0], 3), dtype=np.uint8))
    squares = crops(photo, count)
    assert len(squares) == count
    assert all(crop.width == crop.height for crop in squares)
    assert all(np.asarray(crop).min() > 0 for crop in squares)  # outside the photo Pillow fills in 0
    assert len({crop.tobytes() for crop in squares}) == count


def test_default_photo_is_a_real_one() -> None:
    with Image.open(default_photo()) as photo:
        assert min(photo.size) > 400
