"""The DeepSeek line in the profiler: images of one size, two encoders, tiles with ends of rows."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console

from mmkernels.options import BadInput
from mmkernels.profiling import profiler, table
from mmkernels.profiling.options import REDUCERS, Choice, Options
from mmkernels.profiling.photo import crops, default_photo

PHOTO = Image.open(default_photo()).convert("RGB")
FIXED = ("deepseek_vl", "deepseek_vl_hybrid", "janus")
MODELS = (*FIXED, "deepseek_vl2")
PLACES = 16  # of an image of the smallest sizes


def options(model: str, **more: Any) -> Options:
    settings = {"images": 2, "text_length": 12, "size": "tiny"} | more
    if model == "deepseek_vl2":
        settings = {"resolutions": (20, 60)} | settings
    return Options(model=model, image=default_photo(), **settings)


def made(model: str, row: Choice) -> tuple[Any, Any, Any, Options]:
    """Returns the adapter, its model, inputs of two images, and the options."""
    adapter: Any = profiler.REDUCING[model]
    chosen = options(model)
    built = adapter.build(chosen, row)
    return adapter, built, adapter.inputs(chosen, built, crops(PHOTO, 2, square=adapter.square), row), chosen


def words(report: dict[str, Any]) -> str:
    console = Console(width=100, no_color=True)
    with console.capture() as capture:
        console.print(table.render(report))
    assert max(map(len, capture.get().splitlines())) <= 100
    return " ".join(capture.get().split())


@pytest.mark.parametrize("model", MODELS)
def test_a_profile_has_every_stage_and_both_backends(model: str) -> None:
    told: list[str] = []
    more = {} if model == "deepseek_vl2" else {"reduce": ("pool:2", "select:0.25")}
    chosen = options(model, backends=("fused", "reference"), train=model == "deepseek_vl", **more)
    report = profiler.profile(chosen, PHOTO, told.append)
    assert len(told) == profiler.steps(chosen)
    sam = ["encode SAM"] if model == "deepseek_vl_hybrid" else []
    assert list(report["stages"]) == ["encode", *sam, "merge", "prefill", "decode"]
    assert report["total"]["stages"] == ["encode", *sam, "merge", "prefill"]
    for fused, naive in zip(report["cells"][::2], report["cells"][1::2], strict=True):
        assert min(fused["seconds"].values()) > 0 and report["stages"].keys() <= fused["seconds"].keys()
        assert fused["drift"]["relative_l2"] == pytest.approx(naive["drift"]["relative_l2"], rel=1e-3, abs=1e-5)
    shown = words(report)
    assert "a class token" not in shown and "of all logits of text tokens" in shown
    said = [cell["tokens_per_image"] for cell in report["cells"][::2]]
    assert said == ([27, 13] if model == "deepseek_vl2" else [PLACES, 4, 4])


@pytest.mark.parametrize("reducer", ["none", "tome:0.5", "select:0.25"])
@pytest.mark.parametrize("model", FIXED)
def test_stages_are_the_whole_model(model: str, reducer: str) -> None:
    """Each encoder runs once, in its own stage."""
    adapter, net, inputs, _ = made(model, Choice(reducer))
    calls: list[str] = []
    parts = {"vision": net.vision.blocks[0].mlp_norm, "aligner": net.aligner, "decoder": net.decoder}
    parts |= {"sam": net.sam.blocks[0].mlp_norm} if model == "deepseek_vl_hybrid" else {}
    for name, module in parts.items():
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
    state: Any = None
    done = []
    with torch.inference_mode():
        for stage in adapter.stages[:-1]:
            state = stage.run(net, inputs, state)
            done.append(tuple(calls))
            calls.clear()
        names = ("pixel_values", "high_res_pixel_values")
        images = dict(zip(names, inputs.images, strict=False))
        whole = net(inputs.input_ids, **images, last_logits_only=True)
    sam = [("sam",)] if model == "deepseek_vl_hybrid" else []
    assert done == [("vision",), *sam, ("aligner",), ("decoder",)]
    assert state.token.item() == whole.logits[0, -1, : inputs.text_ids].argmax().item()
    assert "forward" not in vars(net.vision) and "with_heads" not in vars(net.vision)


def test_tiles_stages_are_the_whole_model() -> None:
    adapter, net, inputs, _ = made("deepseek_vl2", Choice("none", 60))
    state: Any = None
    with torch.inference_mode():
        for stage in adapter.stages[:-1]:
            state = stage.run(net, inputs, state)
        pixels, tiles = inputs.images
        whole = net(inputs.input_ids, pixel_values=pixels, tiles=tiles, last_logits_only=True)
    assert state.token.item() == whole.logits[0, -1, : inputs.text_ids].argmax().item()


@pytest.mark.parametrize("size", [(512, 600), (900, 300), (100, 100)])
def test_tokens_are_those_of_the_model(size: tuple[int, int]) -> None:
    adapter: Any = profiler.REDUCING["deepseek_vl2"]
    chosen = options("deepseek_vl2", images=1)
    net, photo = adapter.build(chosen, Choice("none", 60)), PHOTO.resize(size)
    for side in (20, 40, 60, 90):
        inputs = adapter.inputs(chosen, net, [photo], Choice("none", side))
        _, tiles = inputs.images
        layout = inputs.layout
        assert tiles == [(layout.across, layout.down)] and layout.tokens == net.num_image_tokens(tiles[0])
        assert int((inputs.input_ids == net.config.image_token_id).sum()) == layout.tokens
        assert adapter.reduction(net, inputs).tokens == layout.tokens
    assert tiles[0][0] * tiles[0][1] > 1


def test_published_images_have_the_paper_s_numbers_of_tokens() -> None:
    adapter: Any = profiler.REDUCING["deepseek_vl2"]
    config = adapter.config(options("deepseek_vl2", size="small"))
    found = [adapter.layout(config, PHOTO, side).tokens for side in (224, 448, 896)]
    assert found[0] == 421 and found == sorted(set(found)) and found[-1] == 2017


def test_rows_share_their_weights() -> None:
    adapter, whole, *_, chosen = made("janus", Choice("none"))
    other = adapter.exchange(chosen, whole, Choice("pool:2"))
    assert (whole.reducer.text, other.reducer.text) == ("none", "pool:2")
    assert other.head.weight is whole.head.weight
    adapter, whole, *_, chosen = made("deepseek_vl2", Choice("none", 20))
    assert adapter.exchange(chosen, whole, Choice("none", 60)).reducer is None


def test_images_are_prepared_as_by_transformers_processors() -> None:
    _, _, inputs, _ = made("deepseek_vl_hybrid", Choice("none"))
    small, large = inputs.images
    assert small.shape == (2, 3, 32, 32) and large.shape == (2, 3, 64, 64)
    assert -1 <= float(small.min()) < -0.5 and 0.5 < float(small.max()) <= 1
    assert float(large.min()) < -1.5 and float(large.max()) > 1  # CLIP's mean and deviation
    assert inputs.layout.tokens == PLACES and inputs.input_ids.shape == (1, 12 + 2 * PLACES)


def test_the_naive_loss_is_the_same_loss() -> None:
    adapter, net, inputs, _ = made("deepseek_vl_hybrid", Choice("select:0.25"))
    net.double()
    inputs = replace(inputs, images=tuple(x.double() for x in inputs.images))
    losses = adapter.loss(net, inputs), adapter.naive_loss(net, inputs)
    torch.testing.assert_close(losses[0].float(), losses[1], rtol=1e-6, atol=0)  # the naive one is in float32


@pytest.mark.parametrize("model", MODELS)
def test_sizes_exist_and_say_what_they_leave_out(model: str) -> None:
    adapter: Any = profiler.REDUCING[model]
    for name, size in adapter.named.items():
        config = replace(adapter.model_class.sizes[size.name], **size.changes)
        assert (config.vision_layers == 2 and config.text_layers <= 3) == (name != "base")
        assert ("2 layers each of encoder and text" in adapter.about[name]) == (name == "small")
        chosen = Options(model, default_photo(), size=name)
        profiler.find_model(chosen)
        profiler.check_photo(chosen, PHOTO)


def test_defaults_suit_the_models() -> None:
    janus, tiles = Options("janus", default_photo()), Options("deepseek_vl2", default_photo())
    assert janus.rows == tuple(Choice(text) for text in REDUCERS) and janus.images == 1
    assert tiles.rows == (Choice("none", 896), Choice("none", 448), Choice("none", 224))
    assert janus.backends == tiles.backends == ("fused",)


@pytest.mark.parametrize(
    ("model", "given", "match"),
    [
        ("janus", {"resolutions": (224,)}, "--resolutions must not be given for janus, whose images .* got 224"),
        ("deepseek_vl2", {"reduce": ("pool:2",)}, "--reduce must not be given for deepseek_vl2, .*; got pool:2"),
        ("deepseek_vl", {"tokens": (4,)}, "--tokens must not be given for deepseek_vl, .*; got 4"),
        ("deepseek_vl", {"reduce": ("select:50",)}, "--reduce select:50: keep must be"),
        ("deepseek_vl", {"images": 1000, "text_length": 1001}, "--images and --text-length must leave the prompt"),
        ("deepseek_vl2", {"resolutions": (60,), "images": 900, "text_length": 901}, "--resolutions must leave the"),
    ],
)
def test_bad_settings_are_found_before_anything_is_measured(model: str, given: dict[str, Any], match: str) -> None:
    def check() -> None:
        chosen = options(model, **given)
        profiler.find_model(chosen)
        profiler.check_photo(chosen, PHOTO)

    with pytest.raises(BadInput, match=match):
        check()


def test_a_photograph_that_is_too_long() -> None:
    with pytest.raises(BadInput, match="--image must be a pixel wide or more with --resolutions 60, got 1 x 10000"):
        profiler.check_photo(options("deepseek_vl2"), Image.new("RGB", (1, 10000)))


def test_a_checkpoint_of_the_other_kind(tmp_path: Any) -> None:
    from models_pairs import deepseek_vl_config
    from transformers import DeepseekVLConfig

    from mmkernels.models import DeepSeekVL

    architecture, values = deepseek_vl_config(DeepSeekVL.sizes["tiny"])
    DeepseekVLConfig(**values, architectures=[architecture]).save_pretrained(tmp_path)
    with pytest.raises(BadInput, match="--model must be a checkpoint of deepseek_vl_hybrid, got one of deepseek_vl"):
        profiler.find_model(options("deepseek_vl_hybrid", size=None, folder=tmp_path))
