"""The profiler over resolutions and reducers: models in which images are tokens of the text, and Flamingo."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from PIL import Image
from rich.console import Console

from mmkernels.models.qwen_vl import QwenVL
from mmkernels.options import BadInput
from mmkernels.profiling import (
    draw,
    encoder,
    pareto,
    plot,
    plot_parts,
    plot_tradeoff,
    profiler,
    reading,
    table,
    vision_language,
)
from mmkernels.profiling.options import RESOLUTIONS, Choice, Options
from mmkernels.profiling.photo import crops, default_photo, paint
from mmkernels.testing.families import FAMILIES

PHOTO = Image.open(default_photo()).convert("RGB")  # 512 x 600
MODELS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl")
REDUCERS = ("none", "pool:2", "tome:0.5", "select:0.25", "diverse:4")


def options(model: str = "qwen2_5_vl", **more: Any) -> Options:
    settings = {"resolutions": (32, 64), "reduce": REDUCERS, "text_length": 12, "size": "tiny"} | more
    return Options(model=model, image=default_photo(), **settings)


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return profiler.profile(options(), PHOTO)


def render(report: dict[str, Any]) -> str:
    console = Console(width=100, no_color=True)
    with console.capture() as capture:
        console.print(table.render(report))
    return capture.get()


def words(text: str) -> str:
    return " ".join(text.split())


def cells(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {str(pareto.row_of(cell)): cell for cell in report["cells"] if cell["backend"] == "fused"}


def test_rows_are_resolutions_with_reducers_the_largest_first(report: dict[str, Any]) -> None:
    assert json.loads(json.dumps(report)) == report
    assert report["rows"] == [f"{side} {reducer}" for side in (64, 32) for reducer in REDUCERS]
    tokens = {row: cell["tokens_per_image"] for row, cell in cells(report).items()}
    assert tokens == {
        "64 none": 56, "64 pool:2": 16, "64 tome:0.5": 28, "64 select:0.25": 14, "64 diverse:4": 4,
        "32 none": 12, "32 pool:2": 4, "32 tome:0.5": 6, "32 select:0.25": 3, "32 diverse:4": 4,
    }  # fmt: skip
    for cell in report["cells"]:
        assert set(cell["seconds"]) == {"encode", "merge", "prefill", "decode", "total"}
        row = f"{cell['resolution']} none"
        assert cell["seconds"]["encode"] == cells(report)[row]["seconds"]["encode"]  # measured once
        assert report["memory_why_not"] or cell["peak_memory_bytes"] > 0


def test_drift_is_from_the_largest_images_with_all_tokens(report: dict[str, Any]) -> None:
    drifts = {row: cell["drift"]["relative_l2"] for row, cell in cells(report).items()}
    assert drifts.pop("64 none") == 0
    assert all(0.01 < drift < 2 for drift in drifts.values())
    assert "from those of 64 none, the largest images with all tokens, fused" in words(render(report))


def test_command_repeats_the_profile(report: dict[str, Any]) -> None:
    assert report["command"] == (
        "mmkernels profile qwen2_5_vl --image grace_hopper.jpg --resolutions 64,32 "
        f"--reduce {','.join(REDUCERS)} --images 1 --text-length 12 --backend fused --dtype fp32 --device cpu "
        "--size tiny"
    )


@pytest.mark.parametrize("model", MODELS)
def test_every_model_against_the_naive_baseline(model: str) -> None:
    """The same drift by both backends: a reducer's choice does not depend on rounding here."""
    chosen = options(
        model, resolutions=(48,), reduce=("pool:2", "tome:0.5"), backends=("fused", "reference"), images=2, train=True
    )
    told: list[str] = []
    report = profiler.profile(chosen, PHOTO, told.append)
    assert len(told) == profiler.steps(chosen)
    for fused, naive in zip(report["cells"][::2], report["cells"][1::2], strict=True):
        drifts = fused["drift"]["relative_l2"], naive["drift"]["relative_l2"]
        if fused["reducer"] == "none":
            assert drifts[1] == 0 and drifts[0] < 1e-5
        else:
            assert drifts[0] == pytest.approx(drifts[1], rel=1e-3) and drifts[0] > 0.01
        assert fused["visual_tokens"] == 2 * fused["tokens_per_image"]
        assert set(fused["amdahl"]) == {"encode", "merge", "prefill", "decode", "total", "train_step"}
        assert fused["naive_loss"]["train_step"] > 0
    lines = [line.rstrip() for line in render(report).splitlines()]
    assert max(map(len, lines)) <= 100 and "…" not in "".join(lines)


