"""What Whisper writes: as transformers does greedily and by a beam search, by the same rules, with the same times."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from checkpoints import Saved
from torch import Tensor
from whisper_checkpoints import EOS, FIRST_TIME, FRAMES, GERMAN, LENGTH, NO_TIMES, PREVIOUS, START, TRANSCRIBE, sounds

import mmkernels
from mmkernels.models import Whisper, WhisperTokens
from mmkernels.models import whisper_timestamps as stamps
from mmkernels.models.whisper_decoder import WhisperCache
from mmkernels.models.whisper_tokens import TokenRules

Store = Callable[[str], Saved]
Ours = Callable[..., Whisper]


def theirs(checkpoint: Saved, features: Tensor, **options: Any) -> Any:
    """Returns what transformers' model writes in one call: tokens with the prompt, scores and times."""
    given = {"return_dict_in_generate": True, "force_unique_generate_call": True, "output_scores": True}
    checkpoint.theirs.generation_config.max_length = LENGTH
    timestamps = options.pop("timestamps", False)
    return checkpoint.theirs.generate(features, return_timestamps=timestamps, **given, **options)


WAYS: dict[str, dict[str, Any]] = {
    "language": {"language": "en"},
    "detected": {},
    "languages": {"language": ["en", "german", "<|de|>"], "task": "translate"},
    "times": {"language": "de", "timestamps": True},
    "times, another end": {"language": "de", "timestamps": True, "eos_token_id": 30},
    "previous": {"language": "en", "prompt_ids": torch.tensor([PREVIOUS, 5, 6])},
    "few": {"max_new_tokens": 6},
    "beams": {"language": "en", "num_beams": 4},
    "beams, long": {"language": "en", "num_beams": 3, "length_penalty": 2.0},
    "beams, times": {"num_beams": 5, "timestamps": True},
}


_OFTEN = ("languages", "times", "beams, times", "few")  # what the others vary is in one of these


@pytest.mark.parametrize("way", [way if way in _OFTEN else pytest.param(way, marks=pytest.mark.slow) for way in WAYS])
@pytest.mark.parametrize("variant", ["whisper", pytest.param("whisper_shards", marks=pytest.mark.slow)])
def test_writes_what_transformers_writes(variant: str, way: str, saved: Store, ours: Ours) -> None:
    features = sounds(saved(variant).theirs, 3)
    found = ours(variant).generate(features, **WAYS[way])
    expected = theirs(saved(variant), features, **WAYS[way])
    start = found.prompt.shape[1]
    assert torch.equal(found.prompt, expected.sequences[:, :start])
    assert torch.equal(found.tokens, expected.sequences[:, start:])
    assert len(found.tokens.unique()) > 2  # not one word again and again
    assert not torch.equal(found.tokens[0], found.tokens[1])  # the sound counts
    if "num_beams" in WAYS[way]:
        torch.testing.assert_close(found.scores, expected.sequences_scores, rtol=1e-4, atol=1e-5)


def _frequent(tokens: Tensor) -> list[int]:
    """Returns two tokens that end texts of different lengths: one of the first text, and one of the second."""
    return [int(tokens[0, 6]), int(tokens[1, 9])]


@pytest.mark.parametrize("num_beams", [1, 3])
def test_rows_that_end_before_others(num_beams: int, saved: Store, ours: Ours) -> None:
    """Each row is what the sound has alone, in its tokens, score and times; padding follows."""
    model, checkpoint = ours("whisper"), saved("whisper")
    features = sounds(checkpoint.theirs, 4)
    lengths = torch.tensor([FRAMES, 70, 33, 98])
    ends = _frequent(model.generate(features, language="en").tokens)
    given: dict[str, Any] = {"language": "en", "num_beams": num_beams, "eos_token_id": ends}
    found = model.generate(features, token_times=True, frame_lengths=lengths, **given)
    assert len(set(found.lengths.tolist())) > 1
    assert found.token_times is not None
    for row, count in enumerate(found.lengths.tolist()):
        mask = (torch.arange(FRAMES) < lengths[row])[None].long()
        one = features[row : row + 1]
        alone = theirs(checkpoint, one, return_token_timestamps=True, attention_mask=mask, **given)
        start = found.prompt.shape[1]
        assert alone["sequences"][0, start:].tolist() == found.tokens[row, :count].tolist()
        assert found.tokens[row, count:].eq(EOS).all()
        torch.testing.assert_close(alone["token_timestamps"][0, start:], found.token_times[row, :count])
        assert found.token_times[row, count:].eq(found.token_times[row, count - 1]).all()


