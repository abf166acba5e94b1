"""examples/draw_digits.py in a short form: its prompts and measures are right, it runs, and in its long form learns."""

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

NAMES = ("draw_digits", "draw_digits_training", "draw_digits_pictures", "clip_digits_data")


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    for package in ("sklearn", "matplotlib"):
        pytest.importorskip(package)
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")
    yield importlib.import_module("draw_digits")
    for name in NAMES:
        sys.modules.pop(name, None)


@pytest.fixture
def training(example: ModuleType) -> ModuleType:
    return sys.modules["draw_digits_training"]


def test_it_runs_and_draws(example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "folder"
    example.main(["--quick", "--threads", "1", "--out", str(out)])
    found = json.loads((out / "figures.json").read_text())
    assert [row["scale"] for row in found["drawings"]] == list(example.SCALES)
    for row in found["drawings"]:
        assert 0 <= row["recognised"] <= 1 and 0 <= row["read"] <= 1 and row["spread"] > 0
    assert found["held out"]["real"] > 0.9
    for name in ("drawings", "curves"):
        with Image.open(out / f"{name}.png") as picture:
            assert min(picture.size) > 400 and len(picture.getcolors(1 << 20)) > 20
    text = capsys.readouterr().out
    assert "tokenizer: 3 steps in " in text and "Janus: 3 steps in " in text

    again = tmp_path / "again"
    arguments = ["--quick", "--threads", "1", "--weights", str(out / "model.safetensors"), "--out", str(again)]
    example.main(arguments)
    assert json.loads((again / "figures.json").read_text()) == found
    assert "steps in" not in capsys.readouterr().out


@pytest.mark.slow
def test_it_learns(example: ModuleType, training: ModuleType) -> None:
    """In a third of the steps: it draws what it is told to, more so with guidance, and not with none of the prompt."""
    pixels, digits, held_pixels, held_digits = example.load(1797)
    model = example.make_model(0)
    errors = training.train_tokenizer(model, pixels, steps=250, batch=64, seed=0)
    drawing, reading = training.train(model, pixels, digits, steps=350, batch=64, seed=0)
    assert sum(errors[-20:]) < 0.3 * sum(errors[:20])
    assert sum(drawing[-20:]) < 0.8 * sum(drawing[:20]) and sum(reading[-20:]) < 0.3 * sum(reading[:20])
    assert example.right(training.read_images(model, held_pixels), held_digits) > 0.8
    judge, asked = example.Judge(pixels, digits), torch.arange(10).repeat_interleave(20)
    shares = [judge.share(training.draw_images(model, asked, scale, 0), asked) for scale in (0.0, 1.0, 3.0)]
    assert shares[0] < 0.25 < shares[1] < shares[2] and shares[2] > 0.6


def test_prompts_say_what_is_drawn(training: ModuleType) -> None:
    ids, mask = training.prompts(torch.tensor([7, 0, 3]), torch.tensor([0, 1, 2]))
    words = {number: word for word, number in training.NUMBERS.items()}
    texts = [" ".join(words[token] for token in row if token in words) for row in ids.tolist()]
    assert texts == ["draw a seven", "a handwritten zero", "the number three please"]
    for row, valid in zip(ids, mask, strict=True):
        assert (row[valid == 0] == training.PAD).all()
        assert int(row[valid == 1][0]) == training.BOS and int(row[-1]) == training.START
    assert mask.sum(1).tolist() == [5, 5, 6]
    assert [words[int(token)] for token in training.NAMES] == list(training.DIGITS)
    asked = training.questions(2)
    assert asked.shape == (2, 1 + 16 + 4) and (asked == training.MARKER).sum() == 32


def test_some_prompts_say_nothing_in_training(
    example: ModuleType, training: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And each image comes once in a pass over all."""
    model, seen = example.make_model(0), []
    hidden = sys.modules["mmkernels.models.janus_generation"].image_hidden

    def noted(model: object, input_ids: torch.Tensor, *rest: object) -> torch.Tensor:
        seen.append((input_ids == training.PAD).sum(1) >= 3)
        return hidden(model, input_ids, *rest)

    monkeypatch.setattr("mmkernels.models.janus_generation.image_hidden", noted)
    pixels, digits, _, _ = example.load(200)
    training.train(model, pixels, digits, steps=4, batch=50, seed=0)
    share = torch.cat(seen).double().mean()
    assert 0.04 < share < 0.2
    rows = list(training.draws(10, 4, 5, torch.Generator().manual_seed(0)))
    assert [len(row) for row in rows] == [4] * 5
    assert torch.cat(rows)[:10].sort()[0].tolist() == torch.cat(rows)[10:].sort()[0].tolist() == list(range(10))


def test_a_seed_fixes_everything(example: ModuleType, training: ModuleType) -> None:
    pixels, digits, _, _ = example.load(200)
    runs = []
    for seed in (3, 3, 4):
        model = example.make_model(seed)
        errors = training.train_tokenizer(model, pixels, steps=2, batch=8, seed=seed)
        losses = training.train(model, pixels, digits, steps=2, batch=8, seed=seed)
        runs.append((errors, *losses, training.draw_images(model, digits[:3], 5.0, seed).tolist()))
    assert runs[0] == runs[1] != runs[2]


def test_the_tokenizer_stays_as_it_is(example: ModuleType, training: ModuleType) -> None:
    pixels, digits, _, _ = example.load(200)
    model = example.make_model(0)
    training.train_tokenizer(model, pixels, steps=1, batch=8, seed=0)
    before = {name: x.clone() for name, x in model.vq.state_dict().items()}
    training.train(model, pixels, digits, steps=2, batch=8, seed=0)
    assert all(torch.equal(x, before[name]) for name, x in model.vq.state_dict().items())


def test_measures(example: ModuleType) -> None:
    pixels = torch.zeros(3, 8, 8)
    assert example.spread(pixels) == 0.0 and example.spread(pixels[:1]) == 0.0
    pixels[2] = 1.0
    assert example.spread(pixels) == pytest.approx(8 * 2 / 3)
    real, digits, held, truth = example.load(1797)
    judge = example.Judge(real, digits)
    assert judge.share(held, truth) > 0.94 and judge.share(held, (truth + 1) % 10) < 0.06


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps must be 1 to 1000000, got 0"),
        (["--tokenizer-steps", "-1"], "--tokenizer-steps must be 1 to 1000000, got -1"),
        (["--batch", "1438"], "--batch must be 2 to 1437, got 1438"),
        (["--each", "3"], "--each must be 4 to 10000, got 3"),
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


@pytest.mark.parametrize("package", ["sklearn.svm", "matplotlib", "safetensors.torch"])
def test_a_missing_package_says_what_to_install(
    package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")
    for name in (*NAMES, package):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit) as ended:
        importlib.import_module("draw_digits")
    for name in NAMES:
        sys.modules.pop(name, None)
    needed = package.partition(".")[0]
    assert ended.value.code == 2
    assert capsys.readouterr().err == f'draw_digits: this needs {needed}: pip install "mmkernels[models,examples]"\n'
