"""examples/clip_digits.py in a short form: it learns, draws, and detects two curves that differ."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image

NAMES = ("clip_digits", "clip_digits_data", "clip_digits_pictures", "clip_digits_ranks")


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    for package in ("sklearn", "matplotlib"):
        pytest.importorskip(package)
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")
    yield importlib.import_module("clip_digits")
    for name in NAMES:
        sys.modules.pop(name, None)


def unit(count: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(count, 8), dim=1)


@pytest.mark.parametrize(
    ("epochs", "samples", "least"),
    [
        (1, 200, 0),
        pytest.param(8, 500, 65, marks=pytest.mark.slow),  # 48 steps; chance is 10 %
    ],
)
def test_it_learns_and_draws(
    example: ModuleType,
    epochs: int,
    samples: int,
    least: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backends = []
    train = example.train

    def noted(*args: object, backend: str | None, **options: object) -> object:
        backends.append(backend)
        return train(*args, backend=backend, **options)

    monkeypatch.setattr(example, "train", noted)
    sizes = ["--epochs", str(epochs), "--samples", str(samples), "--batch", "64"]
    example.main([*sizes, "--out", str(tmp_path / "new" / "folder")])
    lines = capsys.readouterr().out.splitlines()
    assert backends == ["reference", None]
    assert lines[0].startswith(f"{samples * 4 // 5} handwritten digits to train on; {samples // 5} held out, the last")
    (accuracy,) = [float(line.split()[2]) for line in lines if line.startswith("zero-shot accuracy")]
    assert accuracy >= least
    for direction in ("text to image", "image to text"):
        (line,) = [line for line in lines if line.strip().startswith(direction)]
        one, five, each_one, each_five = (float(word) for word in line.split()[3:] if "." in word)
        assert least <= one <= five <= 100 and each_one <= one and each_five <= five and each_one <= each_five
    for name in ("loss", "retrieval"):
        with Image.open(tmp_path / "new" / "folder" / f"clip_digits_{name}.png") as picture:
            assert min(picture.size) > 500 and len(picture.getcolors(1 << 20)) > 20


def test_ranks_give_the_curve_of_one_process(
    example: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of two ranks, with 33 and 32 images a step."""
    sizes = ["--epochs", "2", "--samples", "200", "--batch", "65"]
    with pytest.raises(SystemExit) as ended:
        example.main([*sizes, "--ranks", "2", "--out", str(tmp_path)])
    assert ended.value.code == 0
    lines = capfd.readouterr().out.splitlines()
    for name in ("one process", "2 ranks"):  # printed by one rank
        assert len([line for line in lines if line.startswith(f"{name}: 4 steps in ")]) == 1
    assert len([line for line in lines if line.startswith("the losses of 2 ranks and one process differ, rela")]) == 1
    for name in ("loss", "retrieval"):
        with Image.open(tmp_path / f"clip_digits_2_ranks_{name}.png") as picture:
            assert min(picture.size) > 500 and len(picture.getcolors(1 << 20)) > 20


