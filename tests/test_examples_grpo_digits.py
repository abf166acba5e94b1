"""examples/grpo_digits.py in a short form: its reward is right, all of it runs, and rewards rise."""

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

PARTS = ("data", "rewards", "training", "pictures")
SHARED = ("data", "answers", "training", "pictures")
NAMES = (
    "grpo_digits",
    *(f"grpo_digits_{part}" for part in PARTS),
    *(f"read_digits_{part}" for part in SHARED),
    "clip_digits_data",
)
RIGHT = '{"digit":7,"box":[16,16,32,32]}'
BOX = torch.tensor([[16, 16, 32, 32]])


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    for package in ("sklearn", "matplotlib", "jsonschema"):
        pytest.importorskip(package)
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")
    yield importlib.import_module("grpo_digits")
    for name in NAMES:
        sys.modules.pop(name, None)


@pytest.fixture
def data(example: ModuleType) -> ModuleType:
    return sys.modules["grpo_digits_data"]


@pytest.fixture
def rewards(example: ModuleType) -> ModuleType:
    return sys.modules["grpo_digits_rewards"]


@pytest.fixture
def training(example: ModuleType) -> ModuleType:
    return sys.modules["grpo_digits_training"]


def drawn(example: ModuleType, count: int) -> tuple[Tensor, ...]:
    """Scenes of images of which digit d is an even grey of 0.4 + d / 20."""
    greys = (0.4 + torch.arange(10) / 20)[:, None, None].expand(-1, 8, 8)
    return example.draw_scenes(greys, torch.arange(10), count, torch.Generator().manual_seed(0), vary=False)


