"""examples/spoken_digits.py in a short form: its sounds, noises and measures are right, it runs, and it learns."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from PIL import Image
from torch import Tensor

import mmkernels
from mmkernels import attention_weights

PARTS = ("data", "model", "report", "pictures")
CLIP = ("clip_digits", "clip_digits_data", "clip_digits_pictures", "clip_digits_ranks")
NAMES = ("spoken_digits", *(f"spoken_digits_{part}" for part in PARTS), *CLIP)
PACKAGES = ("sklearn", "matplotlib", "safetensors", "transformers", "soundfile", "soxr", "espeakng_loader")


class Example(NamedTuple):
    main: ModuleType
    data: ModuleType
    model: ModuleType
    report: ModuleType


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[Example]:
    for package in PACKAGES:
        pytest.importorskip(package)
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")
    main = importlib.import_module("spoken_digits")
    yield Example(main, *(sys.modules[f"spoken_digits_{part}"] for part in PARTS[:3]))
    for name in NAMES:
        sys.modules.pop(name, None)


def tones(data: ModuleType, count: int = 20, length: int = 8000) -> tuple[Tensor, ...]:
    """Sounds of `length` samples at the loudness of speech: of digit d, tones of (d + 1) * 150 Hz."""
    digits = torch.arange(count) * 10 // count
    time = torch.arange(data.SAMPLES) / data.RATE
    samples = 2**0.5 * data.LOUDNESS * torch.sin(2 * torch.pi * 150 * (digits[:, None] + 1) * time)
    lengths = torch.full((count,), length)
    return data.Sounds(samples * (torch.arange(data.SAMPLES) < length), lengths, digits)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def spectrograms(data: ModuleType, count: int = 20) -> tuple[Tensor, ...]:
    frames = 30 + torch.arange(count) % 5
    return data.Recordings(torch.randn(count, data.BANDS, 40, generator=seeded()), frames, torch.arange(count) % 10)


def test_it_runs_and_draws(
    example: Example, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    backends = []
    train = example.main.train

    def noted(*args: object, backend: str | None, **options: object) -> object:
        backends.append(backend)
        return train(*args, backend=backend, **options)

    monkeypatch.setattr(example.main, "train", noted)
    for module in (example.report, sys.modules["spoken_digits_pictures"]):
        monkeypatch.setattr(module, "LEVELS", (10,))
    out = tmp_path / "new" / "folder"
    example.main.main(["--quick", "--threads", "1", "--out", str(out)])
    assert backends == ["reference", None]
    told = capsys.readouterr().out
    assert "40 sounds (speakers: 1), recorded 160 times with noise, and 1,438 images" in told
    assert told.count(": 4 steps in ") == 2 and told.count("in the first 4 steps (bound 1.9e-06)") == 2
    found = json.loads((out / "figures.json").read_text())
    shares = [found[name] for name in ("sounds named by images", "images named by sounds", "reranked")]
    shares += [x for direction in ("sound to image", "image to sound") for x in found[direction]["any_right"]]
    assert all(0 <= share <= 1 for share in shares)
    assert list(found["noise"]["corrupted"]) == ["white", "pink", "babble", "hum"]
    assert list(found["by voice"]) == ["accent", "speaker", "speed"]
    assert found["match"]["total"] == 2 * 60
    for name in ("loss", "report", "retrieval", "match"):
        with Image.open(out / f"{name}.png") as picture:
            assert min(picture.size) > 500 and len(picture.getcolors(1 << 20)) > 20
    assert len(list((out / "sounds").glob("*.wav"))) == 10

    again = tmp_path / "again"
    weights = str(out / "model.safetensors")
    example.main.main(["--quick", "--threads", "1", "--weights", weights, "--out", str(again)])
    assert json.loads((again / "figures.json").read_text()) == found
    assert "steps" not in capsys.readouterr().out and not (again / "loss.png").exists()


@pytest.mark.slow
def test_it_learns(example: Example) -> None:
    """With half of the voices and steps: most sounds of new voices find the right images, and the reverse."""
    data, main = example.data, example.main
    pixels, digits, held_pixels, held_digits = main.load(1797)
    draw = seeded()
    recordings = data.record(data.training_sounds(16, draw), draw)
    model, losses, least = main.train(pixels, digits, recordings, steps=200, batch=128, seed=0, backend=None)
    assert (losses[:, 0] > least).all() and losses[-20:].mean() < losses[:20].mean() / 1.5
    voices = data.held_voices(2)
    found = example.report.investigate(
        model, example.report.Held(data.held_sounds(voices), voices, held_pixels, held_digits)
    )
    assert found.to_image.any_right[0] > 0.7 and found.to_sound.any_right[0] > 0.6
    assert found.match.accuracy > 0.7 and found.noise.corrupted["babble"][3]["accuracy"] < found.noise.clean["accuracy"]


# Sounds.


def test_voices_of_training_and_report_are_apart(example: Example) -> None:
    data = example.data
    assert not set(data.SPEAKERS) & set(data.HELD_SPEAKERS)
    assert len(set(data.HELD_ACCENTS) - set(data.ACCENTS)) == 1
    assert data.NEW_NOISE not in data.NOISES
    voices = data.held_voices(2)
    assert len(voices) == 12 and {voice.speaker for voice in voices} == {"m3", "m6"}
    for speaker in (*data.SPEAKERS, *data.HELD_SPEAKERS):
        assert speaker in importlib.import_module("mmkernels.testing.speech").variants()


def test_words_are_spoken_in_order(example: Example) -> None:
    """Digit by digit and voice by voice, as loud as is said; the slowest word fits."""
    data = example.data
    voices = [data.Voice("en-029", "m3", data.SLOWEST), data.Voice("en-us", "f3", 230)]
    sounds = data.held_sounds(voices)
    assert sounds.digits.tolist() == [digit for digit in range(10) for _ in range(2)]
    silence = int(data.HELD_MARGIN * data.RATE)
    slow, fast = sounds.lengths.view(10, 2).unbind(1)
    assert (slow > fast).all() and int(slow.max()) < data.SAMPLES  # none is cut
    for row, length in enumerate(sounds.lengths.tolist()):
        word = sounds.samples[row, silence : length - silence]
        assert word.square().mean().sqrt().item() == pytest.approx(data.LOUDNESS, rel=1e-4)
        assert not sounds.samples[row, length:].any() and not sounds.samples[row, :silence].any()
    seven = mmkernels.testing.speech.speak("seven", voice="en-us+f3", speed=230, pitch=50)
    heard = sounds.samples[15, silence:][: len(seven)]
    torch.testing.assert_close(heard / heard.norm(), seven / seven.norm())


def test_silence_moves_a_sound(example: Example) -> None:
    data = example.data
    sounds = tones(data, 3)
    before, behind = torch.tensor([0, 100, 9000]), torch.tensor([50, 0, 0])
    found = data.moved(sounds, before, behind)
    assert found.lengths.tolist() == [8050, 8100, 12800]  # the last only as far as there is room
    for row, start in enumerate((0, 100, 4800)):
        assert torch.equal(found.samples[row, start : start + 8000], sounds.samples[row, :8000])
        assert not found.samples[row, :start].any() and not found.samples[row, start + 8000 :].any()


@pytest.mark.parametrize("kind", ["white", "pink", "babble", "hum"])
def test_noise_is_as_loud_as_is_said(example: Example, kind: str) -> None:
    data = example.data
    sounds = tones(data, length=data.SAMPLES)
    level = torch.linspace(-5, 30, 20)
    noise = data.noisy(sounds, kind, level, seeded(), sounds.samples).samples - sounds.samples
    found = 10 * (sounds.samples.square().mean(1) / noise.square().mean(1)).log10()
    torch.testing.assert_close(found, level, atol=1e-2, rtol=0)
    power = torch.fft.rfft(noise / noise.norm(dim=1, keepdim=True)).abs().square().mean(0)

    def between(low: int, high: int) -> float:  # the mean over frequencies in hertz
        return power[int(low * data.SECONDS) : int(high * data.SECONDS)].mean().item()

    if kind == "white":
        assert 0.8 < between(100, 1000) / between(1000, 8000) < 1.25
    elif kind == "pink":
        assert between(100, 200) / between(1000, 2000) == pytest.approx(10, rel=0.3)
    else:  # babble is made of the other sounds
        base, count = (50, 12) if kind == "hum" else (150, 10)
        places = (base * data.SECONDS * torch.arange(1, count + 1)).round().long()
        assert power[places].sum() / power.sum() > 0.95


def test_noise_ends_with_the_sound(example: Example) -> None:
    data = example.data
    found = data.noisy(tones(data), "white", 0.0, seeded(), tones(data).samples)
    assert found.samples[:, 7990:8000].abs().amax(1).gt(0).all() and not found.samples[:, 8000:].any()
    again = data.noisy(tones(data), "white", 0.0, seeded(), tones(data).samples)
    assert torch.equal(found.samples, again.samples)


def test_recordings_are_sorted_and_differ(example: Example) -> None:
    data = example.data
    found = data.record(tones(data), seeded())
    assert found.mel.shape == (20 * data.COPIES, data.BANDS, data.FRAMES)
    assert found.digits.tolist() == sorted(found.digits.tolist())
    assert torch.bincount(found.digits).tolist() == [2 * data.COPIES] * 10
    assert int(found.frames.min()) >= 50 and int(found.frames.max()) <= 70  # of half a second, with up to 0.2 s more
    assert len({tuple(mel.flatten().tolist()) for mel in found.mel}) == len(found.mel)
    band = data.hear(tones(data)).mel[:, :, 10:40].mean(2).argmax(1)
    assert (band[2:] >= band[:-2]).all() and band[0] < band[-1]  # higher tones, higher bands


def test_batches_pair_what_belongs_together(example: Example) -> None:
    data = example.data
    digits = torch.arange(40) % 10
    pixels = (digits / 10)[:, None, None].expand(-1, 8, 8)
    recordings = data.Recordings(torch.arange(10.0).repeat_interleave(6)[:, None, None].expand(-1, 2, 4).contiguous(),
                                 torch.full((60,), 3), torch.arange(10).repeat_interleave(6))  # fmt: skip
    found = list(data.batches(pixels, digits, recordings, steps=5, size=20, draw=seeded()))
    assert len(found) == 5
    for batch in found:
        assert torch.equal(batch.recordings.digits, batch.digits) and batch.recordings.mel.shape == (20, 2, 3)
        assert torch.equal(batch.recordings.mel[:, 0, 0].long(), batch.digits)
        torch.testing.assert_close(batch.pixels[:, 4, 4], batch.digits / 10)
        assert (batch.digits[batch.wrong] != batch.digits).all()
    for first, second in (found[:2], found[2:4]):  # each epoch has every image once
        assert torch.bincount(torch.cat([first.digits, second.digits])).tolist() == [4] * 10
    again = list(data.batches(pixels, digits, recordings, steps=5, size=20, draw=seeded()))
    assert all(torch.equal(a.wrong, b.wrong) and torch.equal(a.pixels, b.pixels) for a, b in zip(found, again))


# The model.


def test_padding_changes_nothing(example: Example) -> None:
    torch.manual_seed(0)
    model = example.model.SpokenDigits().eval()
    recordings = spectrograms(example.data, 4)
    dirty = recordings._replace(mel=recordings.mel.clone())
    for row, frames in enumerate(dirty.frames.tolist()):
        dirty.mel[row, :, frames:] = 9.0
    images = model.encode_image(torch.rand(4, 8, 8))
    for a, b in ((recordings, dirty), (recordings, recordings.part(slice(0, 4)))):
        one, other = model.encode_sound(a), model.encode_sound(b)
        torch.testing.assert_close(one.features, other.features)
        torch.testing.assert_close(model.match(one, images), model.match(other, images))
        frames = model.match.looks(one, images)[1], model.match.looks(other, images)[1]
        torch.testing.assert_close(frames[0][:, :15], frames[1][:, :15])


def test_looks_are_means_of_attention(example: Example) -> None:
    torch.manual_seed(0)
    model = example.model.SpokenDigits().eval()
    sounds = model.encode_sound(spectrograms(example.data, 3))
    images = model.encode_image(torch.rand(3, 8, 8))
    patches, frames = model.match.looks(sounds, images)
    (a, _), (b, _) = model.match.heads(sounds, images)
    for row, length in enumerate(sounds.lengths.tolist()):
        one, other = a[row : row + 1, :, :length], b[row : row + 1]
        torch.testing.assert_close(patches[row], attention_weights(one, other).mean((0, 1, 2)))
        torch.testing.assert_close(frames[row, :length], attention_weights(other, one).mean((0, 1, 2)))
        assert not frames[row, length:].any()


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-4), (torch.float64, 1e-10)], ids=["fp32", "fp64"])
def test_fused_and_naive_have_one_gradient(example: Example, dtype: torch.dtype, error: float) -> None:
    """Of every parameter, and of sounds of unequal length."""
    data = example.data
    digits = torch.arange(20) % 10
    recordings = spectrograms(data)
    recordings = recordings._replace(mel=recordings.mel.to(dtype))
    pixels = torch.rand(20, 8, 8, generator=seeded()).to(dtype)
    batch = data.Batch(pixels, recordings, digits, (torch.arange(20) + 3) % 20)
    found = {}
    for backend in ("", "reference"):
        torch.manual_seed(0)
        model = example.model.SpokenDigits().to(dtype)
        with mmkernels.use_backend(backend):
            losses = model.losses(batch)
            sum(losses).backward()
        found[backend] = losses, {name: parameter.grad for name, parameter in model.named_parameters()}
    (fused, gradients), (naive, naive_gradients) = found.values()
    torch.testing.assert_close(fused, naive)
    assert [name for name, gradient in gradients.items() if gradient is None] == ["sound.positions"]  # a constant
    scale = max(float(x.abs().max()) for x in naive_gradients.values() if x is not None)
    for name, gradient in gradients.items():
        if gradient is not None:
            assert gradient.any(), name
            torch.testing.assert_close(gradient, naive_gradients[name], rtol=error, atol=error * scale, msg=name)


def test_hard_pairs_are_similar_and_wrong(example: Example, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = example.model.SpokenDigits()
    digits = torch.arange(20) % 10
    wrong = (torch.arange(20) + 3) % 20
    batch = example.data.Batch(torch.rand(20, 8, 8, generator=seeded()), spectrograms(example.data), digits, wrong)
    seen = []
    monkeypatch.setattr(
        model.match, "forward", lambda sounds, images: (seen.append(images.features), torch.zeros(20))[1]
    )
    model.losses(batch)
    model.losses(batch, hard=True)
    right, random, again, hard = seen
    assert torch.equal(random, right[wrong]) and torch.equal(again, right)
    assert torch.equal(hard[1::2], right[wrong[1::2]])
    similar = model.encode_sound(batch.recordings).features @ right.T
    similar[digits[:, None] == digits] = -2
    assert torch.equal(hard[::2], right[similar.argmax(1)[::2]])


def test_a_seed_fixes_everything(example: Example) -> None:
    digits = torch.arange(40) % 10
    pixels = torch.rand(40, 8, 8, generator=seeded())
    recordings = spectrograms(example.data)
    order = recordings.digits.argsort(stable=True)
    recordings = example.data.Recordings(*(x[order] for x in recordings))
    sizes = {"steps": 3, "batch": 20, "backend": None}
    runs = [example.main.train(pixels, digits, recordings, seed=seed, **sizes) for seed in (3, 3, 4)]
    losses = [loss for _, loss, _ in runs]
    assert losses[0].shape == (3, 2) and torch.equal(losses[0], losses[1]) and not torch.equal(losses[0], losses[2])
    assert all((loss[:, 0] > least).all() for _, loss, least in runs)


# Measures.


def test_names_are_those_of_the_nearest_mean(example: Example) -> None:
    report = example.report
    digits = torch.arange(30) % 10
    features = torch.nn.functional.one_hot(digits, 12).float()
    classes = report.means(features, digits)
    assert torch.equal(classes, torch.eye(10, 12)) and report.right(report.named(features, classes), digits) == 1
    assert report.named(features.roll(1, dims=1), classes).tolist()[:3] == [1, 2, 3]


def test_shares_are_of_the_voices(example: Example) -> None:
    voices = example.data.held_voices(2)  # 3 accents, 2 speakers, 2 speeds
    correct = torch.tensor([voice.speaker == "m3" or voice.speed == 160 for voice in voices] * 10)
    found = example.report.shares(correct, voices)
    assert found["speaker"] == {"m3": 1.0, "m6": 0.5} and found["speed"] == {"160": 1.0, "240": 0.5}
    assert found["accent"] == dict.fromkeys(example.data.HELD_ACCENTS, 0.75)


def test_the_head_decides_about_right_and_wrong_pairs(example: Example) -> None:
    """A head that knows the digits is always right; one that trusts the towers takes what is similar for the same."""
    report, encoded = example.report, example.model.Encoded
    said, shown = torch.arange(20) % 10, torch.arange(30) % 10
    space = torch.eye(10)
    space[3] = space[8] = torch.nn.functional.normalize(space[3] + 0.9 * space[8], dim=0)  # the towers confuse 3 and 8
    sounds = encoded(said[:, None, None].float(), None, space[said])
    images = encoded(shown[:, None, None].float(), None, space[shown])

    class Knows:
        def match(self, sounds: Tensor, images: Tensor) -> Tensor:
            return (sounds.tokens == images.tokens)[:, 0, 0].float() - 0.5

    class Trusts:
        def match(self, sounds: Tensor, images: Tensor) -> Tensor:
            return (sounds.features * images.features).sum(1) - 0.5

    for scores in report.decisions(Knows(), sounds, said, images, shown):
        assert scores.accuracy == 1 and scores.total == 40
    assert report.reranked(Knows(), sounds, said, images, shown) == 1
    hard = report.decisions(Trusts(), sounds, said, images, shown)[1]
    assert hard.recall == 1 and hard.false_positive_rate == pytest.approx(4 / 20)  # of two sounds of 3 and two of 8


def test_curves_that_differ_are_an_error(example: Example) -> None:
    naive = torch.linspace(5.0, 3.0, 100, dtype=torch.float64)
    assert "0.0e+00 in all steps" in example.main.check_same(naive, naive)
    early, later, late, never = (naive.clone() for _ in range(4))
    early[9] *= 1 + 3e-6
    later[30] *= 1 + 2e-4
    late[99] *= 1.6
    never[20] = torch.nan
    for fused, steps in ((early, "the first 10"), (later, "the first 40"), (late, "all"), (never, "the first 40")):
        with pytest.raises(AssertionError, match=f"the losses of {steps} steps must be within"):
            example.main.check_same(fused, naive)
    assert "first 40" in example.main.check_same(late, naive, example.main.BOUNDS[:2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps must be 1 to 1000000, got 0"),
        (["--batch", "1438"], "--batch must be 8 to 1437, got 1438"),
        (["--speakers", "33"], "--speakers must be 1 to 32, got 33"),
        (["--held", "0"], "--held must be 1 to 6, got 0"),
        (["--seed", "-1"], "--seed must be 0 to "),
        (["--weights", "nowhere"], "--weights must be a file that an earlier run wrote, got 'nowhere'"),
        (["--out", __file__], "--out must be a folder that can be written, got "),
    ],
)
def test_bad_options(
    example: Example, arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        example.main.main(["--out", str(tmp_path), *arguments])
    assert ended.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("package", "named"),
    [
        ("sklearn.datasets", "scikit-learn"),
        ("matplotlib", "matplotlib"),
        ("safetensors.torch", "safetensors"),
        ("soundfile", "soundfile"),
        ("soxr", "soxr"),
        ("espeakng_loader", "espeakng-loader"),
    ],
)
def test_a_missing_package_says_what_to_install(
    package: str, named: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")
    for name in (*NAMES, package):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit) as ended:
        importlib.import_module("spoken_digits")
    for name in NAMES:
        sys.modules.pop(name, None)
    assert ended.value.code == 2
    install = 'pip install "mmkernels[examples]"'
    assert capsys.readouterr().err == f"spoken_digits: this needs {named}: {install}\n"