def test_torchrun_starts_as_many_as_are_said(
    example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert example.parse(["--out", str(tmp_path)]).ranks == 4
    with pytest.raises(SystemExit):
        example.parse(["--out", str(tmp_path), "--ranks", "2"])
    assert "--ranks must be what torchrun starts, 4, got 2" in capsys.readouterr().err


def test_a_seed_fixes_everything(example: ModuleType) -> None:
    pixels, digits, _, _ = example.load(200)
    runs = [example.train(pixels, digits, epochs=2, batch=64, seed=seed, backend=None) for seed in (3, 3, 4)]
    losses = [loss for _, loss, _ in runs]
    assert len(losses[0]) == 4 and torch.equal(losses[0], losses[1]) and not torch.equal(losses[0], losses[2])
    assert all((loss > least).all() for _, loss, least in runs)


def test_curves_that_differ_are_an_error(example: ModuleType) -> None:
    naive = torch.linspace(5.0, 3.0, 40, dtype=torch.float64)
    assert "0.0e+00 in all" in example.check_same(naive, naive)
    late, early, never = naive.clone(), naive.clone(), naive.clone()
    late[30] *= 1 + 2e-4
    early[9] *= 1 + 3e-6
    never[20] = torch.nan
    for fused, problem in ((late, "stay"), (early, "start"), (never, "stay"), (naive * 1.001, "start")):
        with pytest.raises(AssertionError, match=f"must {problem} within"):
            example.check_same(fused, naive)
    late[30] = naive[30] * (1 + 5e-6)
    assert "5.0e-06 in all" in example.check_same(late, naive)


def test_recall_counts_as_defined(example: ModuleType) -> None:
    query, gallery = unit(7), unit(20)
    query_digits, gallery_digits = torch.arange(7) % 3, torch.arange(20) % 4 % 3
    found = example.recall(query, query_digits, gallery, gallery_digits)
    right = (query_digits[:, None] == gallery_digits).gather(1, (query @ gallery.mT).argsort(1, descending=True))
    for place, k in enumerate((1, 5)):
        assert found.any_right[place] == pytest.approx(right[:, :k].any(1).double().mean().item())
        wrong_before = (~right).cumsum(1)[right]  # at a right item: the wrong ones above it
        assert found.each_right[place] == pytest.approx((wrong_before < k).double().mean().item())
    assert found.chance[0] == pytest.approx(right.double().mean().item())
    shuffled = torch.stack([torch.randperm(20) for _ in range(20_000)])[:, :5]
    drawn = [(gallery_digits[shuffled] == digit).any(1).double().mean() for digit in query_digits]
    assert found.chance[1] == pytest.approx(torch.stack(drawn).mean().item(), abs=0.01)


def test_the_least_loss_is_that_of_perfect_features(example: ModuleType) -> None:
    image_ids, text_ids = torch.tensor([0, 0, 1, 7, 7, 7]), torch.tensor([0, 0, 0, 1, 7, 7])
    perfect = torch.eye(10)
    loss = example.mmkernels.info_nce(
        perfect[image_ids], perfect[text_ids], 100.0, image_ids=image_ids, text_ids=text_ids
    )
    assert loss.item() == pytest.approx(example.least_loss(image_ids, text_ids), rel=1e-6)


def test_prompts_are_not_in_training(example: ModuleType) -> None:
    assert not set(example.PROMPTS) & set(example.TRAINING_CAPTIONS)
    assert len(set(example.TRAINING_CAPTIONS)) == len(example.TRAINING_CAPTIONS) == 160
    tokens, lengths = example.tokenize(["my three", "the digit 3"])
    assert lengths.tolist() == [2, 3] and tokens[0, 0] == 1 and tokens[0, 2] == 0 and (tokens[1] > 1).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "--epochs must be 1 to 10000, got 0"),
        (["--samples", "1798"], "--samples must be 200 to 1797, got 1798"),
        (["--samples", "200", "--batch", "161"], "--batch must be 2 to 160, got 161"),
        (["--seed", "-1"], "--seed must be 0 to "),
        (["--threads", "0"], "--threads must be 1 to 1024, got 0"),
        (["--ranks", "0"], "--ranks must be 1 to 128, got 0"),
        (["--out", __file__], "--out must be a folder that can be written, got "),
    ],
)
def test_bad_options(
    example: ModuleType, arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        example.main(["--out", str(tmp_path), *arguments])
    assert ended.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(("package", "named"), [("sklearn", "scikit-learn"), ("matplotlib", "matplotlib")])
def test_a_missing_package_says_what_to_install(
    package: str, named: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")
    for name in (*NAMES, f"{package}.datasets"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit) as ended:
        importlib.import_module("clip_digits")
    for name in NAMES:
        sys.modules.pop(name, None)
    assert ended.value.code == 2
    assert capsys.readouterr().err == f'clip_digits: this needs {named}: pip install "mmkernels[examples]"\n'