@pytest.mark.parametrize("reducer", ["none", "tome:0.5", "select:0.25"])
def test_stages_are_the_whole_model(reducer: str) -> None:
    """What comes out of the last stage is what the model says in one call; every stage does only its own work."""
    chosen = options("qwen3_vl", images=2)
    adapter = profiler.REDUCING["qwen3_vl"]
    row = Choice(reducer, 64)
    model: Any = adapter.build(chosen, row)
    inputs = adapter.inputs(chosen, model, crops(PHOTO, 2, square=False), row)
    calls: list[str] = []
    for name, module in (("vision", model.vision.blocks[0]), ("merger", model.merger), ("decoder", model.decoder)):
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
    state: Any = None
    states = []
    with torch.inference_mode():
        for stage in adapter.stages[:3]:
            state = stage.run(model, inputs, state)
            states.append((state, tuple(calls)))
            calls.clear()
        whole = model(inputs.input_ids, inputs.images[0], image_grid_thw=inputs.images[1], last_logits_only=True)
    assert [calls for _, calls in states] == [("vision",), ("merger",), ("decoder",)]
    assert states[2][0].token.item() == whole.logits[0, -1, : inputs.text_ids].argmax().item()
    with torch.inference_mode():
        fused = adapter.logits(model, inputs)
    assert fused.shape[1] == chosen.text_length
    torch.testing.assert_close(fused[0, -1], whole.logits[0, -1])


def test_no_marker_is_decoded() -> None:
    """It would need an image."""
    inputs = reading.Prompt(input_ids=torch.empty(0), text_ids=2)
    logits = torch.tensor([[[9.0, 0.0, 9.0, 9.0], [0.0, 1.0, 5.0, 4.0]]])
    assert reading._next_token(logits, inputs).tolist() == [[1]]


def test_the_naive_loss_is_the_same_loss() -> None:
    adapter = profiler.REDUCING["qwen2_vl"]
    row = Choice("select:0.25", 64)
    model: Any = adapter.build(options("qwen2_vl"), row).double()
    inputs = adapter.inputs(options("qwen2_vl"), model, [PHOTO], row)
    assert adapter.naive_loss is not None
    losses = adapter.loss(model, inputs), adapter.naive_loss(model, inputs)
    torch.testing.assert_close(losses[0].float(), losses[1], rtol=1e-6, atol=0)  # the naive one is in float32
    losses[1].backward()
    assert model.vision.patch.weight.grad.abs().sum() > 0


def test_rows_share_their_weights_but_not_their_reducers() -> None:
    adapter = profiler.REDUCING["qwen2_5_vl"]
    whole: Any = adapter.build(options(), Choice("none", 64))
    other: Any = adapter.exchange(options(), whole, Choice("pool:2", 32))
    assert (whole.reducer.text, other.reducer.text) == ("none", "pool:2")
    shared = dict(other.named_parameters())
    assert all(shared[name] is weight for name, weight in whole.named_parameters())


def test_which_tokens_are_kept(report: dict[str, Any]) -> None:
    about = report["reducers"]
    assert {(x["rows"], x["columns"]) for row, x in about.items() if row.startswith("64")} == {(8, 7)}
    assert about["32 none"]["token_of"] == list(range(12))
    assert about["32 pool:2"]["token_of"] == [0, 0, 1, 0, 0, 1, 2, 2, 3, 2, 2, 3]  # of 4 x 3 tokens
    assert len(set(about["64 tome:0.5"]["token_of"])) == 28
    assert sorted(about["32 select:0.25"]["token_of"]) == [-1] * 9 + [0, 1, 2]


