"""Whisper: folders of checkpoints, those with errors too, and configurations."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import change_weights, configure, refused
from whisper_checkpoints import (
    ENGLISH,
    EOS,
    FIRST_TIME,
    GERMAN,
    NO_TIMES,
    PREVIOUS,
    START,
    TRANSCRIBE,
    TRANSLATE,
    sounds,
)

from mmkernels.models import Whisper, WhisperConfig, WhisperTokens
from mmkernels.models.blocks.audio_encoder import sinusoids

WHISPER, UNTIED = "whisper", "whisper_shards"
GENERATION = "generation_config.json"
Copy = Callable[[str], Path]
Ours = Callable[..., Whisper]


def generation(folder: Path, **values: Any) -> None:
    """Sets keys of generation_config.json; ... removes."""
    path = folder / GENERATION
    config = json.loads(path.read_text())
    for name, value in values.items():
        if value is ...:
            del config[name]
        else:
            config[name] = value
    path.write_text(json.dumps(config))


def test_what_the_configuration_says(ours: Ours) -> None:
    config = ours(WHISPER).config
    assert (config.start_token_id, config.eos_token_ids, config.pad_token_id) == (START, (EOS,), EOS)
    assert config.tie_embeddings and ours(WHISPER).head.weight is ours(WHISPER).decoder.embed.weight
    assert not ours(UNTIED).config.tie_embeddings and ours(UNTIED).config.mel_bins == 128
    assert (ours(UNTIED).config.median_filter, ours(UNTIED).config.text_layers) == (5, 3)
    tokens = config.tokens
    assert tokens.languages == {"<|en|>": ENGLISH, "<|de|>": GERMAN}
    assert tokens.tasks == {"translate": TRANSLATE, "transcribe": TRANSCRIBE}
    assert (tokens.no_timestamps_token_id, tokens.first_time, tokens.previous_token_id) == (
        NO_TIMES, FIRST_TIME, PREVIOUS,
    )  # fmt: skip
    assert tokens.suppress[:3] == (3, 7, START) and tokens.begin_suppress == (11, EOS)
    assert tokens.alignment_heads == ((0, 1), (1, 0), (1, 2)) and tokens.max_initial_timestamp == 20


def test_generation_config_counts_more(copy: Copy) -> None:
    folder = copy(WHISPER)
    generation(
        folder, eos_token_id=[EOS, 5], pad_token_id=7, alignment_heads=..., forced_decoder_ids=[[1, None], [2, 65]]
    )
    config = Whisper.from_pretrained(folder).config
    assert (config.eos_token_ids, config.pad_token_id) == ((EOS, 5), 7)
    assert config.tokens.prefix == (None, 65) and config.tokens.alignment_heads == ()


def test_a_folder_without_generation_config(copy: Copy) -> None:
    """As transformers reads it: config.json says what is suppressed, where the vocabulary has the token."""
    folder = copy(WHISPER)
    (folder / GENERATION).unlink()
    configure(folder, suppress_tokens=[9, 50000], begin_suppress_tokens=[220, 4], forced_decoder_ids=[[1, ENGLISH]])
    tokens = Whisper.from_pretrained(folder).config.tokens
    assert tokens == WhisperTokens(suppress=(9,), begin_suppress=(4,), prefix=(ENGLISH,))


def test_names_of_hub_checkpoints(copy: Copy, ours: Ours) -> None:
    """Some of them hold the last layer too, which has the weight of the embeddings."""
    folder = copy(WHISPER)
    embed = "model.decoder.embed_tokens.weight"
    change_weights(folder, lambda tensors: tensors.update({"proj_out.weight": tensors[embed].clone()}))
    model = Whisper.from_pretrained(folder)
    assert model.head.weight is model.decoder.embed.weight
    for (name, x), (_, y) in zip(model.named_parameters(), ours(WHISPER).named_parameters(), strict=True):
        assert torch.equal(x, y), name
    change_weights(folder, lambda tensors: tensors.pop("model.encoder.conv1.bias"))
    refused(folder, r"must hold model.encoder.conv1.bias \[32\]")


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"architectures": ["WhisperForAudioClassification"]}, r"architectures must be \['WhisperForConditionalG"),
        ({"model_type": "bert"}, "model_type must be one of whisper, got 'bert'"),
        ({"d_model": 30}, "d_model: text_width must be a multiple of text_heads = 4, got 30"),
        ({"num_mel_bins": 0}, "num_mel_bins: mel_bins must be an integer from 1 to"),
        ({"encoder_layers": 10**6}, "encoder_layers: audio_layers must be an integer from 1 to 512, got 1000000"),
        ({"max_source_positions": 10**9}, "max_source_positions: audio_positions must be an integer from 1 to"),
        ({"activation_function": "sine"}, "activation_function: text_activation must be one of"),
        ({"dropout": 2.0}, "dropout: .*must be a number between 0 and 1, got 2.0"),
        ({"median_filter_width": 4}, "median_filter_width: median_filter must be an odd integer"),
        ({"eos_token_id": None}, "eos_token_id must be a token or a list of tokens, got null"),
        ({"eos_token_id": 119}, r"eos_token_ids must be integers below vocab_size = 119, got \(119,\)"),
        ({"decoder_start_token_id": 119}, "decoder_start_token_id: start_token_id must be an integer below vocab_size"),
        ({"vocab_size": 64}, "must be .*below vocab_size = 64"),
        ({"d_model": 64}, r"model.* must be \[.*64.*\] by config.json, got \[.*32"),
    ],
)
def test_wrong_configurations(values: dict[str, Any], match: str, copy: Copy) -> None:
    folder = copy(WHISPER)
    configure(folder, **values)
    refused(folder, match)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"alignment_heads": [[2, 0]]}, "alignment_heads must be pairs of a layer below 2 and a head below 4, got"),
        ({"alignment_heads": [[0, 4]]}, "alignment_heads must be pairs"),
        ({"alignment_heads": [3]}, "generation_config.json: .*not iterable"),
        ({"suppress_tokens": [119]}, "suppress must be integers below vocab_size = 119, got 119"),
        ({"lang_to_id": {"<|en|>": 500}}, "languages must be integers below vocab_size = 119, got 500"),
        ({"lang_to_id": 3}, "generation_config.json: .*not iterable"),
        ({"no_timestamps_token_id": "x"}, "no_timestamps_token_id must be integers below vocab_size = 119, got 'x'"),
        ({"max_initial_timestamp_index": -1}, "max_initial_timestamp must be an integer >= 0 or None, got -1"),
        ({"suppress_tokens": [None]}, "suppress must be integers below vocab_size = 119, got None"),
        ({"begin_suppress_tokens": [None]}, "begin_suppress must be integers below vocab_size = 119, got None"),
        ({"lang_to_id": {"<|en|>": None}}, "languages must be integers below vocab_size = 119, got None"),
        ({"eos_token_id": 10**12}, "eos_token_ids must be integers below vocab_size = 119, got"),
        ({"decoder_start_token_id": "a"}, "decoder_start_token_id: start_token_id must be an integer below vocab_size"),
        ({"language": "xx"}, "language must be one of de, en, ..., got 'xx'"),
        ({"language": ["en"]}, "language must be a string or None, got"),
        ({"task": "sing"}, "task must be one of transcribe, translate or None, got 'sing'"),
        ({"forced_decoder_ids": [[2, 5]]}, "forced_decoder_ids must be pairs of a place, 1, 2, ..., and a token"),
    ],
)
def test_wrong_generation_configurations(values: dict[str, Any], match: str, copy: Copy) -> None:
    folder = copy(WHISPER)
    generation(folder, **values)
    refused(folder, match)


@pytest.mark.parametrize(
    ("values", "options"),
    [
        ({"language": "de", "task": "translate"}, {}),
        ({"language": "german"}, {"task": "translate"}),
        ({"task": "translate"}, {"language": "en"}),
        ({"language": "de", "task": "translate", "forced_decoder_ids": [[1, ENGLISH]]}, {}),
        ({"decoder_start_token_id": 5, "language": "de"}, {}),
    ],
)
def test_language_task_and_start_of_a_generation_config(
    values: dict[str, Any], options: dict[str, Any], copy: Copy
) -> None:
    folder = copy(WHISPER)
    generation(folder, **values)
    theirs = transformers.WhisperForConditionalGeneration.from_pretrained(folder)
    features = sounds(theirs)
    expected = theirs.generate(
        features, max_new_tokens=2, return_dict_in_generate=True, force_unique_generate_call=True, **options
    )
    found = Whisper.from_pretrained(folder).generate(features, max_new_tokens=2, **options)
    assert torch.equal(torch.cat([found.prompt, found.tokens], dim=1), expected.sequences)


def test_a_generation_config_that_is_no_json(copy: Copy) -> None:
    folder = copy(WHISPER)
    (folder / GENERATION).write_text("{")
    refused(folder, f"{re.escape(GENERATION)}: must be JSON")


def test_sizes() -> None:
    tiny = Whisper.from_size("tiny")
    assert torch.equal(tiny.encoder.positions, sinusoids(50, 32)) and not tiny.encoder.positions.requires_grad
    config = Whisper.sizes["tiny"]
    for changes, match in (
        ({"audio_width": 64}, "audio_width must be text_width = 32, got 64"),
        ({"start_token_id": None}, "start_token_id must be an integer below vocab_size = 128, got None"),
        ({"eos_token_ids": ()}, r"eos_token_ids must name a token, got \(\)"),
        ({"spec_augment": 1}, "spec_augment must be a bool, got 1"),
    ):
        with pytest.raises(ValueError, match=match):
            replace(config, **changes)  # type: ignore[arg-type]
    published: WhisperConfig = Whisper.sizes["large_v3"]
    assert (published.mel_bins, published.vocab_size, published.tokens.first_time) == (128, 51866, 50365)
    assert published.vocab_size - 50365 == 1501  # the times from 0.00 to 30.00
    assert Whisper.sizes["base"].vocab_size - Whisper.sizes["base"].tokens.first_time == 1501  # type: ignore[operator]