@pytest.mark.parametrize("lengths", [None, pytest.param((FRAMES, FRAMES), marks=pytest.mark.slow), (61, 34)])
@pytest.mark.parametrize("options", [{}, {"num_beams": 4}, {"timestamps": True}, {"max_new_tokens": 1}])
@pytest.mark.parametrize("variant", ["whisper", pytest.param("whisper_shards", marks=pytest.mark.slow)])
def test_token_times_equal_transformers(
    variant: str, options: dict[str, Any], lengths: tuple[int, int] | None, saved: Store, ours: Ours
) -> None:
    features = sounds(saved(variant).theirs)
    frames = None if lengths is None else torch.tensor(lengths)
    mask = {} if frames is None else {"attention_mask": (torch.arange(FRAMES) < frames[:, None]).long()}
    found = ours(variant).generate(features, language="en", token_times=True, frame_lengths=frames, **options)
    expected = theirs(saved(variant), features, language="en", return_token_timestamps=True, **mask, **options)
    start = found.prompt.shape[1]
    assert torch.equal(found.tokens, expected["sequences"][:, start:])
    torch.testing.assert_close(found.token_times, expected["token_timestamps"][:, start:])


def test_times_take_one_call_a_layer_and_keep_the_fused_path(
    saved: Store, ours: Ours, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, features = ours("whisper"), sounds(saved("whisper").theirs)
    calls: list[tuple[int, ...]] = []

    def weights(query: Tensor, *others: Any) -> Tensor:
        calls.append(tuple(query.shape))
        return mmkernels.attention_weights(query, *others)

    monkeypatch.setattr(stamps, "attention_weights", weights)
    found = model.generate(features, language="en", token_times=True, num_beams=3)
    count = found.tokens.shape[1] - 1
    assert calls == [(2, 1, count, 8), (2, 2, count, 8)]  # layer 0 has one chosen head, layer 1 has two
    calls.clear()
    assert model.generate(features, language="en").token_times is None and not calls


def test_beams_read_the_keys_of_a_sound_once(saved: Store, ours: Ours, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a step each layer makes one call over the frames, whose queries are the beams."""
    model, features = ours("whisper"), sounds(saved("whisper").theirs)
    shapes = []
    attend = mmkernels.nn.CrossAttention.attend

    def watched(self: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any = None, **options: Any) -> Tensor:
        shapes.append((tuple(query.shape[:3]), key.shape[0], key.shape[2]))
        return attend(self, query, key, value, mask, **options)

    monkeypatch.setattr(mmkernels.nn.CrossAttention, "attend", watched)
    model.generate(features, language="en", num_beams=3, max_new_tokens=3)
    frames = [shape for shape in shapes if shape[2] == FRAMES // 2 and shape[0][2] < FRAMES // 2]
    assert frames == [((2, 4, 4), 2, 50)] * 2 + [((2, 4, 3), 2, 50)] * 4  # the prompt of 4 tokens; two steps of 3 beams


@pytest.mark.parametrize("num_beams", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_padding_that_is_hidden_changes_nothing(num_beams: int, saved: Store, ours: Ours) -> None:
    model, features = ours("whisper"), sounds(saved("whisper").theirs)
    lengths = torch.tensor([51, 20])
    given: dict[str, Any] = {"language": "en", "num_beams": num_beams, "token_times": True, "max_new_tokens": 10}
    expected = model.generate(features, frame_lengths=lengths, hide_padding=True, **given)
    noisy = features.masked_fill(torch.arange(FRAMES) >= lengths[:, None, None], float("nan"))
    found = model.generate(noisy, frame_lengths=lengths, hide_padding=True, **given)
    assert found.token_times is not None and expected.token_times is not None
    assert torch.equal(found.tokens, expected.tokens) and torch.equal(found.token_times, expected.token_times)
    for row, length in enumerate(lengths.tolist()):
        alone = model.generate(features[row : row + 1, :, :length], **given)
        assert torch.equal(found.tokens[row : row + 1], alone.tokens)
        assert found.token_times[row].max() <= length * 0.01
    sound = model.encode(features, lengths)
    again = model.generate(sound=sound, **given)
    assert torch.equal(again.tokens, expected.tokens) and again.token_times is not None
    assert torch.equal(again.token_times[1], expected.token_times[1])  # 20 frames are 10 features; 51 are 25 or 26


@pytest.mark.parametrize("num_beams", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_frame_and_no_frame(num_beams: int, saved: Store, ours: Ours) -> None:
    model, features = ours("whisper"), sounds(saved("whisper").theirs)
    given: dict[str, Any] = {"language": "en", "token_times": True, "num_beams": num_beams, "hide_padding": True}
    given |= {"max_new_tokens": 6}
    found = model.generate(features, frame_lengths=torch.tensor([1, 0]), **given)
    assert found.token_times is not None and not found.token_times.any()
    alone = model.generate(features[:1, :, :1], frame_lengths=torch.tensor([1]), **given)
    assert torch.equal(alone.tokens, found.tokens[:1])


@pytest.mark.parametrize("num_beams", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_half_precision(num_beams: int, saved: Store, ours: Ours) -> None:
    features = sounds(saved("whisper").theirs)
    given: dict[str, Any] = {"language": "en", "token_times": True, "num_beams": num_beams, "timestamps": True}
    for model in (ours("whisper", torch.bfloat16), ours("whisper", torch.float16)):
        found = model.generate(features, **given)
        assert found.tokens.shape == (2, LENGTH - 3) and found.token_times is not None
        assert found.token_times.dtype == torch.float32 and bool((found.token_times.diff(dim=1) >= 0).all())
    with torch.autocast("cpu", torch.bfloat16):
        assert ours("whisper").generate(features, **given).tokens.shape == (2, LENGTH - 3)


def test_drawn_tokens_follow_the_rules_and_the_seed(saved: Store, ours: Ours) -> None:
    model, features = ours("whisper"), sounds(saved("whisper").theirs)
    draw = lambda seed: model.generate(features, language="en", timestamps=True, temperature=1.0, seed=seed).tokens
    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))
    for row in draw(2).tolist():
        times = [token for token in row if token >= FIRST_TIME]
        assert FIRST_TIME <= row[0] <= FIRST_TIME + 20 and times == sorted(times)
        assert not set(row) & {3, 7, *range(START, NO_TIMES + 1)}


# Prompts and rules.


def test_prompts(saved: Store, ours: Ours) -> None:
    model, features = ours("whisper"), sounds(saved("whisper").theirs)
    write = lambda **options: model.generate(features, max_new_tokens=1, **options).prompt.tolist()
    assert write(language="DE") == [[START, GERMAN, TRANSCRIBE, NO_TIMES]] * 2
    assert write(language="german", timestamps=True) == [[START, GERMAN, TRANSCRIBE]] * 2
    detected = model.detect_language(model.encode(features))
    assert [row[1] for row in write()] == detected.tolist()
    assert [row[1] for row in write(task="transcribe")] == detected.tolist()
    assert write(language="en", prompt_ids=torch.tensor([PREVIOUS, 9]))[0][:3] == [PREVIOUS, 9, START]


@pytest.mark.parametrize(
    ("prefix", "timestamps", "prompt"),
    [
        ((), False, [1, 9]),
        ((9,), False, [1, 9]),  # as models for English alone have it
        ((9,), True, [1]),
        ((4, 5, 9), False, [1, 4, 5, 9]),
        ((4, 5, 9), True, [1, 4, 5]),
        ((None, 5), True, [1, 5]),
    ],
)
def test_prompts_of_a_configuration(prefix: tuple[int | None, ...], timestamps: bool, prompt: list[int]) -> None:
    tokens = WhisperTokens(no_timestamps_token_id=9, prefix=prefix)
    given: dict[str, Any] = {"language": None, "task": None, "detect": lambda: None}
    assert tokens.prompt(1, 2, torch.device("cpu"), timestamps=timestamps, **given).tolist() == [prompt] * 2
    known = replace(tokens, languages={"<|en|>": 7})
    given["detect"] = lambda: torch.tensor([7, 7])
    first = [7] if not prefix or prefix[0] in (None, 9) else []
    expected = [1, *first, *prompt[1:]]
    assert known.prompt(1, 2, torch.device("cpu"), timestamps=timestamps, **given).tolist() == [expected] * 2


def _rules(timestamps: bool = True, **changes: Any) -> TokenRules:
    """Tokens: words 0 to 3, the end 4, no times 5, times from 6 to 9."""
    tokens = WhisperTokens(no_timestamps_token_id=5, **changes)
    return TokenRules(tokens, vocab_size=10, eos=4, timestamps=timestamps)


@pytest.mark.parametrize(
    ("written", "allowed"),
    [
        ([], [6, 7, 8, 9]),  # a time comes first
        ([7], [0, 1, 2, 3, 4]),  # then words, or the end
        ([7, 1], [0, 1, 2, 3, 4, 8, 9]),  # times grow
        ([7, 1, 8], [4, 8, 9]),  # a time may be repeated, as the end of one part and the start of another
        ([7, 1, 8, 8], [0, 1, 2, 3, 4]),
        ([7, 1, 8, 8, 2], [0, 1, 2, 3, 4, 9]),
    ],
)
def test_rules_of_times(written: list[int], allowed: list[int]) -> None:
    scores = torch.full((1, 10), 0.0)
    scores[:, 4] = 3.0  # more than all times together
    given = torch.tensor([written], dtype=torch.int64)
    found = _rules()(scores, given)[0]
    assert (found > -math.inf).nonzero()[:, 0].tolist() == allowed
    likely = _rules()(torch.zeros(1, 10).index_fill(1, torch.arange(6, 10), 5.0), given)[0]
    times = [token for token in allowed if token > 5]
    assert (likely > -math.inf).nonzero()[:, 0].tolist() == (times or allowed)  # times that are likelier than words


def test_rules_of_tokens() -> None:
    given = torch.tensor([[1]])
    rules = _rules(False, suppress=(2, 3), begin_suppress=(4,))
    assert rules(torch.zeros(1, 10), given[:, :0]).isinf()[0].nonzero()[:, 0].tolist() == [2, 3, 4]
    assert rules(torch.zeros(1, 10), given).isinf()[0].nonzero()[:, 0].tolist() == [2, 3]
    first = _rules(max_initial_timestamp=1)(torch.zeros(1, 10), given[:, :0])
    assert (first > -math.inf)[0].nonzero()[:, 0].tolist() == [6, 7]


Wrong = tuple[dict[str, Any], type[Exception], str]
WRONG: dict[str, Wrong] = {
    "language": ({"language": "xx"}, ValueError, "language must be one of de, en, ..., got 'xx'"),
    "languages": ({"language": ["en"]}, ValueError, "one language or 2, one for each sound, got 1"),
    "type": ({"language": 3}, TypeError, "language must be a string or a list of them, got int"),
    "task": ({"task": "sing"}, ValueError, "task must be one of transcribe, translate or None, got 'sing'"),
    "beams": ({"num_beams": 0}, ValueError, "num_beams must be a positive integer, got 0"),
    "many": ({"num_beams": 99, "max_new_tokens": 0}, ValueError, "max_new_tokens must be a positive integer, got 0"),
    "penalty": ({"length_penalty": math.nan}, ValueError, "length_penalty must be a number from -10 to 10, got nan"),
    "large penalty": (
        {"num_beams": 2, "length_penalty": 300.0},
        ValueError,
        "must be a number from -10 to 10, got 300",
    ),
    "no beams": ({"length_penalty": 3.0}, ValueError, "length_penalty must be left out with num_beams = 1, got 3.0"),
    "millions": ({"num_beams": 10**7, "max_new_tokens": 2}, ValueError, "num_beams must be at most 1024, got 10000000"),
    "end": ({"eos_token_id": "a"}, ValueError, "eos_token_id must be integers below vocab_size = 119, got 'a'"),
    "no end": ({"eos_token_id": [None]}, ValueError, "eos_token_id must be integers below vocab_size = 119"),
    "far end": ({"eos_token_id": 119}, ValueError, "eos_token_id must be integers below vocab_size = 119, got 119"),
    "bool": ({"timestamps": "yes"}, TypeError, "timestamps must be a bool, got str"),
    "hide bool": ({"hide_padding": 1}, TypeError, "hide_padding must be a bool, got int"),
    "times bool": ({"token_times": 1}, TypeError, "token_times must be a bool, got int"),
    "long": (
        {"token_times": True, "frame_lengths": torch.tensor([-5, 500])},
        ValueError,
        "frame_lengths must be from 0 to 100, got -5 to 500",
    ),
    "draw": ({"num_beams": 2, "temperature": 1.0}, ValueError, "must be left out with num_beams = 2"),
    "cold": ({"temperature": -1.0}, ValueError, "temperature must be >= 0"),
    "lengths": ({"frame_lengths": torch.tensor([9, 9])}, ValueError, "frame_lengths must be None without hide_padding"),
    "hide": ({"hide_padding": True}, ValueError, "frame_lengths must be given with hide_padding"),
    "short": (
        {"token_times": True, "frame_lengths": torch.tensor([9])},
        ValueError,
        r"frame_lengths must be \[2\], one for each sound, got shape \(1,\)",
    ),
    "prompt": ({"prompt_ids": [1]}, TypeError, "prompt_ids must be an int32 or int64 tensor, got list"),
    "prompt's shape": ({"prompt_ids": torch.ones(1, 2).long()}, ValueError, r"prompt_ids must be \[n\], got shape"),
    "long prompt": (
        {"prompt_ids": torch.ones(21).long()},
        ValueError,
        "prompt_ids must leave room in text_length = 24",
    ),
    "unknown prompt": ({"prompt_ids": torch.tensor([999])}, ValueError, "input_ids must be from 0 to 118"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_options(name: str, saved: Store, ours: Ours) -> None:
    options, error, match = WRONG[name]
    with pytest.raises(error, match=match):
        ours("whisper").generate(sounds(saved("whisper").theirs), **options)


def test_what_a_vocabulary_does_not_have() -> None:
    plain = replace(Whisper.sizes["tiny"], tokens=WhisperTokens())
    model, features = Whisper(plain).eval(), torch.randn(1, 80, 100)
    for options, match in (
        ({"timestamps": True}, "timestamps must be False: the model's vocabulary has no times"),
        ({"language": "en"}, "language must be None: the model has one language"),
        ({"task": "translate"}, "task must be None: the model has no token for it"),
        ({"token_times": True}, "token_times must be False: the configuration has no alignment_heads"),
    ):
        with pytest.raises(ValueError, match=match):
            model.generate(features, **options)
    with pytest.raises(ValueError, match="the model must have tokens of languages"):
        model.detect_language(model.encode(features))
    with pytest.raises(ValueError, match="the model must have tokens of times to transcribe"):
        model.transcribe(features)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_sounds_with_nan(value: float, saved: Store, ours: Ours) -> None:
    model, features, lengths = ours("whisper"), sounds(saved("whisper").theirs), torch.tensor([FRAMES, 50])
    features[1, 3, 60] = value
    heard = model.encode(features)
    options = {"language": "en", "max_new_tokens": 1}
    for call in (
        lambda: model.generate(features, **options),
        lambda: model.generate(features, frame_lengths=(lengths + 11).clamp(max=FRAMES), hide_padding=True, **options),
        lambda: model.transcribe(features, language="en"),
    ):
        with pytest.raises(ValueError, match="input_features must be finite, got NaN or infinity"):
            call()
    for listen in (lambda: model.generate(sound=heard, **options), lambda: model.detect_language(heard)):
        with pytest.raises(ValueError, match=r"sound\.features must be finite, got NaN or infinity"):
            listen()
    hidden = model.generate(features, frame_lengths=lengths, hide_padding=True, **options)
    assert torch.equal(
        hidden.tokens, model.generate(features.nan_to_num(), frame_lengths=lengths, hide_padding=True, **options).tokens
    )


@pytest.mark.parametrize("num_beams", [1, 2])
def test_no_sounds(num_beams: int, saved: Store, ours: Ours) -> None:
    features = sounds(saved("whisper").theirs)[:0]
    with pytest.raises(ValueError, match="input_features or sound must have at least one sound, got none"):
        ours("whisper").generate(features, language="en", num_beams=num_beams)


def test_no_layer_is_dropped_where_a_cache_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Whisper(replace(Whisper.sizes["tiny"], text_layer_dropout=0.5)).train()
    features, ids = torch.randn(2, 80, 100), torch.randint(60, (2, 4))
    expected = model.eval()(ids, features).logits
    model.train()
    monkeypatch.setattr(torch, "rand", lambda *size: torch.zeros(*size))  # every layer would be dropped
    first = model(ids[:, :3], features)  # no cache was given: the layers are dropped, but their keys are kept
    assert first.cache is not None and first.logits is not None
    assert not torch.allclose(first.logits, expected[:, :3], atol=1e-3)
    assert model(ids[:, 3:], cache=first.cache).logits.shape == (2, 1, 128)
    cache = WhisperCache(2)
    turns = [model(ids[:, :3], features, cache=cache).logits, model(ids[:, 3:], cache=cache).logits]
    torch.testing.assert_close(torch.cat(turns, dim=1), expected, rtol=1e-5, atol=1e-5)
    for num_beams in (1, 2):
        assert model.generate(features, max_new_tokens=2, num_beams=num_beams).tokens.shape[0] == 2