def test_it_runs_and_draws(example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "folder"
    example.main(["--quick", "--threads", "1", "--out", str(out)])
    found = json.loads((out / "figures.json").read_text())
    assert list(found["sampled"]) == list(found["most likely"]) == ["before GRPO", *example.ABLATION]
    for rates in (*found["sampled"].values(), *found["most likely"].values()):
        assert tuple(rates) == example.Rates._fields
        assert all(0 <= rates[name] <= 1 for name in ("format", "correctness", "grounding", "invented"))
    for name, weights in example.ABLATION.items():
        assert list(found["over steps"][name]) == ["0", "1", "2"]
        assert all(0 <= reward <= sum(weights) for reward in found["rewards"][name])
    for name in ("ablation", "curves", "answers"):
        with Image.open(out / f"{name}.png") as picture:
            assert min(picture.size) > 500 and len(picture.getcolors(1 << 20)) > 20
    told = capsys.readouterr().out
    assert told.count("fused and naive, the first 3 steps: curves differ, relatively, by at most ") == 2
    assert "fused and naive, the first 2 steps: curves differ, relatively, by at most " in told


@pytest.mark.slow
def test_it_learns(example: ModuleType, training: ModuleType, rewards: ModuleType) -> None:
    """It sees and answers; rewards then teach the format, and without correctness it invents what is not there."""
    pixels, digits, held_pixels, held_digits = example.load()
    held = example.draw_scenes(held_pixels, held_digits, 100, torch.Generator().manual_seed(1), vary=False)
    model = example.make_model(0)
    example.see(model, pixels, digits, steps=500, batch=64, seed=0)
    example.answer(model, pixels, digits, steps=1000, batch=64, seed=0)
    first = training.rates(model, held)
    assert first.correctness > 0.7 and first.grounding > 0.5 and 0.3 < first.format < 0.7
    blind = held._replace(pixels=held.pixels.roll(1, dims=0))
    assert training.rates(model, blind).correctness < first.correctness - 0.2
    state, last = {name: x.clone() for name, x in model.state_dict().items()}, {}
    for name in ("all terms", "no correctness"):
        model.load_state_dict(state)
        run = example.improve(model, pixels, digits, held, rewards.ABLATION[name], steps=60, batch=8, seed=0, every=60)
        last[name] = run.rates[60]
    every, others = last.values()
    assert every.format > 0.8 and every.correctness > first.correctness - 0.1
    assert others.invented > every.invented + 0.05


@pytest.mark.parametrize(
    ("text", "digit", "terms"),
    [
        # format, correctness, grounding, coverage
        (RIGHT, 7, (1, 1, 1, 1)),
        ("I see 7 at [16,16,32,32]", 7, (0, 1, 1, 1)),
        ('{"digit":3,"box":[16,16,32,32]}', 7, (1, 0, 1, 1)),
        ('{"digit":7,"box":[16,16,32,24]}', 7, (1, 1, 0.5, 0.5)),
        ('{"digit":7,"box":[0,0,96,96]}', 7, (1, 1, 1 / 36, 1)),  # what the coverage pays for
        ('{"digit":7,"box":[40,40,56,56]}', 7, (1, 1, 0, 0)),
        ('{"digit":7,"box":[32,32,16,16]}', 7, (1, 1, 0, 0)),  # no box
        ('{"absent":true}', 7, (1, 0, 0, 0)),
        ('{"absent":true}', -1, (1, 1, 0, 0)),
        ("I see none", -1, (0, 1, 0, 0)),
        (RIGHT, -1, (1, 0, 0, 0)),
        ('{"digit":7,"box":[0,0,0,0]}', -1, (1, 0, 0, 0)),
        (RIGHT + "]", 7, (0, 0, 0, 0)),
        (RIGHT + "I see 7 at [16,16,32,32]", 7, (0, 0, 0, 0)),
        ("I see 7 at [16,16,32,32", 7, (0, 0, 0, 0)),
        ("", -1, (0, 0, 0, 0)),
    ],
)
def test_the_reward_pays_for_what_it_names(
    rewards: ModuleType, text: str, digit: int, terms: tuple[float, ...]
) -> None:
    box = BOX if digit >= 0 else torch.zeros(1, 4, dtype=torch.int64)
    found = rewards.judge([text], torch.tensor([digit]), box)
    got = [float(getattr(found, name)) for name in rewards.Weights._fields]
    assert got == pytest.approx(terms, abs=1e-6)
    for weights in rewards.ABLATION.values():
        assert found.reward(weights).item() == pytest.approx(sum(w * t for w, t in zip(weights, terms)), abs=1e-6)


def test_the_area_tells_of_a_box_that_grew(rewards: ModuleType) -> None:
    texts = [RIGHT, '{"digit":7,"box":[0,0,96,96]}', "I see none"]
    found = rewards.judge(texts, torch.tensor([7, 7, 7]), BOX.expand(3, -1))
    assert found.area.tolist() == [1, 36, 0] and found.boxed.tolist() == [True, True, False]


def test_each_run_of_the_ablation_leaves_out_one_term(rewards: ModuleType) -> None:
    every, *others = rewards.ABLATION.values()
    assert sum(every) == pytest.approx(1) and every.coverage == 0
    changed = [[name for name in every._fields if getattr(every, name) != getattr(x, name)] for x in others]
    assert changed == [["format"], ["correctness"], ["grounding"], ["grounding", "coverage"]]
    assert all(x.grounding == 0 for x in others[2:]) and others[3].coverage == every.grounding


def test_demonstrations_are_right_in_json_and_in_prose(
    example: ModuleType, data: ModuleType, training: ModuleType
) -> None:
    scenes = drawn(example, 20)
    for share in (0.0, 0.5, 1.0):
        answers = data.demonstrations(scenes, share, torch.Generator().manual_seed(0))
        found = training.judged(scenes, answers.flatten(0, 1), 1)
        assert found.correctness.min() == 1 and found.grounding[found.there].min() == 1
        assert abs(found.format.mean() - (1 - share)) <= (0.15 if share == 0.5 else 0)


def test_conversations_ask_all_questions_and_label_their_answers(
    example: ModuleType, data: ModuleType, training: ModuleType
) -> None:
    shared = sys.modules["read_digits_data"]
    scenes, visual = drawn(example, 6), training.VISUAL
    text, labels = data.conversations(scenes, scenes.answers, visual, torch.Generator().manual_seed(0))
    assert (text[:, :visual] == shared.IMAGE).all() and (labels[:, :visual] == -100).all()
    for row in range(6):
        words, learned = text[row, visual:].tolist(), labels[row, visual:].tolist()
        turns = []
        while words and words[0] != shared.PAD:
            end = words.index(shared.END) + 1
            assert learned[:2] == [-100, -100] and learned[2:end] == words[2:end]
            turns.append((words[:2], words[2:end]))
            words, learned = words[end:], learned[end:]
        assert set(words) <= {shared.PAD} and set(learned) <= {-100}
        asked = [
            (question, [token for token in answer if token != shared.PAD])
            for question, answer in zip(scenes.questions[row].tolist(), scenes.answers[row].tolist())
        ]
        assert sorted(turns) == sorted(asked)


def test_rewarded_steps_leave_what_sees_as_it_is(example: ModuleType, training: ModuleType) -> None:
    model, (pixels, digits, _, _) = example.make_model(0), example.load()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    run = example.improve(
        model, pixels, digits, None, next(iter(example.ABLATION.values())), steps=2, batch=2, seed=0, kept=1
    )
    assert len(run.surprise) == len(run.rewards) == 2 and len(run.answers) == 1 and not run.rates
    moved = {name.partition(".")[0] for name, x in model.state_dict().items() if not torch.equal(x, before[name])}
    assert moved <= {"decoder", "head"}


def test_naive_formulas_replay_the_answers_of_a_run(
    example: ModuleType, data: ModuleType, training: ModuleType
) -> None:
    """Of each group half are right and in JSON, half in prose: their rewards differ, so the loss has a gradient."""
    pixels, digits, _, _ = example.load()
    scenes = example.draw_scenes(pixels, digits, 2, torch.Generator().manual_seed(2))  # as the first step draws them
    answers = scenes.answers.flatten(0, 1).repeat_interleave(training.GROUP, 0)
    answers[::2] = data.told(answers[::2])
    runs = []
    for backend in (None, "reference"):
        model = example.make_model(0)
        before = model.decoder.embed.weight.clone()
        weights = example.ABLATION["all terms"]
        sizes = {"steps": 2, "batch": 2, "seed": 0, "replayed": [answers, answers], "backend": backend}
        runs.append(example.improve(model, pixels, digits, None, weights, **sizes))
        assert not torch.equal(model.decoder.embed.weight, before)
    fused, naive = runs
    assert fused.rewards == naive.rewards and 0 < fused.rewards[0] < 1
    assert fused.surprise == pytest.approx(naive.surprise, rel=1e-5)  # the second step's has the first gradient in it
    assert fused.surprise[0] != fused.surprise[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rewarded", "0"], "--rewarded must be 1 to 1000000, got 0"),
        (["--scenes", "2"], "--scenes must be 3 to 100000, got 2"),
        (["--seed", "-1"], "--seed must be 0 to "),
        (["--out", __file__], "--out must be a folder that can be written, got "),
    ],
)
def test_bad_options(
    example: ModuleType, arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        example.main(["--out", str(tmp_path), *arguments])
    assert ended.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("package", ["sklearn.datasets", "matplotlib", "jsonschema"])
def test_a_missing_package_says_what_to_install(
    package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")
    for name in (*NAMES, package):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit) as ended:
        importlib.import_module("grpo_digits")
    for name in NAMES:
        sys.modules.pop(name, None)
    needed = package.partition(".")[0]
    assert ended.value.code == 2
    assert (
        capsys.readouterr().err
        == f'grpo_digits: this needs {needed}: pip install "mmkernels[models,examples,evaluation]"\n'
    )
