"""examples/read_digits.py in a short form: its scenes and its verifier are right, all of it runs, and it learns."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image
from torch import Tensor

from mmkernels import SpanMask, attention_weights

PARTS = ("data", "answers", "evidence", "pictures", "training")
NAMES = ("read_digits", *(f"read_digits_{part}" for part in PARTS), "clip_digits_data")


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    for package in ("sklearn", "matplotlib", "jsonschema"):
        pytest.importorskip(package)
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")
    yield importlib.import_module("read_digits")
    for name in NAMES:
        sys.modules.pop(name, None)


@pytest.fixture
def data(example: ModuleType) -> ModuleType:
    return sys.modules["read_digits_data"]


@pytest.fixture
def answers(example: ModuleType) -> ModuleType:
    return sys.modules["read_digits_answers"]


def greys() -> tuple[Tensor, Tensor]:
    """Images of which digit d is an even grey of 0.4 + d / 20."""
    return (0.4 + torch.arange(10) / 20)[:, None, None].expand(-1, 8, 8), torch.arange(10)


def drawn(data: ModuleType, count: int, seed: int = 0) -> tuple[Tensor, ...]:
    return data.draw_scenes(*greys(), count, torch.Generator().manual_seed(seed), vary=False)


def test_it_runs_and_draws(
    example: ModuleType,
    answers: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(answers, "SENTENCE", 4)  # what did not learn does not end
    monkeypatch.setattr(answers, "ANSWER", 3)
    out = tmp_path / "new" / "folder"
    example.main(["--quick", "--threads", "1", "--out", str(out)])
    found = json.loads((out / "figures.json").read_text())
    assert list(found) == ["before GRPO", "after GRPO", "blur", "crop", "jpeg", "mean drop"]
    for name, row in found.items():
        assert tuple(row) == example.Figures._fields
        assert name == "mean drop" or all(share is None or 0 <= share <= 1 for share in row.values())
    for name in ("curves", "answers"):
        with Image.open(out / f"{name}.png") as picture:
            assert min(picture.size) > 500 and len(picture.getcolors(1 << 20)) > 20
    told = capsys.readouterr().out
    assert told.count("fused and naive, the first 4 steps: losses differ, relatively, by at most ") == 2
    assert "  step 2: reward " in told and "JSON validity" in told

    again = tmp_path / "again"
    weights = str(out / "model.safetensors")
    example.main(["--quick", "--threads", "1", "--weights", weights, "--out", str(again)])
    assert json.loads((again / "figures.json").read_text())["clean"] == found["after GRPO"]
    assert "stage" not in capsys.readouterr().out and not (again / "curves.png").exists()


@pytest.mark.slow
def test_it_learns(example: ModuleType, answers: ModuleType) -> None:
    """In a part of the steps: it reads, refuses and points at what it reads, and rewards rise."""
    pixels, digits, held_pixels, held_digits = example.load()
    model = example.make_model(0)
    example.see(model, pixels, digits, steps=400, batch=64, seed=0)
    example.answer(model, pixels, digits, steps=500, batch=32, seed=0)
    rewards = example.improve(model, pixels, digits, steps=60, batch=16, seed=0)
    assert sum(rewards[-20:]) > sum(rewards[:20])
    held = example.draw_scenes(held_pixels, held_digits, 200, torch.Generator().manual_seed(1), vary=False)
    found = answers.figures(held, answers.ask(model.eval(), held))
    assert found.validity > 0.95 and found.digit > 0.6 and found.f1 > 0.8 and found.overlap > 0.6
    blind = held._replace(pixels=held.pixels.roll(1, dims=0))
    assert answers.figures(blind, answers.ask(model, blind)).digit < found.digit - 0.3


def test_scenes_are_what_the_answers_say(data: ModuleType, answers: ModuleType) -> None:
    scenes = drawn(data, 40)
    assert scenes.pixels.shape == (40, 1, data.SIDE, data.SIDE)
    for row in range(40):
        there = {int(digit): box for digit, box in zip(scenes.shown[row], scenes.boxes[row].tolist()) if digit >= 0}
        assert data.FEWEST <= len(there) <= data.MOST
        ink = scenes.pixels[row, 0] > 0
        for digit, (x0, y0, x1, y1) in there.items():
            assert (x1 - x0, y1 - y0) == (16, 16) and (
                scenes.pixels[row, 0, y0:y1, x0:x1] - 0.4 - digit / 20
            ).abs().max() < 1e-6
        assert int(ink.sum()) == 256 * len(there)
        asked = zip(data.spell(scenes.questions[row]), data.spell(scenes.answers[row]))
        for kind, (question, answer) in enumerate(asked):
            value = json.loads(answer)
            about = question.split()[-1]
            if kind < 2:
                digit = int(scenes.shown[row, data.REGIONS.index(about)])
                assert question.startswith("digit at ")
            else:
                digit = int(about) if int(about) in there else -1
                assert question.startswith("where is ")
            assert (digit < 0) == (kind % 2 == 1)
            assert value == ({"absent": True} if digit < 0 else {"digit": digit, "box": there[digit]})


def test_the_verifier_rewards_what_is_right(data: ModuleType, answers: ModuleType) -> None:
    scenes = drawn(data, 20)
    digits, boxes = answers.wanted(scenes)
    assert answers.verify(data.spell(scenes.answers.flatten(0, 1)), digits, boxes).reward().min() > 0.999
    right, box = '{"digit":7,"box":[0,0,16,16]}', torch.tensor([[0, 0, 16, 16]])
    for text, there, reward in (
        (right, 7, 1.0),
        ('{"digit":7,"box":[0,0,16,8]}', 7, 0.1 + 0.5 + 0.2),
        ('{"digit":7,"box":[16,16,0,0]}', 7, 0.6),  # no box
        ('{"digit":3,"box":[0,0,16,16]}', 7, 0.1),
        ('{"absent":true}', 7, 0.1),
        ('{"absent":true}', -1, 1.0),
        (right, -1, 0.1),
        (right + "}", 7, 0.0),
        (right[:-1], 7, 0.0),
        ('{"digit":7}', 7, 0.0),
        ('{"absent":false}', -1, 0.0),
        ("", -1, 0.0),
    ):
        found = answers.verify([text], torch.tensor([there]), box).reward()
        assert found.item() == pytest.approx(reward, abs=1e-6), text


def test_descriptions_claim_what_is_there(data: ModuleType, answers: ModuleType) -> None:
    scenes = drawn(data, 20)
    sentences = data.descriptions(scenes)
    assert sentences.shape == (20, data.SENTENCE)
    texts = data.spell(sentences)
    assert all(text.startswith("I see ") and text.endswith("].") for text in texts)
    assert [answers.claims_of(text) for text in texts] == answers.regions_of(scenes)


def test_figures_of_right_answers_are_full(data: ModuleType, answers: ModuleType) -> None:
    scenes = drawn(data, 20)
    refusal = (scenes.regions < 0).float()
    asked = answers.Asked(scenes.answers, refusal, data.descriptions(scenes))
    found = answers.figures(scenes, asked)
    assert found == answers.Figures(1, 1, 1, 1, 1, 1, 0, 1, 1, 0)
    never = asked._replace(answers=scenes.answers[:, [0, 0, 2, 2]], refusal=torch.zeros_like(refusal))
    worse = answers.figures(scenes, never)
    assert worse.hallucinated == 1 and worse.recall == 0 and worse.digit == 1 and worse.calibration == 0.5


def test_lessons_have_labels_at_answers_only(data: ModuleType) -> None:
    scenes = drawn(data, 3)
    text, labels = data.lessons(scenes.questions, scenes.answers, 9)
    assert text.shape == labels.shape == (12, 9 + data.QUESTION + data.ANSWER)
    assert (text[:, :9] == data.IMAGE).all() and (labels[:, : 9 + data.QUESTION] == -100).all()
    answer = labels[:, 9 + data.QUESTION :]
    assert torch.equal(answer, scenes.answers.flatten(0, 1).masked_fill(scenes.answers.flatten(0, 1) == data.PAD, -100))


def test_the_first_stage_asks_for_what_is_there(data: ModuleType) -> None:
    scenes = drawn(data, 10)
    names = data.patch_names(scenes).view(10, 6, 6)
    for row, region in (scenes.shown >= 0).nonzero().tolist():
        x0, y0, _, _ = scenes.boxes[row, region].tolist()
        assert names[row, y0 // 16, x0 // 16] == scenes.shown[row, region]
    assert int((names < 10).sum()) == int((scenes.shown >= 0).sum())
    sides = data.box_sides(scenes)[scenes.shown >= 0]
    assert sides.min() >= 0 and sides.max() <= data.CELL // data.STEP


def test_evidence_is_the_product_of_two_attentions(example: ModuleType, data: ModuleType) -> None:
    model, scenes = example.make_model(0).eval(), drawn(data, 2)
    parts = sys.modules["read_digits_evidence"]
    found = parts.evidence(model, scenes, scenes.answers)
    assert found.shape == (2, 4, 6, 6)
    torch.testing.assert_close(found.sum((2, 3)), torch.ones(2, 4))

    text = torch.cat([data.prompts(scenes.questions[:1, :1], 9), scenes.answers[0, :1]], 1)[:, :-1]
    looking = [block.cross.attention for block in model.qformer.blocks]
    reading = [block.attention for block in model.decoder.blocks]
    with torch.no_grad(), parts.Heads(looking) as looked, parts.Heads(reading) as read:
        model(text, scenes.pixels[:1])
    mask = SpanMask.causal(text.shape[1], text.shape[1])
    rows = slice(9 + data.QUESTION - 1, None)
    queries = sum(attention_weights(*heads, mask)[0, :, rows, :9].sum((0, 1)) for heads in read.found)
    patches = sum(attention_weights(*heads)[0, :, :, 1:].sum(0).T @ queries for heads in looked.found)
    torch.testing.assert_close(found[0, 0].flatten(), patches / patches.sum())


def test_the_second_stage_leaves_what_sees_as_it_is(example: ModuleType) -> None:
    model = example.make_model(0)
    names = {name for name, _ in model.named_parameters()}
    chosen = {id(parameter) for parameter in sys.modules["read_digits_training"].speaking(model)}
    learns = {name for name, parameter in model.named_parameters() if id(parameter) in chosen}
    assert learns == {name for name in names if name.startswith(("projection.", "decoder.", "head."))}


def test_curves_that_differ_are_an_error(example: ModuleType) -> None:
    assert "0.0e+00" in example.check_same([2.0, 1.0, 0.5], [2.0, 1.0])
    for fused in ([2.0, 1.01], [2.0, float("nan")]):
        with pytest.raises(AssertionError, match="must stay within 1e-03"):
            example.check_same(fused, [2.0, 1.0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeing", "0"], "--seeing must be 1 to 1000000, got 0"),
        (["--scenes", "3"], "--scenes must be 4 to 100000, got 3"),
        (["--seed", "-1"], "--seed must be 0 to "),
        (["--weights", "nowhere"], "--weights must be a file that an earlier run wrote, got 'nowhere'"),
        (["--out", __file__], "--out must be a folder that can be written, got "),
    ],
)
def test_bad_options(
    example: ModuleType, arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        example.main(["--out", str(tmp_path), *arguments])
    assert ended.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("package", ["sklearn.datasets", "matplotlib", "safetensors.torch", "jsonschema"])
def test_a_missing_package_says_what_to_install(
    package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")
    for name in (*NAMES, package):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit) as ended:
        importlib.import_module("read_digits")
    for name in NAMES:
        sys.modules.pop(name, None)
    needed = package.partition(".")[0]
    assert ended.value.code == 2
    assert (
        capsys.readouterr().err
        == f'read_digits: this needs {needed}: pip install "mmkernels[models,examples,evaluation]"\n'
    )
