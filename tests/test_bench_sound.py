"""The rows of the models' benchmark that are about sound, on tiny models."""

from dataclasses import replace
from functools import partial
from typing import Any

import models_sound as sound
import pytest
import torch
from models_measure import Row, Trial
from models_targets import SDPA, WITHOUT_TIMES
from test_bench_models import _quick, measured

from mmkernels.models import Whisper
from mmkernels.targets import OURS

__all__ = ["_quick"]  # a fixture that every test here uses

TINY_TOWER = {"num_mel_bins": 8, "d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 4} | {
    "encoder_ffn_dim": 64,
    "output_dim": 16,
    "n_window": 8,
}
OMNI, STEP, WRITE = sound.SOUND_CASES
TINY = {"d_model": 16, "heads": 2, "num_mel_bins": 8}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_tower_of_qwen_omni_makes_one_call_a_layer(dtype: str) -> None:
    pair, inputs = partial(sound.omni_tower, **TINY_TOWER), partial(sound._recording, seconds=1)
    info = measured(replace(OMNI, pair=pair, inputs=inputs), dtype)
    attention = info["attention"]
    chunks = 7  # 100 mel frames, 16 in a chunk, of which the convolutions leave 8
    assert attention["sdpa_calls"] == 2 * chunks and attention["calls"] == attention["layers"] == 2
    assert attention["flops"] == 2 * 4 * (6 * 8**2 + 2**2) * 32
    limits = {target["than"]: target["found"] for target in info["targets"]}
    assert limits["calls a layer"] == 1.0 and limits["share of cap"] == info["amdahl"]["share_of_cap"]
    assert limits["time, transformers'"] == info["peers"][SDPA]["ratio"]
    assert max(info["distances"][OURS]) < (1e-5 if dtype == "fp32" else 0.02)


def test_the_tower_has_the_published_sizes_and_five_minutes() -> None:
    from transformers import Qwen2_5OmniAudioEncoderConfig as Config

    config = Config(**sound._OMNI)
    inputs = sound._recording(config, seconds=300)[""]
    assert inputs["input_features"].shape == (128, 30_000) and inputs["feature_lens"].tolist() == [30_000]
    published: dict[str, Any] = {"d_model": 1280, "encoder_layers": 32, "n_window": 100, "output_dim": 3584}
    assert {name: getattr(config, name) for name in published} == published


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_step_of_all_beams_reads_the_sound_once(dtype: str) -> None:
    pair = partial(sound.whisper, TINY, layers=2, max_source_positions=20)
    inputs = partial(sound._beams, frames=40, written=4)
    info = measured(replace(STEP, pair=pair, inputs=inputs), dtype)
    attention, size = info["attention"], 4 if dtype == "fp32" else 2
    assert attention["calls"] == attention["layers"] == attention["sdpa_calls"] == 4 and info["encoder_calls"] == 0
    one_layer = 2 * 20 * 16 + 5 * 2 * 5 * 16 + 2 * 2 * 5 * 16  # the sound; the text so far; queries and outputs of both
    assert attention["bytes"] == 2 * size * one_layer
    found = {target["than"]: target["found"] for target in info["targets"]}
    assert found["attention, of read bandwidth"] == attention["bytes"] / attention["seconds"][OURS] / 2e9
    assert found["attention, sdpa's"] == attention["ratio"]


def test_a_step_begins_with_the_same_texts_each_time() -> None:
    pair = partial(sound.whisper, TINY, layers=2, max_source_positions=20)
    case = replace(STEP, pair=pair, inputs=partial(sound._beams, frames=40, written=4))
    trial = Trial(Row(case, "fp32"))
    with torch.no_grad():
        for name in (SDPA, OURS):
            first, again = (trial.results(name)[0] for _ in range(2))
            assert torch.equal(first, again) and first.shape == (5, 1, 1000)
        ours = trial.ours
        inputs = trial._inputs[""]
        ids = torch.cat([inputs["written"], inputs["token"]], dim=1)
        whole = ours(ids, inputs["input_features"], last_logits_only=True).logits
    torch.testing.assert_close(first, whole, rtol=0, atol=1e-5)


def test_times_of_words_are_compared_with_writing_alone() -> None:
    pair = partial(sound.whisper, TINY, layers=2, alignment=[[0, 1], [1, 0]], max_source_positions=20)
    case = replace(WRITE, pair=pair, inputs=partial(sound._to_write, length=6, frames=40))
    info = measured(case)
    found = {target["than"]: target["found"] for target in info["targets"]}
    without = info["peers"][WITHOUT_TIMES]["seconds"]
    assert found["time, without word times"] == info["seconds"] / without
    assert info["distances"][OURS] == [0.0] and info["encoder_calls"] == 1
    trial = Trial(Row(case, "fp32"))
    inputs = trial._inputs[""]
    with torch.no_grad():
        theirs = trial.theirs.generate(
            inputs["input_features"],
            attention_mask=torch.ones(1, 40).long(),
            return_token_timestamps=True,
            max_new_tokens=6,
        )
        lengths = inputs["frame_lengths"]
        ours = trial.ours.generate(inputs["input_features"], frame_lengths=lengths, token_times=True, max_new_tokens=6)
    assert theirs["sequences"][0, -6:].tolist() == ours.tokens[0].tolist()
    assert ours.token_times is not None and ours.token_times.shape == (1, 6)


@pytest.mark.parametrize(("sizes", "published"), [(sound._LARGE_V3, "large_v3"), (sound._SMALL, "small")])
def test_whisper_has_published_widths(sizes: dict[str, int], published: str) -> None:
    config = Whisper.sizes[published]
    assert (config.text_width, config.text_heads, config.mel_bins) == tuple(sizes.values())
    assert config.text_mlp == 4 * config.text_width and config.audio_positions == sound.MEL_FRAMES // 2


def test_every_row_of_sound_has_its_own_name_and_targets() -> None:
    names = [str(Row(case, "fp32")) for case in sound.SOUND_CASES]
    assert len(set(names)) == len(names) and all(case.targets for case in sound.SOUND_CASES)
