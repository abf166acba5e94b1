"""Pooled frames and image tokens of transformers by `pool_tokens`: the same values and gradients."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from patching_helpers import apply, compared
from torch import Tensor, nn
from transformers import Gemma3Config
from transformers.models.gemma3.modeling_gemma3 import Gemma3MultiModalProjector
from transformers.models.perception_lm.modeling_perception_lm import PerceptionLMMultiModalProjector
from transformers.models.video_llama_3.modeling_video_llama_3 import VideoLlama3VisionModel

import mmkernels
from mmkernels.integrations.patching import pooling
from mmkernels.integrations.patching.changes import Left
from mmkernels.integrations.patching.classes import is_patched
from mmkernels.integrations.transformers.support_compare import one_pass
from mmkernels.testing.families import FAMILIES
from mmkernels.testing.models import randomise, seeded
from mmkernels.testing.parts import vision


def assert_equal(ours: dict[str, Tensor], expected: dict[str, Tensor], rounding: float) -> None:
    assert ours.keys() == expected.keys()
    for key, x in expected.items():
        assert ours[key].shape == x.shape, key
        torch.testing.assert_close(ours[key], x, rtol=0, atol=rounding * float(x.abs().max()), msg=key)


def assert_the_same(module: nn.Module, *args: Any, method: str = "forward", rounding: float = 1e-12) -> None:
    expected = compared(module, method, *args)
    assert len(apply(pooling.find, module)) == 1
    assert_equal(compared(module, method, *args), expected, rounding)


def tokens(*shape: int) -> Tensor:
    with seeded(0):
        return torch.randn(*shape, dtype=torch.float64)


def gemma3(side: int) -> nn.Module:
    config = Gemma3Config(
        vision_config=vision(image=8 * side, width=12, heads=2),
        text_config={"hidden_size": 8, "head_dim": 8},
        mm_tokens_per_image=4,
    )
    return randomise(Gemma3MultiModalProjector(config)).double()


@pytest.mark.parametrize("side", [4, 5])
def test_gemma3_drops_what_does_not_fill_a_window(side: int) -> None:
    assert_the_same(gemma3(side), tokens(2, side * side, 12), rounding=1e-6)  # its norm is in float32


def perception_lm(ratio: int) -> nn.Module:
    config = SimpleNamespace(
        vision_config=SimpleNamespace(model_args={"embed_dim": 12}),
        text_config=SimpleNamespace(hidden_size=8),
        projector_pooling_ratio=ratio,
    )
    return randomise(PerceptionLMMultiModalProjector(config)).double()


@pytest.mark.parametrize("side", [4, 5])  # 5: parts of different sizes
def test_perception_lm(side: int) -> None:
    module = perception_lm(2)
    assert_the_same(module, tokens(2, side * side, 12))
    rows: list[int] = []
    module.linear_2.register_forward_hook(lambda layer, args, out: rows.append(out.shape[1]))
    module(tokens(2, side * side, 12))
    assert rows == [4], "pooled before the last layer"


def test_perception_lm_with_another_last_layer_goes_its_way() -> None:
    module = perception_lm(2)
    module.linear_2 = nn.Sequential(module.linear_2, nn.ReLU())
    assert_the_same(module, tokens(2, 16, 12))


def test_perception_lm_that_does_not_pool_is_left() -> None:
    (found,) = pooling.find(perception_lm(1))
    assert isinstance(found, Left) and found.why == "it does not pool"


@pytest.mark.parametrize("merge", [(1, 1), (2, 2), (1, 2)])
def test_video_llama3(merge: tuple[int, int]) -> None:
    module = VideoLlama3VisionModel.__new__(VideoLlama3VisionModel)
    nn.Module.__init__(module)
    grid = torch.tensor([[1, 4, 6], [3, 2, 4]])
    assert_the_same(module, tokens(48, 6), grid, torch.tensor(merge), method="pixel_unshuffle")


AUDIO = ("qwen2_audio",)


@pytest.mark.parametrize("name", AUDIO)
def test_pooled_audio_frames(name: str) -> None:
    model, inputs = FAMILIES[name].build()
    expected = one_pass(FAMILIES[name], model, inputs)
    (change,) = apply(pooling.find, model)
    assert isinstance(change.module, nn.AvgPool1d) and is_patched(change.module)
    ours = one_pass(FAMILIES[name], model, inputs)
    assert_equal(ours.outputs, expected.outputs, 1e-5)
    assert_equal(ours.grads, expected.grads, 1e-4)


@pytest.mark.parametrize("frames", [8, 9, 1])
@pytest.mark.parametrize("transposed", [True, False])
def test_frames_in_any_layout(frames: int, transposed: bool) -> None:
    class Qwen2AudioEncoder(nn.Module):
        pass

    pool = nn.AvgPool1d(2, stride=2)
    x = tokens(2, frames, 6).transpose(1, 2) if transposed else tokens(2, 6, frames)
    if frames == 1:
        with pytest.raises(RuntimeError):
            pooling._frames(pool, x)
        return
    torch.testing.assert_close(pooling._frames(pool, x), pool(x), rtol=0, atol=1e-15)
    assert torch.equal(pooling._frames(pool, x[0]), pool(x[0])), "without a batch"


def test_overlapping_windows_of_frames_are_left() -> None:
    model, _ = FAMILIES["qwen2_audio"].build()
    model.model.audio_tower.avg_pooler = nn.AvgPool1d(3, stride=2)
    (found,) = pooling.find(model)
    assert isinstance(found, Left) and "overlap" in found.why


VIDEO = FAMILIES["llava_onevision"]


def onevision() -> tuple[Any, dict[str, Any]]:
    model, inputs = VIDEO.build()
    return model.double(), {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}


def test_llava_onevision_pools_before_its_last_layer() -> None:
    model, inputs = onevision()
    expected = one_pass(VIDEO, model, inputs)
    assert len(apply(pooling.find, model)) == 2
    rows: list[int] = []
    projector = model.model.multi_modal_projector
    projector.linear_2.register_forward_hook(lambda layer, args, out: rows.append(out.shape[1]))
    ours = one_pass(VIDEO, model, inputs)
    assert rows == [4], "of 16 tokens a frame"
    assert_equal(ours.outputs, expected.outputs, 1e-6)
    assert_equal(ours.grads, expected.grads, 1e-5)


def test_llava_onevision_does_not_pool_images() -> None:
    model, _ = onevision()
    projector = model.model.multi_modal_projector
    x = tokens(2, 16, projector.linear_1.in_features)
    expected = projector(x)
    apply(pooling.find, model)
    assert torch.equal(projector(x), expected)
    y = tokens(2, 16, 5)
    assert model.model.apply_pooling(y).shape == (2, 4, 5), "called by itself it pools"


def test_llava_onevision_compiles_in_one_graph() -> None:
    model, inputs = VIDEO.build()
    video = inputs["pixel_values_videos"]
    with torch.no_grad():
        expected = model.model.get_video_features(video).pooler_output
        apply(pooling.find, model)
        compiled = torch.compile(model.model.get_video_features, backend="eager", fullgraph=True)
        assert_equal({"features": compiled(video).pooler_output}, {"features": expected}, 1e-5)


@pytest.mark.parametrize("patched_first", [True, False])
def test_llava_onevision_in_the_middle_of_a_video(patched_first: bool) -> None:
    """As another thread may do it: the model is unpatched, or patched, between the projector and the pooling."""
    model, inputs = onevision()
    video = inputs["pixel_values_videos"]
    expected = model.model.get_video_features(video).pooler_output
    if patched_first:
        mmkernels.patch(model, verbose=False)
    change = mmkernels.unpatch if patched_first else mmkernels.patch
    hook = model.model.multi_modal_projector.register_forward_hook(lambda *_: change(model, verbose=False) and None)
    got = model.model.get_video_features(video).pooler_output
    hook.remove()
    assert_equal({"features": got}, {"features": expected}, 1e-6)
    assert_equal({"features": model.model.get_video_features(video).pooler_output}, {"features": expected}, 1e-6)


def test_generate_finds_the_arguments_of_get_video_features() -> None:
    model, _ = VIDEO.build()
    expected = inspect.signature(model.model.get_video_features)
    apply(pooling.find, model)
    assert inspect.signature(model.model.get_video_features) == expected
