"""BLIP-2 in the profiler: the number of queries is that of the visual tokens."""

from typing import Any

import pytest
import torch
from PIL import Image

from mmkernels.options import BadInput
from mmkernels.profiling import plot, profiler, table
from mmkernels.profiling.blip2 import BLIP2Adapter
from mmkernels.profiling.options import Options
from mmkernels.profiling.photo import crops, default_photo

PHOTO = Image.open(default_photo()).convert("RGB")


def options(**more: Any) -> Options:
    settings = {"tokens": (4,), "images": 2, "text_length": 12, "size": "tiny"} | more
    return Options(model="blip2", image=default_photo(), **settings)


def made(tokens: int) -> tuple[BLIP2Adapter, Any, Any]:
    """Returns the adapter, its model and its inputs."""
    adapter, chosen = BLIP2Adapter(), options(tokens=(tokens,))
    model = adapter.build(chosen, tokens)
    return adapter, model, adapter.inputs(chosen, model, crops(PHOTO, 2), tokens)


@torch.no_grad()
def test_stages_make_up_the_model() -> None:
    adapter, model, inputs = made(5)
    marked = inputs.input_ids == model.config.image_token_id
    assert inputs.input_ids.shape == (1, 12 + 2 * 5) and int(marked.sum()) == 10
    states: list[Any] = [None]
    for stage in adapter.stages:
        states.append(stage.run(model, inputs, stage.fork(states[-1])))
    _, features, visual, read, decoded = states
    assert features.shape == (2, 17, model.config.vision_width)
    assert visual.lengths == visual.marked == (5, 5) and visual.tokens.shape == (10, model.config.text_width)
    logits = adapter.logits(model, inputs)
    assert torch.equal(read.token, logits[:, -1:, : inputs.text_ids].argmax(-1))
    assert read.kv_cache.num_tokens == 22 and decoded.kv_cache.num_tokens == 30


def test_the_naive_loss_is_the_same_loss() -> None:
    adapter, model, inputs = made(4)
    model.double()
    inputs = type(inputs)(**vars(inputs) | {"pixel_values": inputs.pixel_values.double()})
    trained = {name: x for name, x in model.named_parameters() if x.requires_grad}
    assert {name.split(".")[0] for name in trained} == {"qformer", "projection"}
    losses = adapter.loss(model, inputs), adapter.naive_loss(model, inputs)
    gradients = [torch.autograd.grad(loss, list(trained.values())) for loss in losses]
    torch.testing.assert_close(losses[0].float(), losses[1], rtol=1e-6, atol=0)  # the naive one is in float32
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)


def test_a_row_is_a_number_of_queries() -> None:
    report = profiler.profile(options(tokens=(6,), backends=("fused",)), PHOTO)
    (cell,) = report["cells"]
    assert (cell["tokens_per_image"], cell["visual_tokens"]) == (6, 12) and report["rows"] == [6]
    assert set(cell["seconds"]) == {*report["stages"], "total"}
    assert list(report["stages"]) == ["encode", "resample", "prefill", "decode"]
    assert report["total"]["stages"] == ["encode", "resample", "prefill"]
    assert report["command"].startswith("mmkernels profile blip2 --image grace_hopper.jpg --tokens 6 --images 2 ")
    assert table.summary(report).startswith("6 tokens x 2 images: prefill ")
    assert plot.title_of_model(report["settings"]) == "blip2 tiny"


def test_a_token_s_cost_below_the_noise_is_not_told() -> None:
    slopes = {"prefill": 2e-6, "total": -3e-6}
    cell = {"backend": "fused", "failed": None, "tokens_per_image": 8, "peak_memory_bytes": None, "amdahl": {}}
    report: dict[str, Any] = {
        "settings": {"images": 1, "reduce": None},
        "total": {"name": "first token", "stages": ["encode", "prefill"]},
        "cells": [cell | {"seconds": {"prefill": 1e-3}}],
        "marginal_seconds_per_visual_token": {"fused": slopes, "reference": slopes | {"total": 4e-6}},
    }
    assert table.summary(report).endswith("; a visual token costs 2.0 us of prefill (naive 2.0 us).")
    report["marginal_seconds_per_visual_token"] = {"fused": slopes | {"prefill": 0.0}}
    assert table.summary(report).endswith(": prefill 1.00 ms.")


def test_defaults_suit_an_image_and_a_question() -> None:
    chosen = Options("blip2", default_photo())
    assert (chosen.images, chosen.text_length, chosen.rows) == (1, 64, (8, 32, 128))
    assert chosen.backends == ("fused", "reference") and chosen.size == "small"
    for size in BLIP2Adapter.sizes:
        profiler.find_model(Options("blip2", default_photo(), size=size, tokens=(8,), text_length=24))


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"tokens": None, "reduce": ("pool:2",)}, "--reduce must not be given for blip2, .* --tokens .* got pool:2"),
        ({"tokens": None, "resolutions": (224, 448)}, "--resolutions must not be given for blip2, .*; got 224,448"),
        ({"reduce": ("pool:2",)}, "--reduce must not be given for blip2"),
        ({"folder": default_photo().parent}, "--model must be for one of qwen2_vl, .*; got blip2"),
        ({"size": "huge"}, "--size must be one of tiny, small, base; got 'huge'"),
        ({"tokens": (4, 60)}, "--tokens must leave the prompt and 8 tokens more within 128, got 140 by 60, --images 2"),
    ],
)
def test_bad_settings_are_found_before_anything_is_measured(given: dict[str, Any], match: str) -> None:
    with pytest.raises(BadInput, match=match):
        profiler.find_model(options(**given))