def test_kept_tokens_are_those_of_the_model() -> None:
    """The picture's tokens against the model's own: those that "select" keeps are among all."""
    adapter = profiler.REDUCING["qwen2_5_vl"]
    row = Choice("select:0.25", 64)
    model: Any = adapter.build(options(), row)
    with torch.inference_mode():
        inputs = adapter.inputs(options(), model, [PHOTO], row)
        token_of = adapter.reduction(model, inputs).token_of
        kept = model.encode(*inputs.images).tokens
        model.set_reducer(None)
        every = model.encode(*inputs.images).tokens
    assert token_of is not None
    for patch, token in enumerate(token_of):
        if token >= 0:
            torch.testing.assert_close(kept[token], every[patch])


def test_tiles_of_an_image() -> None:
    """A picture has the tiles where they are, without the thumbnail; each tile is reduced alone."""
    adapter = profiler.REDUCING["internvl"]
    chosen = options("internvl", images=2)
    row = Choice("pool:2", 80)
    model: Any = adapter.build(chosen, row)
    inputs = adapter.inputs(chosen, model, crops(PHOTO, 2, square=False), row)
    assert inputs.layout == vision_language.Layout(4, 4, 2, 2, thumbnail=True)  # tiles of 32 pixels
    pixels, tiles = inputs.images
    assert pixels.shape == (10, 3, 32, 32) and tiles == [5, 5]
    assert int((inputs.input_ids == model.config.image_token_id).sum()) == 2 * 5 * 16
    with torch.inference_mode():
        found = adapter.reduction(model, inputs)
        visual = model.encode(*inputs.images)
    assert (found.tokens, found.rows, found.columns) == (20, 8, 8) and visual.lengths == (20, 20)
    upper = [0, 0, 1, 1, 4, 4, 5, 5]
    lower = [2, 2, 3, 3, 6, 6, 7, 7]
    assert found.token_of is not None
    assert found.token_of[:32] == upper * 2 + lower * 2
    assert found.token_of[32:] == [token + 8 for token in upper * 2 + lower * 2]
    small = adapter.inputs(chosen, model, [PHOTO], Choice("none", 20))
    assert small.layout == vision_language.Layout(2, 2) and small.images[0].shape == (1, 3, 16, 16)


@pytest.mark.parametrize(
    ("size", "resolution", "down", "across"),
    [((500, 500), 64, 2, 2), ((1000, 500), 64, 1, 2), ((300, 900), 70, 3, 1), ((512, 600), 130, 4, 3)],
)
def test_arrangements_of_tiles(size: tuple[int, int], resolution: int, down: int, across: int) -> None:
    adapter: Any = profiler.REDUCING["internvl"]
    layout = adapter.layout(adapter.config(options("internvl")), Image.new("RGB", size), resolution)
    assert (layout.down, layout.across) == (down, across)


# The Pareto front.


def test_the_front_is_what_no_other_row_beats() -> None:
    found = {"a": (3.0, 0.0), "b": (1.0, 0.5), "c": (2.0, 0.5), "d": (2.0, 0.2), "e": (1.0, 0.5), "f": (9.0, 0.3)}
    made = [
        {"reducer": name, "backend": backend, "seconds": {"total": seconds * slower},
         "drift": {"relative_l2": drift, "top1_agreement": 1.0}}
        for name, (seconds, drift) in found.items() for backend, slower in (("fused", 1), ("reference", 0.1))
    ]  # fmt: skip
    assert pareto.front(made, ("fused", "reference")) == ["b", "e", "d", "a"]
    made += [
        {"reducer": "learned", "backend": "fused", "seconds": {"total": 0.1}, "drift": None},
        {"reducer": "untimed", "backend": "fused", "seconds": {}, "drift": {"relative_l2": 0.0, "top1_agreement": 1.0}},
    ]
    assert pareto.front(made, ("fused",)) == ["b", "e", "d", "a"]
    assert pareto.front([], ("fused",)) == [] and pareto.front(made, ()) == []


