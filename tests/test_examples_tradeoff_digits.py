"""examples/tradeoff_digits.py in a short form: its scenes are right, all of it runs, and in its long form it learns."""

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

NAMES = ("tradeoff_digits", "tradeoff_digits_data", "tradeoff_digits_pictures", "clip_digits_data")


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    for package in ("sklearn", "matplotlib"):
        pytest.importorskip(package)
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")
    yield importlib.import_module("tradeoff_digits")
    for name in NAMES:
        sys.modules.pop(name, None)


@pytest.fixture
def data(example: ModuleType) -> ModuleType:
    return sys.modules["tradeoff_digits_data"]


def test_it_runs_and_draws(
    example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(example, "REDUCERS", ("none", "pool:2", "tome:8", "select:8", "diverse:8"))
    out = tmp_path / "new" / "folder"
    example.main(["--quick", "--threads", "1", "--out", str(out)])
    found = json.loads((out / "curve.json").read_text())
    assert [(point["reducer"], point["tokens"]) for point in found["points"]] == [
        ("none", 36), ("pool:2", 9), ("tome:8", 8), ("select:8", 8), ("diverse:8", 8),
    ]  # fmt: skip
    assert 0 < found["chance"] < 1 and 0 <= found["blind"] <= 1
    for name in ("curve", "kept"):
        with Image.open(out / f"{name}.png") as picture:
            assert min(picture.size) > 500 and len(picture.getcolors(1 << 20)) > 20
    assert "  step 6: loss " in capsys.readouterr().out

    again = tmp_path / "again"
    arguments = ["--quick", "--threads", "1", "--weights", str(out / "model.safetensors"), "--out", str(again)]
    example.main(arguments)
    assert json.loads((again / "curve.json").read_text()) == found
    assert "step" not in capsys.readouterr().out


@pytest.mark.slow
def test_it_learns(example: ModuleType, data: ModuleType) -> None:
    """In a third of the steps: it answers more than the words alone would tell, and less with few tokens."""
    pixels, digits, held_pixels, held_digits = example.load(1797)
    model = example.make_model(0)
    losses = example.train(model, pixels, digits, steps=400, batch=32, seed=0)
    assert sum(losses[-50:]) < 0.5 * sum(losses[:50])
    scenes = data.draw_scenes(held_pixels, held_digits, 100, torch.Generator().manual_seed(1), vary=False)
    every, few = (example.measure(model, scenes, reducer).accuracy for reducer in ("none", "select:2"))
    blind = example.measure(model, scenes._replace(pixels=scenes.pixels.roll(1, dims=0)), "none").accuracy
    assert every > max(blind, data.chance(scenes)) + 0.2
    assert few < every - 0.15


def test_scenes_are_what_the_answers_say(example: ModuleType, data: ModuleType) -> None:
    pixels = torch.arange(1, 11)[:, None, None].expand(-1, 8, 8) / 10  # digit d is an even grey of (d + 1) / 10
    scenes = data.draw_scenes(pixels, torch.arange(10), 40, torch.Generator().manual_seed(0), vary=False)
    assert scenes.pixels.shape == (40, 48, 48)
    boards = scenes.pixels.view(40, 3, 16, 3, 16).transpose(2, 3).flatten(1, 2).flatten(2)  # [N, squares, pixels]
    assert set((boards > 0).sum(2).flatten().tolist()) == {0, 8 * 8}
    shown = (10 * boards.amax(2)).round().long() - 1
    for board, questions, answers, kinds in zip(shown.tolist(), *(x.tolist() for x in scenes[1:]), strict=True):
        there = [digit for digit in board if digit >= 0]
        assert 3 <= len(there) <= 6
        asked = set()
        for words, number, kind in zip(questions, answers, kinds, strict=True):
            text, answer = " ".join(data.WORDS[word] for word in words), data.WORDS[number]
            asked.add(text)
            if text.startswith("digit at "):
                digit = board["abc".index(text[-2]) + 3 * (int(text[-1]) - 1)]
                assert kind == 0 and answer == ("nothing" if digit < 0 else str(digit))
            elif text == "how many digits":
                assert kind == 1 and answer == str(len(there))
            elif text.startswith("how many "):
                assert kind == 2 and answer == str(there.count(int(text[-1])))
            else:
                assert kind == 3 and text == "the largest digit" and answer == str(max(there))
        assert len(asked) == 9


def test_patches_are_those_of_transformers_processor(example: ModuleType, data: ModuleType) -> None:
    """Token by token, 2 x 2 patches each, and row by row within a patch."""
    pixels = torch.arange(48 * 48, dtype=torch.float32).view(1, 48, 48)
    found = data.patches(pixels).view(6, 6, 2, 2, 4, 4)  # token's row and column, patch's, pixel's
    for _ in range(50):
        row, column, i, j, y, x = (int(torch.randint(size, ())) for size in found.shape)
        assert found[row, column, i, j, y, x] == pixels[0, 8 * row + 4 * i + y, 8 * column + 4 * j + x]


def test_lessons_have_labels_at_answers_only(example: ModuleType, data: ModuleType) -> None:
    pixels, digits, _, _ = example.load(200)
    scenes = data.draw_scenes(pixels, digits, 3, torch.Generator().manual_seed(0))
    text, labels = data.lessons(scenes)
    assert text.shape == labels.shape == (3, 36 + 4 * 9)
    assert (text[:, :36] == data.IMAGE).all() and not (text[:, 36:] == data.IMAGE).any()
    assert torch.equal(text[labels >= 0], labels[labels >= 0])
    assert torch.equal(labels[labels >= 0].view(3, 9), scenes.answers)


def test_each_question_is_asked_alone_and_nothing_is_encoded_twice(example: ModuleType, data: ModuleType) -> None:
    pixels, digits, _, _ = example.load(200)
    scenes = data.draw_scenes(pixels, digits, 2, torch.Generator().manual_seed(0))
    model = example.make_model(0).eval()
    model.set_reducer("select:8")
    calls: list[int] = []
    hook = model.vision.register_forward_hook(lambda module, args, out: calls.append(len(args[0])))
    answers, kept = example.ask(model, scenes)
    hook.remove()
    assert calls == [2 * 144] and answers.shape == (2, 9) and kept.shape == (2, 8)
    with torch.no_grad():
        for row in range(2):
            for place in (0, 5):
                text = torch.cat([data.prompt(1), scenes.questions[row, place][None]], dim=1)
                out = model(text, data.patches(scenes.pixels[row]), image_grid_thw=[data.GRID], last_logits_only=True)
                assert int(out.logits.argmax()) == answers[row, place]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps must be 1 to 1000000, got 0"),
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


@pytest.mark.parametrize("package", ["sklearn.datasets", "matplotlib", "safetensors.torch"])
def test_a_missing_package_says_what_to_install(
    package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")
    for name in (*NAMES, package):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit) as ended:
        importlib.import_module("tradeoff_digits")
    for name in NAMES:
        sys.modules.pop(name, None)
    needed = package.partition(".")[0]
    assert ended.value.code == 2
    assert (
        capsys.readouterr().err == f'tradeoff_digits: this needs {needed}: pip install "mmkernels[models,examples]"\n'
    )
