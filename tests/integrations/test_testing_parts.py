"""The parts that small models and their inputs are built of."""

from __future__ import annotations

import torch

from mmkernels.testing.parts import IMAGE, last_image, left_padded, prompt, right_padded


def test_text_attends_to_the_last_image_before_it() -> None:
    assert last_image(8, 2, before=2).tolist() == [[0, 0]] * 2 + [[1, 0]] * 3 + [[0, 1]] * 3
    assert last_image(9, 2, before=2).tolist()[-1] == [0, 1]  # the remainder belongs to the last image


def test_images_stand_between_text() -> None:
    inputs = prompt((2, 1), before=3, after=1, padding=2)
    assert (inputs["input_ids"] == IMAGE).int().tolist() == [[0, 0, 0, 1, 1, 0, 1, 0]] * 2
    assert inputs["attention_mask"].tolist() == [[1] * 8, [0, 0] + [1] * 6]


def test_padding_is_left_or_right() -> None:
    ids = torch.full((2, 3), 7)
    assert left_padded(ids, [1, 3])["attention_mask"].tolist() == [[0, 0, 1], [1, 1, 1]]
    right = right_padded(ids, [1, 3])
    assert right["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]
    assert right["input_ids"].tolist() == [[7, 0, 0], [7, 7, 7]]
