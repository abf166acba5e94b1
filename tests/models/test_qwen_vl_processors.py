"""Prompts, images and videos by way of transformers' processors: what they return goes into our model as it is."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from checkpoints import Saved, distance
from numpy.typing import NDArray
from PIL import Image
from qwen_checkpoints import FRACTIONS, PLAIN
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers.utils import is_torchvision_available
from transformers.video_processing_utils import BaseVideoProcessor
from transformers.video_utils import VideoMetadata

from mmkernels.models import QwenVL
from mmkernels.testing.parts import IMAGE, IMAGE_END, IMAGE_START, VIDEO

TOLERANCE = 5e-6
PHOTO, CLIP = "<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>"
FRAMES_PER_SECOND = 3.0 if FRACTIONS else 2.0

Video = NDArray[np.uint8]
"""``[frames, height, width, 3]``"""


class Frames(BaseVideoProcessor):  # type: ignore[misc]
    """Cuts videos into patches as transformers' own video processors do, which need torchvision. It resizes nothing."""

    patch_size, temporal_patch_size, merge_size = 8, 2, 2
    model_input_names = ("pixel_values_videos", "video_grid_thw")

    def __call__(self, videos: list[Video], *, video_metadata: Any = None, **options: Any) -> dict[str, Any]:
        cut = [self._cut(torch.from_numpy(video).permute(0, 3, 1, 2).float() / 255) for video in videos]
        return {
            "pixel_values_videos": torch.cat([patches for patches, _ in cut]),
            "video_grid_thw": torch.tensor([grid for _, grid in cut]),
            "video_metadata": video_metadata,
        }

    def _cut(self, video: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
        p, f, m = self.patch_size, self.temporal_patch_size, self.merge_size
        if len(video) % f:
            video = torch.cat([video, video[-1:].expand(f - len(video) % f, -1, -1, -1)])
        t, h, w = len(video) // f, video.shape[2] // p, video.shape[3] // p
        parts = video.view(t, f, 3, h // m, m, p, w // m, m, p).permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
        return parts.reshape(t * h * w, 3 * f * p * p), (t, h, w)


def tokenizer() -> Any:
    """One token a letter, with the ids of the small models."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789 .,<>?"
    special = {"<|vision_end|>": IMAGE_END, "<|vision_start|>": IMAGE_START}
    special |= {"<|video_pad|>": VIDEO, "<|image_pad|>": IMAGE}
    words = {letter: 5 + number for number, letter in enumerate(letters)} | {"<pad>": 0} | special
    plain = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    plain.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", padding_side="left", additional_special_tokens=[*special]
    )


def processor(variant: str) -> Any:
    sizes = {"patch_size": 8, "temporal_patch_size": 2, "merge_size": 2}
    name = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}[variant]
    videos: Any = Frames()
    if is_torchvision_available():
        kind = transformers.Qwen3VLVideoProcessor if variant == "qwen3_vl" else transformers.Qwen2VLVideoProcessor
        videos = kind(**sizes, do_resize=False, do_sample_frames=False)
    images = transformers.Qwen2VLImageProcessorPil(**sizes, size={"shortest_edge": 256, "longest_edge": 4096})
    whole = getattr(transformers, f"{name}Processor")
    if not is_torchvision_available():  # it looks for the class that `Frames` stands in for
        whole = type(whole.__name__, (whole,), {"check_argument_for_proper_class": lambda *x: None})
    return whole(images, tokenizer(), videos)


def photo(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8))


def video(frames: int, height: int, width: int) -> Video:
    return np.random.default_rng(frames).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def metadata(*videos: Video) -> list[VideoMetadata]:
    return [
        VideoMetadata(
            total_num_frames=len(each),
            fps=FRAMES_PER_SECOND,
            duration=len(each) / FRAMES_PER_SECOND,
            frames_indices=list(range(len(each))),
        )
        for each in videos
    ]


def prepared(variant: str, *texts: str, images: Any = None, videos: Any = None) -> dict[str, Any]:
    """Returns what the processor makes of prompts."""
    options: dict[str, Any] = {"return_tensors": "pt", "padding": True}
    if videos is not None:
        options |= {"videos": videos, "video_metadata": metadata(*videos), "do_sample_frames": False}
    return dict(processor(variant)(images=images, text=list(texts), **options))


def same(saved: Saved, ours: QwenVL, given: dict[str, Any]) -> None:
    """Both models give the same logits and the same tokens."""
    with torch.no_grad():
        expected, logits = saved.theirs(**given).logits, ours(**given).logits
    valid = given["attention_mask"].bool()
    assert distance(logits[valid], expected[valid]) < TOLERANCE
    tokens = saved.theirs.generate(**given, max_new_tokens=4, do_sample=False, eos_token_id=None)
    new = ours.generate(**given, max_new_tokens=4, eos_token_id=()).tokens
    assert torch.equal(new, tokens[:, given["input_ids"].shape[1] :])


Checkpoints = Callable[[str], Saved]
Ours = Callable[[str], QwenVL]
pytestmark = pytest.mark.parametrize("variant", PLAIN)


def test_images(saved: Checkpoints, ours: Ours, variant: str) -> None:
    texts = f"look {PHOTO} and {PHOTO}, what is it?", f"{PHOTO}why?"
    given = prepared(variant, *texts, images=[photo(33, 60), photo(90, 20), photo(48, 48)])
    assert {tuple(grid) for grid in given["image_grid_thw"].tolist()} == {(1, 4, 8), (1, 12, 2), (1, 6, 6)}
    same(saved(variant), ours(variant), given)


def test_text(saved: Checkpoints, ours: Ours, variant: str) -> None:
    same(saved(variant), ours(variant), prepared(variant, "hello", "how are you?"))


def test_videos(saved: Checkpoints, ours: Ours, variant: str) -> None:
    """Of an odd number of frames, and beside an image; "qwen3" writes the time of each step into the prompt."""
    texts = f"a {CLIP} then {PHOTO}?", f"{CLIP}"
    given = prepared(variant, *texts, images=[photo(32, 48)], videos=[video(5, 32, 48), video(4, 48, 16)])
    assert given["video_grid_thw"].tolist() == [[3, 4, 6], [2, 6, 2]]
    assert ("second_per_grid_ts" in given) == (variant == "qwen2_5_vl")
    same(saved(variant), ours(variant), given)


def test_a_video_of_one_frame(saved: Checkpoints, ours: Ours, variant: str) -> None:
    """The processor shows the frame twice; without that its patches are too small."""
    given = prepared(variant, f"a {CLIP}?", videos=[video(1, 32, 48)])
    assert given["video_grid_thw"].tolist() == [[1, 4, 6]]
    same(saved(variant), ours(variant), given)
    given["pixel_values_videos"] = given["pixel_values_videos"][:, : 3 * 8 * 8]
    with pytest.raises(ValueError, match=r"must be floating \[24, 384\] by video_grid_thw, got .*192"):
        ours(variant)(**given)


def test_a_long_thin_image(ours: Ours, variant: str) -> None:
    """The processor refuses it, as does the model if it is cut into patches all the same."""
    with pytest.raises(ValueError, match="aspect ratio must be smaller than 200"):
        prepared(variant, PHOTO, images=[photo(1, 10_000)])
    model = ours(variant)
    with pytest.raises(ValueError, match=r"must have h and w divisible by 2, got \(1, 1250\) of image 0"):
        model(torch.tensor([[5]]), torch.zeros(1250, 384), image_grid_thw=[(1, 1, 1250)])


def test_many_images(saved: Checkpoints, ours: Ours, variant: str) -> None:
    given = prepared(variant, "a" + PHOTO * 200 + "b", images=[photo(16, 16)] * 200)
    assert prod(given["input_ids"].shape) == 2 + 3 * 200
    with torch.no_grad():
        assert distance(ours(variant)(**given).logits, saved(variant).theirs(**given).logits) < TOLERANCE
