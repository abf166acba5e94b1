"""The profiler on models that hear: Whisper and Qwen2-Audio."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from rich.console import Console

from mmkernels.models.blocks.audio import SAMPLING_RATE
from mmkernels.options import BadInput
from mmkernels.profiling import html_report, plot_sound, sound, sound_profiler, sound_table, table, timing
from mmkernels.profiling.command import run_profile
from mmkernels.profiling.options import Excerpt
from mmkernels.profiling.pareto import row_of
from mmkernels.profiling.sound import Sound, chirp, open_sound
from mmkernels.profiling.sound_options import HEARING, SoundOptions
from mmkernels.testing.models import build

SOUND = Sound("chirp.wav", chirp(1.0))
POOL = (1, 2, 4)


def options(model: str, **more: Any) -> SoundOptions:
    settings = {"seconds": (0.5, 1.0), "pool": POOL, "size": "tiny"} | more
    if model == "qwen2_audio":
        settings = {"text_length": 12} | settings
    return SoundOptions(model, **settings)


def fitted(model: str, **more: Any) -> SoundOptions:
    return sound_profiler.fit(options(model, **more), SOUND)


def made(model: str, row: Excerpt) -> tuple[Any, Any, Any]:
    """Returns the adapter, its model and its inputs."""
    adapter, chosen = sound_profiler.ADAPTERS[model], fitted(model)
    net = adapter.build(chosen, row)
    return adapter, net, adapter.inputs(chosen, net, [SOUND], row)


@pytest.fixture(scope="module", params=HEARING)
def report(request: pytest.FixtureRequest) -> dict[str, Any]:
    return sound_profiler.profile(fitted(request.param, train=request.param == "whisper"), SOUND)


def render(report: dict[str, Any]) -> str:
    console = Console(width=100, no_color=True)
    with console.capture() as capture:
        console.print(table.render(report))
    return capture.get()


def words(text: str) -> str:
    return " ".join(text.split())


# The models.


@torch.no_grad()
@pytest.mark.parametrize("pool", POOL)
@pytest.mark.parametrize("model", HEARING)
def test_stages_make_up_the_model(model: str, pool: int) -> None:
    adapter, net, inputs = made(model, Excerpt(0.5, pool))
    states: list[Any] = [None]
    for stage in adapter.stages:
        states.append(stage.run(net, inputs, stage.fork(states[-1])))
    assert torch.equal(states[1], inputs.heard.features) and states[1].shape[2] == 50
    features = 25 if model == "whisper" else 12
    found = adapter.reduction(net, inputs)
    assert (found.tokens, found.columns) == (-(-features // pool), features)
    read = states[-2]
    if model == "whisper":
        assert states[3].features.shape[1] == states[4].layers[0][0].shape[2] == found.tokens
        logits = net.whisper(inputs.prompt, sound=net.hear(inputs.heard.features), last_logits_only=True).logits
        assert torch.equal(read.token, logits.argmax(-1))
        assert (read.cache.num_tokens, states[-1].cache.num_tokens) == (4, 12)
    else:
        assert states[3].lengths == (found.tokens,) and states[3].marked == (12,)
        logits = adapter.logits(net, inputs)
        assert torch.equal(read.token, logits[:, -1:, : inputs.text_ids].argmax(-1)) and logits.shape[1] == 12
        assert (read.kv_cache.num_tokens, states[-1].kv_cache.num_tokens) == (found.tokens + 12, found.tokens + 20)


@torch.no_grad()
@pytest.mark.parametrize("model", HEARING)
def test_the_sound_and_its_pooling_change_the_output(model: str) -> None:
    adapter, net, inputs = made(model, Excerpt(0.5, 1))
    logits = adapter.logits(net, inputs)
    other = replace(inputs, heard=replace(inputs.heard, features=inputs.heard.features.flip(2)))
    pooled = adapter.exchange(fitted(model), net, Excerpt(0.5, 4))
    assert {id(x) for x in pooled.parameters()} == {id(x) for x in net.parameters()}
    for changed in (adapter.logits(net, other), adapter.logits(pooled, inputs)):
        assert changed.shape == logits.shape and (changed - logits).norm() > 1e-3 * logits.norm()
    assert torch.equal(adapter.logits(net, inputs), logits)


@pytest.mark.parametrize("pool", [1, 2])
@pytest.mark.parametrize("model", HEARING)
def test_the_naive_loss_is_the_same_loss(model: str, pool: int) -> None:
    adapter, net, inputs = made(model, Excerpt(0.5, pool))
    net.double()
    inputs = replace(inputs, heard=replace(inputs.heard, features=inputs.heard.features.double()))
    trained = [x for x in net.parameters() if x.requires_grad]
    losses = adapter.loss(net, inputs), adapter.naive_loss(net, inputs)
    gradients = [torch.autograd.grad(loss, trained) for loss in losses]
    torch.testing.assert_close(losses[0].float(), losses[1].float(), rtol=1e-6, atol=0)  # the naive one is in float32
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)


# The report.


def test_rows_are_seconds_with_pooling(report: dict[str, Any]) -> None:
    assert json.loads(json.dumps(report)) == report
    rows = [f"{seconds:g} s, pool {pool}" for seconds in (0.5, 1.0) for pool in POOL]
    assert report["rows"] == rows == list(dict.fromkeys(str(row_of(cell)) for cell in report["cells"]))
    whisper = report["settings"]["model"] == "whisper"
    features = {0.5: 25, 1.0: 50} if whisper else {0.5: 12, 1.0: 25}
    for cell in report["cells"]:
        assert cell["tokens"] == -(-features[cell["sound_seconds"]] // cell["pool"])
        more = {"train_step"} if report["settings"]["train"] else set()
        assert set(cell["seconds"]) == {*report["stages"], "total"} | more
        drift = cell["drift"]["relative_l2"]
        assert drift > 1e-4 if cell["pool"] > 1 else drift < 1e-5
        if cell["backend"] == "fused":
            assert cell["amdahl"]["total"]["speedup"] > 0
    assert list(report["stages"]) == [
        "mel",
        "encode",
        "pool",
        *(["keys", "prompt"] if whisper else ["prefill"]),
        "decode",
    ]
    assert report["total"]["stages"] == list(report["stages"])[:-1]
    assert set(report["seconds_per_second_of_sound"]) == {"fused", "reference"}


def test_rows_of_one_sound_share_the_work_that_pooling_does_not_change(report: dict[str, Any]) -> None:
    for seconds in (0.5, 1.0):
        cells = [c for c in report["cells"] if c["backend"] == "fused" and c["sound_seconds"] == seconds]
        for stage in ("mel", "encode"):
            assert len({cell["seconds"][stage] for cell in cells}) == 1
        assert len({cell["seconds"][report["total"]["stages"][-1]] for cell in cells}) == 3


def test_the_command_repeats_the_profile(report: dict[str, Any]) -> None:
    model, text = report["settings"]["model"], {"whisper": 4, "qwen2_audio": 12}
    assert report["command"].startswith(
        f"mmkernels profile {model} --seconds 0.5,1 --pool 1,2,4 --text-length {text[model]} --backend fused,reference"
    )
    named = sound_profiler.command(replace(fitted(model), audio=Path("/home/x/some sound.wav")))
    assert "--audio 'some sound.wav' --seconds" in named


def test_the_table_says_what_was_heard(report: dict[str, Any]) -> None:
    text = render(report)
    assert "…" not in text and max(map(len, text.splitlines())) <= 100
    assert "the first 0.5 and 1 s of chirp.wav" in words(text)
    assert "s: seconds of sound, without the silence" in text and "by: so many neighbouring features" in text
    assert "from those of the same sound that is not pooled, naive" in words(text)
    assert words(table.RANDOM) in words(text)
    summary = table.summary(report)
    assert summary.startswith("fused, 1 s of sound in ") and "pooled by 4 " in summary and "drift" in summary


def test_what_was_not_measured_is_said(report: dict[str, Any]) -> None:
    short = report | {"cells": report["cells"][:6]}
    assert "Interrupted: 1 s, pool 1 and 1 s, pool 2 and 1 s, pool 4 were not measured." in table.warnings(short)
    assert table.summary(short).startswith("fused, 0.5 s of sound")
    failed = [cell | {"failed": "out of memory", "seconds": {}, "drift": None} for cell in report["cells"]]
    assert sound_table.summary(report | {"cells": failed}) == "Nothing fitted into memory."
    assert "out of" in render(report | {"cells": [cell | {"amdahl": {}} for cell in failed]})


def test_the_picture(
    report: dict[str, Any],
    tmp_path: Path,
    figures_of: Callable[[ModuleType], list[Any]],
    overlaps: Callable[[Any], list[tuple[str, str]]],
) -> None:
    figures = figures_of(plot_sound)
    plot_sound.draw(report, SOUND, tmp_path / "profile.png")
    (figure,) = figures
    assert overlaps(figure) == [] and (tmp_path / "profile.png").stat().st_size > 20_000
    spectrogram, stages, step, memory, drift = figure.axes
    names = [text.get_text() for text in stages.get_legend().get_texts()]
    assert sorted(names) == sorted([*report["total"]["stages"], "naive"])
    assert len(stages.patches) == 6 * len(report["total"]["stages"])
    assert len(step.lines) == 2 * len(POOL) == len(drift.lines) and spectrogram.images and memory.get_title("left")


def test_a_picture_of_one_row(report: dict[str, Any], tmp_path: Path) -> None:
    cells = [cell | {"amdahl": {}, "drift": None} for cell in report["cells"][:1]]
    settings = report["settings"] | {"seconds": [0.5], "pool": [1], "backends": ["fused"]}
    alone = report | {"cells": cells, "settings": settings, "rows": report["rows"][:1]}
    plot_sound.draw(alone, SOUND, tmp_path / "profile.png")
    assert "n/a" in render(alone)


def test_the_page_for_a_browser(report: dict[str, Any], tmp_path: Path) -> None:
    html_report.write_of_sound(report, SOUND, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert (
        "What a second of sound costs" in page and html_report.POLICY in page and "http" not in page.split("<main>")[1]
    )
    assert page.count("<tr>") == 1 + len(report["cells"]) and "Pareto" not in page and "same token" in page


# The sound.


def test_the_default_sound_is_speech_or_a_chirp(monkeypatch: pytest.MonkeyPatch) -> None:
    spoken = open_sound(None)
    assert spoken.made and spoken.seconds == 30.0 and spoken.samples.abs().max() > 0.05
    monkeypatch.setattr(sound, "_speech", lambda: None)
    tone = open_sound(None)
    assert tone.made and tone.seconds == 30.0 and "espeakng-loader is not installed" in tone.name
    spectrum = torch.fft.rfft(tone.samples[:SAMPLING_RATE]).abs()
    assert spectrum[200:4001].square().sum() > 0.98 * spectrum.square().sum()


def test_a_file_is_heard_from_its_beginning(tmp_path: Path) -> None:
    tone = 0.1 * np.sin(np.arange(22_050) / 9.0)
    soundfile.write(tmp_path / "a.wav", np.stack([tone, tone], 1), 22_050)
    heard = open_sound(tmp_path / "a.wav")
    assert heard.name == "a.wav" and not heard.made and heard.seconds == pytest.approx(1.0, abs=0.01)
    assert heard.first(0.25).shape == (4000,)


def test_a_short_sound_has_the_rows_that_it_has_room_for() -> None:
    chosen = SoundOptions("whisper")
    assert chosen.fitted("a.wav", 31.0) == (5.0, 10.0, 30.0) and chosen.fitted("a.wav", 10.0) == (5.0, 10.0)
    assert chosen.fitted("a.wav", 3.27) == (3.2,)
    with pytest.raises(BadInput, match=r"--audio must last at least 0.1 s, got 0.04 s of a.wav"):
        chosen.fitted("a.wav", 0.04)
    with pytest.raises(BadInput, match=r"--audio must last at least 0.1 s, got 0.06 s of a.wav"):
        replace(chosen, seconds=(1.0,)).fitted("a.wav", 0.06)
    with pytest.raises(BadInput, match=r"--seconds must be at most the 3.2 s of a.wav, got 2,4"):
        replace(chosen, seconds=(2.0, 4.0)).fitted("a.wav", 3.27)


# Bad input, and folders.


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"seconds": (0.05,)}, "--seconds must be 1 to 12 times from 0.1 to 30 s in steps of 0.1, .*; got 0.05"),
        ({"seconds": (31.0,)}, "--seconds must be .*; got 31"),
        ({"seconds": (float("nan"),)}, "--seconds must be .*; got nan"),
        ({"seconds": ()}, "--seconds must be .*; got nothing"),
        ({"pool": (0,)}, "--pool must be 1 to 12 integers from 1 to 64, such as 1,2,4; got 0"),
        ({"pool": ()}, "--pool must be .*; got nothing"),
        ({"text_length": 0}, "--text-length must be at least 1, got 0"),
        ({"dtype": "int8"}, "--dtype must be one of"),
        ({"backends": ("fast",)}, "--backend must be one of"),
        ({"folder": Path("x")}, "--size must not be given with --model"),
        ({"folder": Path("/nowhere"), "size": None}, "--model: "),
        ({"size": "huge"}, "--size must be one of tiny, small, base; got 'huge'"),
        ({"seconds": (2.0,)}, "--seconds must be at most the 1 s of chirp.wav, got 2"),
    ],
)
@pytest.mark.parametrize("model", HEARING)
def test_bad_settings_are_found_before_anything_is_measured(model: str, given: dict[str, Any], match: str) -> None:
    with pytest.raises(BadInput, match=match):
        fitted(model, **given)


def test_a_text_must_have_room() -> None:
    with pytest.raises(
        BadInput, match=r"--text-length must leave the prompt and 28 tokens more within 64, got 68 by 40"
    ):
        fitted("whisper", text_length=40)
    with pytest.raises(BadInput, match=r"within 16384, got 16395 by 16362 and 25 tokens of sound"):
        fitted("qwen2_audio", text_length=16362)


def test_numbers_are_sorted_and_the_unpooled_row_comes_first() -> None:
    chosen = options("whisper", seconds=(1.0, 0.5, 1.0), pool=(4, 2))
    assert (chosen.seconds, chosen.pool) == ((0.5, 1.0), (1, 2, 4))
    with pytest.raises(BadInput, match="model must be one of whisper, qwen2_audio; got 'clip'"):
        SoundOptions("clip")


def test_a_checkpoint_is_profiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(timing, "_LEAST_ROUNDS", 1)
    sizes = {f"{side}_{name}": size for side in ("encoder", "decoder")
             for name, size in {"layers": 1, "attention_heads": 2, "ffn_dim": 32}.items()}  # fmt: skip
    special: dict[str, Any] = dict.fromkeys(("eos_token_id", "bos_token_id", "pad_token_id"), 90)
    special |= {"decoder_start_token_id": 91, "begin_suppress_tokens": None}
    config = {"d_model": 16, "vocab_size": 100, "max_source_positions": 50, "max_target_positions": 48}
    build("WhisperForConditionalGeneration", sizes | special | config).save_pretrained(tmp_path / "model")
    soundfile.write(tmp_path / "a.wav", SOUND.samples.numpy(), SAMPLING_RATE)
    chosen = SoundOptions(
        "whisper", audio=tmp_path / "a.wav", seconds=(0.5,), pool=(2,), folder=tmp_path / "model", backends=("fused",)
    )
    run_profile(chosen, tmp_path / "out", tmp_path / "report.html")
    found = json.loads((tmp_path / "out" / "profile.json").read_text())
    assert found["settings"]["folder"] == "model" and found["settings"]["audio"] == "a.wav"
    assert str(tmp_path) not in json.dumps(found) and [cell["tokens"] for cell in found["cells"]] == [25, 13]
    said = words(capsys.readouterr().out)
    assert "whisper model, fp32, its weights; the first 0.5 s of a.wav" in said and "random" not in said
    soundfile.write(tmp_path / "long.wav", chirp(2.0).numpy(), SAMPLING_RATE)
    with pytest.raises(BadInput, match=r"--seconds must be at most 1, what the model hears at once; got 1.5"):
        run_profile(replace(chosen, audio=tmp_path / "long.wav", seconds=(1.5,)), tmp_path / "out")
    with pytest.raises(BadInput, match="--report must be a file of its own"):
        run_profile(chosen, tmp_path / "out", tmp_path / "a.wav")
    (tmp_path / "b.wav").write_bytes(b"RIFF")
    with pytest.raises(BadInput, match=r"--audio .*b.wav: must be a whole sound"):
        run_profile(replace(chosen, audio=tmp_path / "b.wav"), tmp_path / "out")