def test_the_front_is_marked_in_the_table(report: dict[str, Any]) -> None:
    shown = render(report)
    assert max(len(line.rstrip()) for line in shown.splitlines()) <= 100 and "…" not in shown
    rows = [line.split() for line in shown.splitlines() if line.split()[1:2] and line.split()[1] in REDUCERS]
    assert [f"{row[0]} {row[1]}" for row in rows] == report["rows"]
    marked = {f"{row[0]} {row[1]}" for row in rows if row[-2].endswith(table.MARK)}
    assert marked == set(report["pareto"]) and "64 none" in marked
    assert "*: on the Pareto front" in shown
    said = table.summary(report)
    assert all(row in said for row in report["pareto"][:-1])
    assert said.count("as fast") == len(report["pareto"]) - 1  # nine other rows are too many for a sentence


# The picture.


@pytest.fixture
def drawn(figures_of: Callable[[ModuleType], list[Any]]) -> list[Any]:
    """The figures that are drawn."""
    return figures_of(plot_tradeoff)


def test_picture_shows_every_stage(report: dict[str, Any], drawn: list[Any], tmp_path: Path) -> None:
    draw.draw(report, PHOTO, tmp_path / "profile.png")
    with Image.open(tmp_path / "profile.png") as picture:
        assert min(picture.size) > 600
    axes = drawn[0].axes
    titles = ["encode, ms", "merge, ms", "prefill, ms", "decode step, ms", "first token, ms", "peak memory, MB"]
    assert [panel.get_title("left") for panel in axes[:7]] == [*titles, "drift"]
    for line, reducer in zip(axes[2].get_lines(), REDUCERS, strict=True):
        found = [cells(report)[f"{side} {reducer}"] for side in (32, 64)]
        points = sorted((cell["tokens_per_image"], cell["seconds"]["prefill"] * 1e3) for cell in found)
        np.testing.assert_allclose(line.get_xydata(), points)
    front = axes[8].get_lines()[0].get_xydata()
    assert len(front) == len(report["pareto"])
    assert axes[-1].texts[0].get_text() == report["rows"][-1]


@pytest.mark.parametrize("slow", [1, 1000])
def test_texts_of_the_picture_do_not_touch(
    report: dict[str, Any],
    drawn: list[Any],
    overlaps: Callable[[Any], list[tuple[str, str]]],
    tmp_path: Path,
    slow: int,
) -> None:
    """Also where numbers are large: units follow."""
    changed = copy.deepcopy(report)
    for i, cell in enumerate(changed["cells"]):
        cell["seconds"] = dict.fromkeys(cell["seconds"], (20 - i) * slow * 0.01)
        cell["drift"]["relative_l2"] = 0.1 * i
    changed["pareto"] = pareto.front(changed["cells"], ["fused"])
    changed["about_size"] = profiler.REDUCING["qwen2_5_vl"].about["small"]
    draw.draw(changed, PHOTO, tmp_path / "profile.png")
    assert overlaps(drawn[0]) == []
    assert drawn[0].axes[0].get_title("left") == ("encode, ms" if slow == 1 else "encode, s")


def test_words_below_a_photograph_are_of_tokens_where_they_are_not_patches(report: dict[str, Any]) -> None:
    about = {name: found for name, found in report["reducers"].items() if name.startswith("64 ")}
    assert {found["side"] for found in about.values()} == {2}
    said = [plot_parts.caption(found) for found in about.values()]
    assert said[0] == "all 56 tokens" and all("patches" not in words for words in said)
    assert any(" tokens become " in words for words in said) or any(" tokens kept" in words for words in said)
    assert plot_parts.paint_legend(report).startswith("Tokens (2 x 2 patches) that stay alone ")


def test_painted_images_keep_the_photograph_s_shape(report: dict[str, Any]) -> None:
    image = plot_parts.first_image(report, PHOTO)
    assert image.size == PHOTO.size
    assert paint(image, report["reducers"]["64 none"]).shape == (480, 420, 3)  # 8 x 7 tokens of 60 pixels


# Other models, checkpoints, bad input.


