"""Inputs of a Qwen-VL that are wrong: each raises an error that names the argument, before anything is encoded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from qwen_checkpoints import prompts

from mmkernels.models import QwenVL, Visual
from mmkernels.models.blocks.packed_encoder import PackedEncoder

SIZES = {"qwen2_vl": "tiny_qwen2", "qwen2_5_vl": "tiny", "qwen3_vl": "tiny_qwen3"}
Ours = Callable[..., QwenVL]


@pytest.fixture
def nothing_is_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PackedEncoder, "forward", lambda *x, **y: pytest.fail("the encoder was called"))


before_encoding = pytest.mark.usefixtures("nothing_is_encoded")


@before_encoding
@pytest.mark.parametrize(
    ("change", "match"),
    [
        # Grids and pixels.
        ({"image_grid_thw": None}, "pixel_values and image_grid_thw must be given together, got one"),
        ({"pixel_values": None}, "pixel_values and image_grid_thw must be given together, got one"),
        ({"image_grid_thw": [(1, 4, 6), (1, 3, 4)]}, r"h and w divisible by 2, got \(3, 4\) of image 1"),
        ({"image_grid_thw": [(1, 4, 6), (1, 0, 4)]}, "image_grid_thw must be 1 or more, got 0"),
        ({"image_grid_thw": [(1, 4, 6), (1, -2, 4)]}, "image_grid_thw must be 1 or more, got -2"),
        ({"image_grid_thw": [(1, 4, 6), (1, 2)]}, r"image_grid_thw must be \(t, h, w\) for each image, got \(1, 2\)"),
        ({"image_grid_thw": [(1, 4, 6), (1, 2, 2**40)]}, r"at most 16777216 patches in all, got \d+"),
        ({"image_grid_thw": [(1, 4, 6)]}, r"must be floating \[24, 384\] by image_grid_thw, got .*32, 384"),
        ({"pixel_values": torch.zeros(32, 192)}, r"must be floating \[32, 384\] by image_grid_thw, got .*32, 192"),
        ({"pixel_values": torch.zeros(32, 384, dtype=torch.int)}, r"must be floating \[32, 384\].*, got .*int32"),
        ({"pixel_values": [[0.0]]}, r"pixel_values must be floating \[32, 384\] by image_grid_thw, got"),
        # Markers.
        ({"input_ids": torch.tensor([[5, *[99] * 7]])}, r"8 tokens 99 \(image\) for 2 images of 6, 2 tokens, got 7"),
        ({"input_ids": torch.tensor([[5, *[99] * 9]])}, r"8 tokens 99 \(image\) for 2 images of 6, 2 tokens, got 9"),
        ({"input_ids": torch.tensor([[5, 6]])}, r"8 tokens 99 \(image\) for 2 images of 6, 2 tokens, got 0"),
        ({"input_ids": torch.tensor([[5, *[99] * 8, 98]])}, r"0 tokens 98 \(video\) for 0 videos, got 1"),
        (
            {"input_ids": torch.tensor([[5, *[99] * 4], [5, *[99] * 4]])},
            "must have the 6 tokens of image 0 in one row, got them in rows 0 to 1",
        ),
        ({"mm_token_type_ids": torch.zeros(1, 3)}, r"mm_token_type_ids must be \[1, 14\] as input_ids, got .*3"),
        ({"mm_token_type_ids": torch.zeros(1, 14)}, "must be 1 at tokens 99 and 2 at 98, else 0"),
        # Videos.
        ({"video_grid_thw": [(1, 2, 2)]}, "pixel_values_videos and video_grid_thw must be given together"),
        ({"second_per_grid_ts": [1.0]}, "second_per_grid_ts must have one number a video, 0, got 1"),
        # Images that are encoded already.
        ({"images": torch.zeros(8, 64)}, "images must be what encode returns, got Tensor"),
        ({"videos": Visual(torch.zeros(1, 32), (1,), (1,))}, r"videos must be \[tokens, 64\] with places"),
        ({"videos": Visual(torch.zeros(1, 64), (1,), (1,))}, r"videos must be \[tokens, 64\] with places"),
        (
            {"images": Visual(torch.zeros(1, 64), (1,), (1,), torch.zeros(1, 3).long(), (1,))},
            "pixel_values must be None with images, got both",
        ),
    ],
)
def test_bad_inputs(ours: Ours, change: dict[str, Any], match: str) -> None:
    given = prompts("qwen2_5_vl", (2, (1, 4, 6), (1, 2, 4)))
    if "input_ids" in change:
        del given["mm_token_type_ids"], given["attention_mask"]
    with pytest.raises((TypeError, ValueError), match=match):
        ours("qwen2_5_vl")(**(given | change))


@before_encoding
@pytest.mark.parametrize(
    ("seconds", "match"),
    [
        ([1.0, 2.0], "second_per_grid_ts must have one number a video, 1, got 2"),
        (torch.tensor([-1.0]), "second_per_grid_ts must be numbers from 0 to"),
        ([float("nan")], "second_per_grid_ts must be numbers from 0 to"),
        ([1e30], "second_per_grid_ts must be numbers from 0 to"),
    ],
)
def test_bad_seconds(ours: Ours, seconds: Any, match: str) -> None:
    given = prompts("qwen2_5_vl", (2, (-2, 4, 4)))
    with pytest.raises(ValueError, match=match):
        ours("qwen2_5_vl")(**(given | {"second_per_grid_ts": seconds}))
    with pytest.raises(ValueError, match=match.replace("second_per_grid_ts", "seconds")):
        ours("qwen2_5_vl").encode(given["pixel_values_videos"], given["video_grid_thw"], seconds=seconds)


@pytest.mark.parametrize("variant", ["qwen2_vl", "qwen3_vl"])
def test_seconds_of_models_without(ours: Ours, variant: str) -> None:
    given = prompts(variant, (2, (-2, 4, 4)))
    with pytest.raises(ValueError, match=r'must be None: positions follow seconds in a "qwen2_5" only'):
        ours(variant)(**given, second_per_grid_ts=[1.0])


def test_a_keyword_that_is_not_honoured(ours: Ours) -> None:
    with pytest.raises(TypeError, match="position_ids"):
        ours("qwen2_5_vl")(torch.tensor([[5]]), position_ids=torch.tensor([[0]]))


@before_encoding
@pytest.mark.parametrize("variant", SIZES)
def test_too_many_images(variant: str) -> None:
    """200 images are longer than a text may be."""
    model = QwenVL.from_size(SIZES[variant], text_length=1000)
    marker = model.config.image_token_id
    ids, grid = torch.tensor([[5, *[marker] * 1200]]), [(1, 4, 6)] * 200
    pixels = torch.zeros(200 * 24, 3 * 2 * 4 * 4)
    with pytest.raises(ValueError, match=r"at most 1000 tokens \(text_length\) with 0 in kv_cache, got 1201"):
        model(ids, pixels, image_grid_thw=grid)
    with pytest.raises(ValueError, match=r"at most 1000 tokens \(text_length\) with 0 in kv_cache, got 1201"):
        model.generate(ids, pixels, image_grid_thw=grid)


@before_encoding
def test_an_image_of_fewer_tokens_than_are_kept() -> None:
    model = QwenVL.from_size("tiny", reduce="select:6")
    with pytest.raises(ValueError, match=r"keep must be .* 2.*, got 6"):
        model.encode(torch.zeros(24 + 8, model.vision.sizes.inputs), [(1, 4, 6), (1, 2, 4)])


def test_bad_reducers() -> None:
    model = QwenVL.from_size("tiny")
    for text in ("pool", "shuffle:2", "perceiver:4", "half", 2):
        with pytest.raises((TypeError, ValueError), match="redu"):
            model.set_reducer(text)  # type: ignore[arg-type]
    assert model.reducer is None


def test_a_grid_of_any_kind(ours: Ours) -> None:
    """A tensor, an int32 one, tuples and lists are the same."""
    given, model = prompts("qwen2_5_vl", (2, (1, 4, 6), (1, 2, 4))), ours("qwen2_5_vl")
    grid = given.pop("image_grid_thw")
    with torch.no_grad():
        first, *others = (
            model(**given, image_grid_thw=kind).logits
            for kind in (grid, grid.int(), grid.tolist(), tuple(map(tuple, grid.tolist())))
        )
    assert all(torch.equal(first, other) for other in others)