def test_flamingo_of_several_resolutions() -> None:
    """Positions are interpolated; all other weights are shared."""
    chosen = options("flamingo", reduce=("none", "pool:2"), backends=("fused",), images=2)
    report = profiler.profile(chosen, PHOTO)
    assert [cell["tokens_per_image"] for cell in report["cells"]] == [65, 17, 17, 5]
    drifts = {row: cell["drift"]["relative_l2"] for row, cell in cells(report).items()}
    assert drifts["64 none"] == 0 and all(0 < drift < 2 for row, drift in drifts.items() if row != "64 none")
    adapter = profiler.REDUCING["flamingo"]
    whole: Any = adapter.build(chosen, Choice("none", 64))
    other: Any = adapter.exchange(chosen, whole, Choice("none", 32))
    assert other.vision.positions.shape[0] == 17
    torch.testing.assert_close(other.vision.positions[0], whole.vision.positions[0])
    for name, weight in whole.named_parameters():
        if name != "vision.positions":
            assert dict(other.named_parameters())[name].data_ptr() == weight.data_ptr()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a small Qwen2.5-VL, with a tokenizer that has a chat template."""
    path = tmp_path_factory.mktemp("qwen") / "my model"
    model, _ = FAMILIES["qwen2_5_vl"].build()
    model.save_pretrained(path)
    words = {f"word{i}": i for i in range(model.config.text_config.vocab_size)}
    words = {"<image>" if i == model.config.image_token_id else word: i for word, i in words.items()}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="word0"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="word0")
    tokenizer.chat_template = (
        "{% for message in messages %}word1 {% for part in message.content %}"
        "{{ '<image> ' if part.type == 'image' else part.text }}{% endfor %} word2{% endfor %}"
    )
    tokenizer.save_pretrained(path)
    return path


def test_a_checkpoint_of_one_s_own(folder: Path) -> None:
    chosen = options(size=None, folder=folder, reduce=("none", "pool:2"))
    report = profiler.profile(chosen, PHOTO)
    assert [cell["tokens_per_image"] for cell in report["cells"]] == [12, 4, 2, 1]
    assert "--model 'my model'" in report["command"] and "--size" not in report["command"]
    assert str(folder.parent) not in json.dumps(report)
    shown = words(render(report))
    assert "qwen2_5_vl my model, fp32, its weights" in shown and "random" not in shown
    assert plot_parts.RANDOM not in plot_parts.notes(report)
    with pytest.raises(BadInput, match="--model must be a checkpoint of qwen3_vl, got one of the variant qwen2_5"):
        profiler.find_model(options("qwen3_vl", size=None, folder=folder))


def test_a_question_is_put_as_the_checkpoint_s_chats_are(folder: Path) -> None:
    chosen = options(size=None, folder=folder, prompt="word7 word8", images=2, reduce=("none",))
    adapter = profiler.REDUCING["qwen2_5_vl"]
    row = Choice("none", 64)
    model: Any = adapter.build(chosen, row)
    marker = model.config.image_token_id
    ids = adapter.inputs(chosen, model, [PHOTO, PHOTO], row).input_ids
    assert ids.tolist() == [[1, *[marker] * 24, 7, 8, 2]]
    assert '"word7 word8"' in render(profiler.profile(chosen, PHOTO))


def test_a_question_has_its_own_length(folder: Path) -> None:
    chosen = options(size=None, folder=folder, prompt="word7 " * 40000, reduce=("none",))
    with pytest.raises(BadInput, match="--resolutions must leave the prompt and 8 tokens more within 32768, got 40"):
        profiler.check_photo(chosen, PHOTO)


def test_a_question_without_a_tokenizer(folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(folder / name)
    with pytest.raises(BadInput, match="--prompt needs a tokenizer in --model, got none in"):
        profiler.find_model(options(size=None, folder=tmp_path, prompt="word7"))


@pytest.mark.parametrize("model", MODELS)
def test_sizes_exist_and_say_what_they_leave_out(model: str) -> None:
    adapter: Any = profiler.REDUCING[model]
    for name, size in adapter.named.items():
        config = replace(adapter.model_class.sizes[size.name], **size.changes)
        assert (config.text_layers == config.vision_layers == 2) == (name != "base")
        assert ("2 layers each of encoder and text" in adapter.about[name]) == (name == "small")


def test_what_a_size_leaves_out_is_said(report: dict[str, Any]) -> None:
    said = report | {"about_size": "two layers"}
    assert "random weights, two layers; grace_hopper.jpg" in words(render(said))
    assert plot.subtitle(said).endswith("; two layers")


def test_defaults_suit_the_model() -> None:
    qwen, flamingo = Options("qwen3_vl", default_photo()), Options("flamingo", default_photo())
    assert (qwen.images, qwen.backends, qwen.resolutions) == (1, ("fused",), tuple(reversed(RESOLUTIONS)))
    assert qwen.rows[0] == Choice("none", 896) and len(qwen.rows) == 12
    assert (flamingo.images, flamingo.backends, flamingo.rows) == (5, ("fused", "reference"), (16, 64, 256, 1024))
    sides = Options("flamingo", default_photo(), resolutions=(224, 448))
    assert sides.rows == (Choice("none", 448), Choice("none", 224))


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"tokens": (4,), "reduce": None}, "--tokens must not be given for qwen2_5_vl, .*; got 4"),
        ({"resolutions": ()}, "--resolutions must be 1 to 8 sides in pixels, each at most 8192, .*; got nothing"),
        ({"resolutions": (64, 0)}, "--resolutions must be .* got 64,0"),
        ({"resolutions": (9000,)}, "--resolutions must be .* got 9000"),
        ({"resolutions": (4,)}, "--resolutions must be at least 8, the side of a token in pixels; got 4"),
        ({"resolutions": (1200,)}, "--resolutions must leave the prompt and 8 tokens more within 16384, got 2[0-9]*"),
        ({"reduce": ("perceiver:4",)}, "--reduce perceiver:4: reduce must be a reducer without weights"),
        ({"reduce": ("best",)}, "--reduce best: reduce must be a reducer"),
        ({"reduce": ("select:50",)}, "--reduce select:50 with --resolutions 32: keep must be"),
        ({"size": "huge"}, "--size must be one of tiny, small, base; got 'huge'"),
        ({"folder": Path("missing"), "size": "tiny"}, "--size must not be given with --model, .*; got 'tiny'"),
        ({"folder": Path("missing"), "size": None}, "--model: .*missing"),
        ({"prompt": "What is this?"}, "--prompt must be given with --model"),
        ({"model": "flamingo", "folder": Path("missing")}, "--model must be for one of qwen2_vl, .*; got flamingo"),
        ({"model": "flamingo", "resolutions": (36,)}, "--resolutions must be multiples of 8, the patches' .* 36"),
        ({"model": "flamingo", "tokens": (4,), "reduce": None}, "--tokens and --resolutions can't be given together"),
    ],
)
def test_bad_settings_are_found_before_anything_is_measured(given: dict[str, Any], match: str) -> None:
    def check() -> None:
        chosen = options(**given)
        profiler.find_model(chosen)
        profiler.check_photo(chosen, PHOTO)

    with pytest.raises(BadInput, match=match):
        check()


@pytest.mark.parametrize("model", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "flamingo"])
def test_every_size_can_be_profiled_as_it_is(model: str) -> None:
    for size in profiler.MODELS[model].sizes:
        chosen = Options(model, default_photo(), size=size)
        profiler.find_model(chosen)
        profiler.check_photo(chosen, PHOTO)


def test_a_photograph_that_is_too_long() -> None:
    with pytest.raises(BadInput, match=r"--image must be at most 200 times as long as wide, .* got 1 x 10000"):
        profiler.check_photo(options(), Image.new("RGB", (1, 10000)))


def test_vision_is_called_as_before_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = QwenVL.from_size("tiny")
    with pytest.raises(KeyError), encoder.returning(model.vision, None):
        raise KeyError
    assert "forward" not in vars(model.vision)
